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
