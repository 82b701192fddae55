"""A pattern over tokens that are not taken in raster order: pictures whose rows are drawn side by side."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from dalle_kernels.checks import as_int
from dalle_kernels.patterns.patterns import IntArray, Pattern


class Feeds(NamedTuple):
    """The tokens that a model takes, in their order; int32 arrays, one entry each."""

    position: IntArray
    """Where it stands in the raster sequence."""
    token: IntArray
    """The position whose token it is: its own, unless it stands in for one that is not drawn yet."""
    draws: IntArray
    """The position of the token that its output draws; -1 for none."""
    round: IntArray
    """Ascending; tokens of one round are taken together, and the tokens of round 0 are known."""


@dataclass(frozen=True)
class Diagonal(Pattern):
    """`pattern` where each row of a picture begins once the row above is `window` cells ahead (ZipAR, He et al. 2024,
    arXiv 2412.04062, section 3.2), as a pattern over tokens in the order in which they are taken.

    Positions from `first` on are a picture's cells in raster order, `columns` a row; the token at position p draws
    that at p + 1. The tokens before `first` and the first `known` cells are known: they are round 0, in raster order,
    and the last of them draws the first cell that is not known. From then on each row draws a cell a round, and a row
    begins `window` rounds after the row above, or, below a row of which c cells were known, window - c rounds after it
    and at least one. A row's first cell is drawn by the last cell of the row above; where that is not drawn yet, the
    rightmost token of that row that is drawn stands in its place, is seen by nothing but itself, and forgotten. The
    cell's own token is taken once it is drawn, and draws nothing.

    A token sees what `pattern` shows its position of the tokens taken before it, those of its own round that stand
    before it in raster order among them, and itself. With window = columns the order is the raster's, and what is seen
    is what `pattern` shows.

    Raises:
        ValueError: for a position, window or number of cells that `pattern` does not have.

    Example:
        >>> pattern = Diagonal(Causal(TokenLayout(1, (2, 3))), first=1, columns=3, window=1)
        >>> pattern.feeds.position.tolist(), pattern.feeds.round.tolist()  # position 3 stands in first
        ([0, 1, 3, 2, 4, 3, 5, 6], [0, 1, 1, 2, 2, 3, 3, 4])
        >>> pattern.mask()[4].int().tolist()  # position 4 sees 0, 1, 2 and itself
        [1, 1, 0, 1, 1, 0, 0, 0]
    """

    pattern: Pattern
    first: int
    columns: int
    window: int
    known: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, Pattern):
            raise TypeError(f"pattern: got {type(self.pattern).__name__}, wanted a Pattern")
        cells = self.pattern.length - self.first
        for name, least, most in (
            ("first", 1, self.pattern.length),
            ("columns", 1, self.pattern.length),
            ("window", 1, self.columns),
            ("known", 0, cells),
        ):
            value = as_int(name, getattr(self, name))
            if not least <= value <= most:
                raise ValueError(f"{name}: got {value}, wanted an int from {least} to {most}")
            object.__setattr__(self, name, value)
        arguments = {"pattern": "Diagonal", "pattern_spec": self.pattern.spec}
        numbers = {name: getattr(self, name) for name in ("first", "columns", "window", "known")}
        object.__setattr__(self, "spec", json.dumps(arguments | numbers))

    @classmethod
    def _from_spec(cls, spec: str, arguments: dict[str, Any]) -> Pattern:
        return cls(Pattern.parse(arguments.pop("pattern_spec")), **arguments)

    @property
    def length(self) -> int:
        return self.feeds.position.size

    @cached_property
    def feeds(self) -> Feeds:
        """The tokens in their order."""
        first, columns, total = self.first, self.columns, self.pattern.length
        begun, ahead = divmod(self.known, columns)  # the row in which cells are known, and how many of them
        cell = np.arange(self.known, total - first)
        row, column = np.divmod(cell, columns)
        # Row r draws column c in round start(r) + c; the token drawn in a round is taken in the next.
        start = np.where(row == begun, -ahead, max(1, self.window - ahead) + (row - begun - 1) * self.window)
        taken = start + column + 1
        # A row that begins before the row above is done has a stand-in for that row's last cell.
        below = np.arange(begun + 1, -(-(total - first) // columns))
        begins = max(1, self.window - ahead) + (below - begun - 1) * self.window
        rightmost = begins - np.where(below - 1 == begun, -ahead, begins - self.window) - 1
        early = rightmost < columns - 1
        stands, its_token = first + below[early] * columns - 1, first + (below[early] - 1) * columns + rightmost[early]
        position = first + cell
        draws = np.where(np.isin(position, stands), -1, position + 1)
        rest = [np.concatenate(pair) for pair in (
            (position, stands),
            (position, its_token),
            (draws, stands + 1),
            (taken, begins[early]),
        )]  # fmt: skip
        order = np.lexsort((rest[0], rest[3]))
        before = np.arange(first + self.known)
        draws_first = np.where(before == before.size - 1, before.size, -1)
        known = (before, before, draws_first, np.zeros_like(before))
        return Feeds(*(np.concatenate([a, b[order]]).astype(np.int32) for a, b in zip(known, rest, strict=True)))

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """By position: where its own token is in the order, and where its stand-in is, -1 for none."""
        feeds, places = self.feeds, np.full((2, self.pattern.length), -1, np.int32)
        own = feeds.position == feeds.token
        for which, chosen in ((0, own), (1, ~own)):
            places[which, feeds.position[chosen]] = np.flatnonzero(chosen)
        return places[0], places[1]

    def leading(self, length: int) -> IntArray:
        run = self.pattern.leading(self.pattern.length)[self.feeds.position[:length]]
        return np.minimum(run, np.int32(self.first + self.known))

    def pairs(self, length: int) -> Iterator[tuple[IntArray, IntArray]]:
        total, (own, stand_in) = self.pattern.length, self._places
        run = self.pattern.leading(total)
        for query, key in itertools.chain(self._led(run), self.pattern.pairs(total)):
            standing = stand_in[query] >= 0
            replaced = stand_in[query[standing]]
            queries = np.concatenate([own[query], replaced])
            itself = key[standing] == query[standing]
            keys = np.concatenate([own[key], np.where(itself, replaced, own[key[standing]])])
            seen = (keys <= queries) & (queries < length)
            if seen.any():
                yield queries[seen], keys[seen]

    def _led(self, run: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
        """Pairs of leading keys that are not known from the start, where `run` leads the positions."""
        for key in range(self.first + self.known, int(run.max())):
            query = np.flatnonzero(run > key).astype(np.int32)
            yield query, np.full_like(query, key)
