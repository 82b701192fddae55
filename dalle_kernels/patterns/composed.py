"""Patterns made of patterns: both, either, later in a longer sequence, several side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from dalle_kernels.patterns.layout import TokenLayout
from dalle_kernels.patterns.patterns import Grid, IntArray, Pattern, by_turn

T = TypeVar("T")


@dataclass(frozen=True)
class _Pair(Pattern):
    """Two patterns over the same sequence."""

    first: Pattern
    second: Pattern

    def __post_init__(self) -> None:
        _check_patterns(self.first, self.second)
        if self.first.length != self.second.length:
            raise ValueError(
                f"{type(self).__name__}: got patterns of {self.first.length} and {self.second.length} tokens, wanted "
                "equally long ones; `shifted` places one in a longer sequence"
            )
        _write_spec(self, patterns=[self.first.spec, self.second.spec])

    @property
    def length(self) -> int:
        return self.first.length

    @property
    def layout_or_none(self) -> TokenLayout | None:
        return _common(self.first.layout_or_none, self.second.layout_or_none)

    @property
    def grid_or_none(self) -> Grid | None:
        return _common(self.first.grid_or_none, self.second.grid_or_none)

    @classmethod
    def _from_spec(cls, spec: str, arguments: dict[str, Any]) -> Pattern:
        return cls(*map(Pattern.parse, arguments["patterns"]))

    def _codes(self, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The leading runs of both, and their other pairs as int64 query * length + key."""
        runs = [pattern.leading(length) for pattern in (self.first, self.second)]
        codes = [
            np.concatenate(
                [np.zeros(0, np.int64), *(q.astype(np.int64) * length + k for q, k in pattern.pairs(length))]
            )
            for pattern in (self.first, self.second)
        ]
        return runs[0], runs[1], codes[0], codes[1]


def _common(one: T | None, other: T | None) -> T | None:
    """Both's, or that of the one that has any: a matrix takes the grid of what it is joined to."""
    if one is None or other is None:
        return one if other is None else other
    return one if one == other else None


@dataclass(frozen=True)
class Union(_Pair):
    """What either pattern makes visible; `first | second` is the short way to write it.

    Raises:
        ValueError: where the patterns differ in length.

    Example:
        >>> layout = TokenLayout(0, (3, 3))
        >>> (Row(layout) | Column(layout)).mask()[8].int().tolist()
        [0, 0, 1, 0, 0, 1, 1, 1, 1]
    """

    def leading(self, length: int) -> IntArray:
        return np.maximum(self.first.leading(length), self.second.leading(length))

    def pairs(self, length: int) -> Iterator[tuple[IntArray, IntArray]]:
        *_, first, second = self._codes(length)
        query, key = np.divmod(np.union1d(first, second), length)
        beyond = key >= self.leading(length)[query]
        yield from by_turn(query[beyond], key[beyond], length)


@dataclass(frozen=True)
class Intersection(_Pair):
    """What both patterns make visible; `first & second` is the short way to write it.

    Raises:
        ValueError: where the patterns differ in length.

    Example:
        >>> layout = TokenLayout(0, (3, 3))
        >>> (Row(layout) & Column(layout)).mask()[8].int().tolist()
        [0, 0, 0, 0, 0, 1, 0, 0, 1]
    """

    def leading(self, length: int) -> IntArray:
        return np.minimum(self.first.leading(length), self.second.leading(length))

    def pairs(self, length: int) -> Iterator[tuple[IntArray, IntArray]]:
        run, other_run, first, second = self._codes(length)

        def within(codes: np.ndarray, other: np.ndarray) -> np.ndarray:
            """Those that the other pattern's leading run holds."""
            query, key = np.divmod(codes, length)
            return codes[key < other[query]]

        both = np.concatenate([np.intersect1d(first, second), within(first, other_run), within(second, run)])
        query, key = np.divmod(np.unique(both), length)
        yield from by_turn(query, key, length)


