"""Byte-pair encoding: round trips in four scripts, seeded dropout, files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dalle_reference.errors import UserError
from dalle_reference.tokenizer import PADDING, CaptionTokenizer

CAPTIONS = ["grinning face", "ухмыляющееся лицо", "嘿嘿", "활짝 웃는 얼굴", "face with tears of joy", "red face"] * 3


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train(CAPTIONS, vocab_size=400)


def test_round_trip_in_every_script_and_without_unknowns(tokenizer: CaptionTokenizer) -> None:
    texts = [*CAPTIONS[:6], "naïve ☃ 犬"]
    assert tokenizer.decode(tokenizer.encode(texts, 64)) == texts


def test_lower_case(tokenizer: CaptionTokenizer) -> None:
    assert torch.equal(tokenizer.encode(["RED Face"], 16), tokenizer.encode(["red face"], 16))


def test_padding_and_truncation(tokenizer: CaptionTokenizer) -> None:
    tokens = tokenizer.encode(["", "  ", "grinning face", "grinning face " * 40], 12)
    assert tokens.shape == (4, 12)
    assert tokens.dtype == torch.int64
    assert (tokens[:2] == PADDING).all()
    assert (tokens[3] >= 0).all()
    assert int(tokens.max()) < tokenizer.vocab_size


def test_walked_merges_are_the_library_s_own(tokenizer: CaptionTokenizer) -> None:
    # A dropout too small to strike takes the walked path; its result must be what `tokenizers` gives.
    walked = tokenizer.encode(CAPTIONS, 64, dropout=1e-12, generator=np.random.default_rng(0))
    assert torch.equal(walked, tokenizer.encode(CAPTIONS, 64))


def test_dropout_cuts_differently_means_the_same_and_can_be_repeated(tokenizer: CaptionTokenizer) -> None:
    first, again = (tokenizer.encode(CAPTIONS, 64, 0.3, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, tokenizer.encode(CAPTIONS, 64))
    assert tokenizer.decode(first) == CAPTIONS


def test_dropout_of_everything_leaves_bytes(tokenizer: CaptionTokenizer) -> None:
    tokens = tokenizer.encode(["red"], 64, 1.0, np.random.default_rng(0))
    assert int((tokens >= 0).sum()) == len(" red")


@pytest.mark.parametrize("word", ["ab" * 50_000, "a" * 1_000_000, "a" * 1_000_000 + " end"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_only_as_much_of_a_caption_is_merged_as_can_be_read(
    tokenizer: CaptionTokenizer, word: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        tokenizer, "_encode", lambda text, encode=tokenizer._encode: (asked.append(text), encode(text))[1]
    )
    walk = tokenizer._encode_with_dropout
    monkeypatch.setattr(
        tokenizer, "_encode_with_dropout", lambda text, *rest: (asked.append(text), walk(text, *rest))[1]
    )
    tokens = tokenizer.encode([word], 16, dropout, np.random.default_rng(0))
    assert (tokens >= 0).all()
    assert [len(text) <= 24 * tokenizer._longest for text in asked] == [True]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_what_is_cut_off_changes_no_token(tokenizer: CaptionTokenizer, dropout: float) -> None:
    text = "grinning face with tears of joy " * 100
    whole = tokenizer.encode([text], 600, dropout, np.random.default_rng(3))
    for length in (1, 7, 100):
        assert torch.equal(tokenizer.encode([text], length, dropout, np.random.default_rng(3)), whole[:, :length])


def test_whether_a_caption_is_cut(tokenizer: CaptionTokenizer) -> None:
    length = int((tokenizer.encode(["grinning face"], 16) >= 0).sum())
    assert not tokenizer.is_cut("grinning face", length)
    assert tokenizer.is_cut("grinning face", length - 1)
    assert tokenizer.is_cut("x" * 10_000_000, 255)
    assert not tokenizer.is_cut(" ", 1)


def test_learning_from_one_huge_word_ends() -> None:
    assert CaptionTokenizer.train(["a" * 1_000_000], 300).vocab_size <= 300


def test_dropout_wants_a_generator(tokenizer: CaptionTokenizer) -> None:
    with pytest.raises(ValueError, match="generator: got None"):
        tokenizer.encode(["red"], 8, dropout=0.1)


def test_files(tokenizer: CaptionTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert torch.equal(CaptionTokenizer.load(path).encode(CAPTIONS, 32), tokenizer.encode(CAPTIONS, 32))
    path.write_text(path.read_text(encoding="utf-8")[:-50], encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        CaptionTokenizer.load(path)
    with pytest.raises(UserError, match="cannot be read"):
        CaptionTokenizer.load(tmp_path / "none.json")


def test_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size: got 100"):
        CaptionTokenizer.train(CAPTIONS, 100)
