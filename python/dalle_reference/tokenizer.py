"""Captions to tokens: byte-pair encoding, lower case, with BPE dropout while training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dalle_reference.errors import UserError
from dalle_reference.files import replacing

PADDING = -1
_MOST_LEARNT = 4096
"""Letters of a caption that merges are learnt from; the trainer takes the square of a word's length in time."""


class CaptionTokenizer:
    """Byte-level BPE over lower-cased text, from Hugging Face's `tokenizers`.

    Bytes are the alphabet, so every text in every script has tokens and none is unknown.

    BPE dropout (Provilkov et al. 2020) leaves out each possible merge with a probability, so that a caption is seen cut
    in many ways. The library's own takes its chance from a generator that cannot be seeded; here the merges are walked
    in Python with a given one, so that a training run can be repeated and continued exactly.

    Example:
        >>> tokenizer = CaptionTokenizer.train(["a red cat", "a red dog"], vocab_size=300)
        >>> tokenizer.encode(["A red cat"], length=8).shape
        torch.Size([1, 8])
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = tokenizer.get_vocab()
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        self._ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
        self._no_merge = len(merges)
        self._longest = max(map(len, self._vocabulary))

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> CaptionTokenizer:
        """Learns at most `vocab_size` tokens, 256 of which are the bytes."""
        if vocab_size < 256:
            raise ValueError(f"vocab_size: got {vocab_size}, wanted at least 256, one for each byte")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator((caption[:_MOST_LEARNT] for caption in captions), trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path) -> CaptionTokenizer:
        """Reads what `save` wrote.

        Raises:
            UserError: if there is no such file or it is no tokenizer.
        """
        try:
            return cls(Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except Exception as error:  # `tokenizers` raises bare Exception for a damaged file
            raise UserError(f"{path}: cannot be read as a tokenizer ({error})") from error

    def save(self, path: Path) -> None:
        with replacing(path) as draft:
            draft.write_text(self._tokenizer.to_str(), encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        return len(self._vocabulary)

    def encode(
        self, captions: Sequence[str], length: int, dropout: float = 0.0, generator: np.random.Generator | None = None
    ) -> torch.Tensor:
        """Tokens of `captions`: int64 [N, length], cut at `length`, -1 where a caption has ended.

        Args:
            captions: N texts; an empty one is all padding.
            length: text positions of the model.
            dropout: the probability with which a merge is left out.
            generator: the chance for it; wanted where `dropout` is not 0.
        """
        if dropout and generator is None:
            raise ValueError(f"generator: got None, wanted one for dropout {dropout}")
        rows = np.full((len(captions), length), PADDING, dtype=np.int64)
        for row, caption in zip(rows, captions, strict=True):
            text = self._beginning(caption, length)
            if dropout and generator:
                tokens = self._encode_with_dropout(text, length, dropout, generator)
            else:
                tokens = self._encode(text)
            row[: min(length, len(tokens))] = tokens[:length]
        return torch.from_numpy(rows)

    def is_cut(self, caption: str, length: int) -> bool:
        """Whether `encode` leaves out the end of a caption at this length."""
        return len(self._encode(self._beginning(caption, length))) > length

    def _beginning(self, caption: str, length: int) -> str:
        """As much of a caption as `length` tokens, and some more, can say: merging costs time for all that it is given.

        No token has more letters than the longest, and what is cut off further away than a few tokens changes none.
        """
        return caption.strip()[: (length + 8) * self._longest]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids if text else []

    def decode(self, tokens: torch.Tensor) -> list[str]:
        """The texts of int64 [N, T] tokens; -1 is nothing."""
        return [self._tokenizer.decode([t for t in row if t != PADDING]).strip() for row in tokens.tolist()]

    def _encode_with_dropout(self, text: str, length: int, dropout: float, generator: np.random.Generator) -> list[int]:
        if not text:
            return []
        tokens: list[int] = []
        for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(self._tokenizer.normalizer.normalize_str(text)):
            pieces = list(word)
            ranks = [self._ranks.get(pair, self._no_merge) for pair in pairwise(pieces)]
            # Lists, and all of a word's chances at once: with arrays of so few numbers this took four times as long.
            for kept in (generator.random((len(ranks), len(ranks))) >= dropout).tolist():
                candidates = [rank if keep else self._no_merge for rank, keep in zip(ranks, kept, strict=False)]
                least = min(candidates)
                if least == self._no_merge:
                    break
                at = candidates.index(least)
                pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
                del ranks[at]
                for left in (at - 1, at):
                    if 0 <= left < len(ranks):
                        ranks[left] = self._ranks.get((pieces[left], pieces[left + 1]), self._no_merge)
            tokens += [self._vocabulary[piece] for piece in pieces]
            if len(tokens) >= length:
                break
        return tokens