@dataclass(frozen=True)
class Shifted(Pattern):
    """A pattern that begins at token `offset` of a sequence of `total` tokens. Tokens outside of it see nothing.

    `pattern.shifted(offset, total)` is the short way to write it.

    Raises:
        ValueError: where the pattern does not fit between `offset` and `total`.

    Example:
        >>> Causal(TokenLayout(0, (1, 2))).shifted(1, 4).mask().int().tolist()
        [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """

    pattern: Pattern
    offset: int
    total: int

    def __post_init__(self) -> None:
        _check_patterns(self.pattern)
        for name in ("offset", "total"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}: got {value!r}, wanted an int >= 0")
        if self.offset + self.pattern.length > self.total:
            raise ValueError(f"total: got {self.total}, wanted at least {self.offset + self.pattern.length}")
        _write_spec(self, pattern_spec=self.pattern.spec, offset=self.offset, total=self.total)

    @property
    def length(self) -> int:
        return self.total

    @classmethod
    def _from_spec(cls, spec: str, arguments: dict[str, Any]) -> Pattern:
        return cls(Pattern.parse(arguments["pattern_spec"]), arguments["offset"], arguments["total"])

    def pairs(self, length: int) -> Iterator[tuple[IntArray, IntArray]]:
        yield from _moved(self.pattern, self.offset, length)


@dataclass(frozen=True)
class Packed(Pattern):
    """Several patterns one after another in one sequence, none of which sees another: pictures of mixed shapes without
    padding, as Dehghani et al. 2023 (NaViT) train them.

    Raises:
        ValueError: for no pattern at all.

    Example:
        >>> wide, high = Row(TokenLayout(4, (2, 8))), Row(TokenLayout(4, (8, 2)))
        >>> packed = Packed((wide, high))
        >>> packed.length, packed.offsets, packed.visible_pairs == wide.visible_pairs + high.visible_pairs
        (40, (0, 20), True)
    """

    patterns: tuple[Pattern, ...]

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        if not isinstance(patterns, Sequence) or not patterns:
            raise ValueError(f"patterns: got {patterns!r}, wanted at least one Pattern")
        _check_patterns(*patterns)
        object.__setattr__(self, "patterns", tuple(patterns))
        _write_spec(self, patterns=[pattern.spec for pattern in patterns])

    @property
    def length(self) -> int:
        return sum(pattern.length for pattern in self.patterns)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each pattern begins."""
        ends = np.cumsum([0, *(pattern.length for pattern in self.patterns)])
        return tuple(int(end) for end in ends[:-1])

    @classmethod
    def _from_spec(cls, spec: str, arguments: dict[str, Any]) -> Pattern:
        return cls(tuple(map(Pattern.parse, arguments["patterns"])))

    def leading(self, length: int) -> IntArray:
        first = self.patterns[0]
        run = np.zeros(length, np.int32)
        inside = min(length, first.length)
        run[:inside] = first.leading(inside)
        return run

    def pairs(self, length: int) -> Iterator[tuple[IntArray, IntArray]]:
        yield from self.patterns[0].pairs(min(length, self.patterns[0].length))
        for pattern, offset in zip(self.patterns[1:], self.offsets[1:], strict=True):
            yield from _moved(pattern, offset, length)


def _moved(pattern: Pattern, offset: int, length: int) -> Iterator[tuple[IntArray, IntArray]]:
    """The pairs of `pattern`, its leading runs among them, from token `offset` on, as far as `length` reaches."""
    inside = min(length - offset, pattern.length)
    if inside <= 0:
        return
    run = pattern.leading(inside)
    for first in range(int(run.max())):
        query = np.flatnonzero(run > first).astype(np.int32) + np.int32(offset)
        yield query, np.full_like(query, first + offset)
    for query, key in pattern.pairs(inside):
        yield query + np.int32(offset), key + np.int32(offset)


def _codes(pattern: Pattern, length: int) -> np.ndarray:
    codes = [query.astype(np.int64) * length + key for query, key in pattern.pairs(length)]
    return np.concatenate([np.zeros(0, np.int64), *codes])


def _check_patterns(*patterns: object) -> None:
    for pattern in patterns:
        if not isinstance(pattern, Pattern):
            raise TypeError(f"pattern: got {type(pattern).__name__}, wanted a Pattern")


def _write_spec(pattern: Pattern, **arguments: Any) -> None:
    object.__setattr__(pattern, "spec", json.dumps({"pattern": type(pattern).__name__} | arguments))
