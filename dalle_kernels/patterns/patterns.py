"""Who may attend to whom: the patterns of DALL-E (Ramesh et al. 2021, figure 11) and of its descendants.

A pattern states one thing: for each query, the keys that it sees, as a run of leading keys (the text) and the pairs
that remain. The dense mask, the tile schedule and the decode table are all derived from that statement, in time
proportional to the visible pairs.
"""

from __future__ import annotations

import base64
import json
import operator
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias
from weakref import WeakValueDictionary

import numpy as np
import torch

from dalle_kernels.patterns.layout import TokenLayout

IntArray: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]
BoolArray: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]


class Cells(NamedTuple):
    """Grid coordinates of image tokens."""

    row: IntArray
    column: IntArray


class Grid(NamedTuple):
    """Where nearness is judged: text, then cells in raster order along one to three axes."""

    text_length: int
    shape: tuple[int, ...]
    dilation: tuple[int, ...]  # cells see those whose index is their own modulo this


class Pattern:
    """What every pattern offers. A pattern is frozen, hashable and cheap; `spec` describes it in full as text."""

    spec: str
    _kinds: ClassVar[dict[str, type[Pattern]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Pattern._kinds[cls.__name__] = cls

    @property
    def length(self) -> int:
        """Tokens of a whole sequence; a shorter sequence is a prefix."""
        raise NotImplementedError

    @property
    def layout_or_none(self) -> TokenLayout | None:
        """The layout of a pattern over text and image; None for one over a plain sequence."""
        return None

    @property
    def grid_or_none(self) -> Grid | None:
        """The cells of a pattern over a grid; None for one over a plain sequence."""
        layout = self.layout_or_none
        return None if layout is None else Grid(layout.text_length, layout.grid, (1, 1))

    def leading(self, length: int) -> IntArray:
        """int32 [length]: query i sees keys 0 .. leading[i] - 1, all of them."""
        return np.zeros(length, np.int32)

    def pairs(self, length: int) -> Iterator[tuple[IntArray, IntArray]]:
        """The visible pairs besides the leading keys: arrays (queries, keys), no query twice in one array."""
        raise NotImplementedError

    def __or__(self, other: Pattern) -> Pattern:
        """What either makes visible: `Union`."""
        from dalle_kernels.patterns.composed import Union  # which is made of patterns

        return Union(self, other)

    def __and__(self, other: Pattern) -> Pattern:
        """What both make visible: `Intersection`."""
        from dalle_kernels.patterns.composed import Intersection

        return Intersection(self, other)

    def shifted(self, offset: int, total: int | None = None) -> Pattern:
        """The pattern from token `offset` on, in a sequence of `total` tokens (just enough where None): `Shifted`."""
        from dalle_kernels.patterns.composed import Shifted

        return Shifted(self, offset, offset + self.length if total is None else total)

    def mask(self, length: int | None = None) -> torch.Tensor:
        """torch.bool [S, S], True where query i (row) sees key j (column).

        Example:
            >>> Row(TokenLayout(1, (1, 2))).mask().int().tolist()
            [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
        """
        length = check_length(self, length)
        mask = np.arange(length, dtype=np.int32) < self.leading(length)[:, None]
        for query, key in self.pairs(length):
            mask[query, key] = True
        return torch.from_numpy(mask)

    @cached_property
    def visible_pairs(self) -> int:
        """How many (query, key) pairs the whole sequence has."""
        pairs = sum(query.size for query, _ in self.pairs(self.length))
        return int(self.leading(self.length).sum(dtype=np.int64)) + pairs

    def show(self, query: int | None = None) -> str:
        """What `query` sees (the cell in the middle where None), drawn in characters, with counts: print it.

        Example:
            >>> print(Column(TokenLayout(2, (3, 3))).show(query=9))
            Column(layout=TokenLayout(text_length=2, grid=(3, 3)))
            11 tokens, 39 visible pairs of 121 (3.10x fewer), 4,096 in tiles of 64 x 64
            query 9 sees:
            ##
            . # .
            . # .
            . Q .
        """
        from dalle_kernels.patterns import picture  # which needs schedules

        return picture.text(self, query)

    def plot(self, path: str | Path, query: int | None = None) -> Path:
        """Writes a figure to `path`, whose suffix says the format: the mask, its tiles, and the keys of `query`.

        Needs matplotlib. Up to 2,048 tokens are drawn pair by pair, more as tiles alone.
        """
        from dalle_kernels.patterns import picture

        return picture.plot(self, path, query)

    @staticmethod
    @lru_cache(maxsize=256)
    def parse(spec: str) -> Pattern:
        """The pattern that `spec` describes.

        Raises:
            ValueError: if `spec` is not a pattern's.
        """
        try:
            arguments = json.loads(spec)
            kind = Pattern._kinds[arguments.pop("pattern")]
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise ValueError(f"pattern: got {spec!r}, wanted the `spec` of a Pattern") from error
        return kind._from_spec(spec, arguments)

    @classmethod
    def _from_spec(cls, spec: str, arguments: dict[str, Any]) -> Pattern:
        if "layout" in arguments:
            text_length, rows, columns = arguments["layout"]
            arguments["layout"] = TokenLayout(text_length, (rows, columns))
        return cls(**arguments)

    def _write_spec(self) -> None:
        """Called once by each dataclass: an attribute, so that reading it costs a traced function nothing."""
        arguments: dict[str, Any] = {"pattern": type(self).__name__}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            arguments[field.name] = [value.text_length, *value.grid] if isinstance(value, TokenLayout) else value
        object.__setattr__(self, "spec", json.dumps(arguments, default=operator.index))  # NumPy's integers too


def by_turn(query: np.ndarray, key: np.ndarray, length: int) -> Iterator[tuple[IntArray, IntArray]]:
    """Pairs, ascending by query, as arrays in which no query stands twice: each query's first key, each second, ..."""
    first = np.searchsorted(query, np.arange(length))
    turn = np.arange(query.size) - first[query]  # this pair is its query's turn-th
    order = np.argsort(turn, kind="stable")
    for chosen in np.split(order, np.cumsum(np.bincount(turn))[:-1]) if query.size else ():
        yield query[chosen].astype(np.int32), key[chosen].astype(np.int32)


def check_length(pattern: Pattern, length: int | None) -> int:
    """`length`, or the pattern's own where it is None; a ValueError where it is no prefix of the pattern."""
    if length is None:
        return pattern.length
    if not 1 <= length <= pattern.length:
        raise ValueError(f"length: got {length} tokens, wanted 1 to {pattern.length}, the length of {pattern}")
    return length


@dataclass(frozen=True)
class _GridPattern(Pattern):
    """Text, then a grid: text sees text causally, the image sees all text, and `distances` and `sees` say the rest."""

    layout: TokenLayout

    def __post_init__(self) -> None:
        if not isinstance(self.layout, TokenLayout):
            raise TypeError(f"layout: got {type(self.layout).__name__}, wanted a TokenLayout")
        self._write_spec()

    @property
    def length(self) -> int:
        return self.layout.length

    @property
    def layout_or_none(self) -> TokenLayout:
        return self.layout

    def distances(self) -> IntArray:
        """Raster distances d >= 0 from an image query back to the image keys that it may see."""
        raise NotImplementedError

    def sees(self, query: Cells, key: Cells) -> BoolArray | bool:
        """Which of these image pairs, each at one of `distances`, are visible."""
        return True

    def leading(self, length: int) -> IntArray:
        return np.minimum(np.arange(1, length + 1, dtype=np.int32), np.int32(self.layout.text_length))

    def pairs(self, length: int) -> Iterator[tuple[IntArray, IntArray]]:
        text = self.layout.text_length
        cell = np.arange(max(length - text, 0), dtype=np.int32)
        cells = Cells(cell // self.layout.columns, cell % self.layout.columns)
        for distance in self.distances():
            if distance >= cell.size:
                continue
            query, key = cell[distance:], cell[: cell.size - distance]
            visible = self.sees(
                Cells(*(axis[distance:] for axis in cells)), Cells(*(axis[: key.size] for axis in cells))
            )
            if visible is not True:
                query, key = query[visible], key[visible]
            if query.size:
                yield query + text, key + text


@dataclass(frozen=True)
class Causal(_GridPattern):
    """Every token sees itself and all before it: the dense baseline.

    Example:
        >>> Causal(TokenLayout(1, (1, 2))).mask().int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """

    def leading(self, length: int) -> IntArray:
        return np.arange(1, length + 1, dtype=np.int32)

    def distances(self) -> IntArray:
        return np.arange(0, dtype=np.int32)


@dataclass(frozen=True)
class Row(_GridPattern):
    """The last `columns` image tokens and itself, across the row boundary (Ramesh et al. 2021, figure 11a).

    Example:
        >>> Row(TokenLayout(0, (2, 2))).mask().int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]
    """

    def distances(self) -> IntArray:
        return np.arange(self.layout.columns + 1, dtype=np.int32)


@dataclass(frozen=True)
class Column(_GridPattern):
    """The same column, this row and above (Ramesh et al. 2021, figure 11b and c).

    Example:
        >>> Column(TokenLayout(0, (2, 2))).mask().int().tolist()
        [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]
    """

    def distances(self) -> IntArray:
        return self.layout.columns * np.arange(self.layout.rows, dtype=np.int32)


@dataclass(frozen=True)
class AxialRow(_GridPattern):
    """The same row up to itself (DALLE-pytorch's `axial_row`).

    Example:
        >>> AxialRow(TokenLayout(0, (2, 2))).mask().int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """

    def distances(self) -> IntArray:
        return np.arange(self.layout.columns, dtype=np.int32)

    def sees(self, query: Cells, key: Cells) -> BoolArray:
        return query.row == key.row


Boundary: TypeAlias = Literal["raster", "clamp", "torus", "corner"]


@dataclass(frozen=True)
class Convolution(_GridPattern):
    """A `kernel_size` x `kernel_size` neighbourhood, causal in raster order.

    `boundary` says what happens at the grid's edges, with h = kernel_size // 2:

    - "raster": centred, and wraps to the neighbouring row as the row pattern does (Ramesh et al. 2021, figure 11d).
    - "clamp": centred, cut off at the edges (ru-dalle v3).
    - "torus": centred, both axes taken round the grid (ru-dalle v2).
    - "corner": the query is the lower right corner; `dilation` spreads the cells (DALLE-pytorch's `conv_like`).

    Raises:
        ValueError: for a kernel size below 1, an even one where it is centred, or a dilation without "corner".

    Example:
        >>> Convolution(TokenLayout(), kernel_size=11, boundary="clamp").visible_pairs
        347394
    """

    kernel_size: int = 11
    boundary: Boundary = "raster"
    dilation: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.boundary not in ("raster", "clamp", "torus", "corner"):
            raise ValueError(f"boundary: got {self.boundary!r}, wanted 'raster', 'clamp', 'torus' or 'corner'")
        if self.kernel_size < 1 or (self.boundary != "corner" and self.kernel_size % 2 == 0):
            raise ValueError(f"kernel_size: got {self.kernel_size}, wanted an odd int >= 1 (any for 'corner')")
        if self.dilation < 1 or (self.boundary != "corner" and self.dilation != 1):
            raise ValueError(f"dilation: got {self.dilation}, wanted 1 (any int >= 1 for boundary='corner')")

    def _offsets(self, side: int) -> IntArray:
        """Offsets query - key along one axis of `side` cells at which a key may lie."""
        half = self.kernel_size // 2
        if self.boundary == "corner":
            return self.dilation * np.arange(self.kernel_size, dtype=np.int32)
        if self.boundary == "torus":
            offset = np.arange(1 - side, side, dtype=np.int32)
            return offset[np.minimum(abs(offset), side - abs(offset)) <= half]
        return np.arange(-half, half + 1, dtype=np.int32)

    def distances(self) -> IntArray:
        rows, columns = self._offsets(self.layout.rows), self._offsets(self.layout.columns)
        if self.boundary == "raster":
            rows = rows[rows >= 0]
        distance = np.unique(self.layout.columns * rows[:, None] + columns)
        return distance[distance >= 0]

    def sees(self, query: Cells, key: Cells) -> BoolArray | bool:
        if self.boundary == "raster":
            return True
        down = np.isin(query.row - key.row, self._offsets(self.layout.rows))
        return down & np.isin(query.column - key.column, self._offsets(self.layout.columns))


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: got {value!r}, wanted an int >= 1")


@dataclass(frozen=True)
class Strided(Pattern):
    """The last `stride` tokens, and every `stride`-th before (Child et al. 2019, Sparse Transformers, section 4.3).

    Example:
        >>> Strided(length=4, stride=2).mask().int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]
    """

    sequence_length: int
    stride: int

    def __init__(self, length: int, stride: int) -> None:
        _check_positive(length=length, stride=stride)
        object.__setattr__(self, "sequence_length", length)
        object.__setattr__(self, "stride", stride)
        self._write_spec()

    @property
    def length(self) -> int:
        return self.sequence_length

    def pairs(self, length: int) -> Iterator[tuple[IntArray, IntArray]]:
        position = np.arange(length, dtype=np.int32)
        for distance in (*range(min(self.stride, length)), *range(self.stride, length, self.stride)):
            yield position[distance:], position[: length - distance]

    @classmethod
    def _from_spec(cls, spec: str, arguments: dict[str, Any]) -> Pattern:
        return cls(arguments["sequence_length"], arguments["stride"])


@dataclass(frozen=True)
class Fixed(Pattern):
    """The same block of `stride` tokens, and the last `summary` tokens of each block before
    (Child et al. 2019, Sparse Transformers, section 4.3).

    Example:
        >>> Fixed(length=4, stride=2, summary=1).mask().int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    """

    sequence_length: int
    stride: int
    summary: int

    def __init__(self, length: int, stride: int, summary: int) -> None:
        _check_positive(length=length, stride=stride, summary=summary)
        if summary > stride:
            raise ValueError(f"summary: got {summary}, wanted at most the stride, {stride}")
        object.__setattr__(self, "sequence_length", length)
        object.__setattr__(self, "stride", stride)
        object.__setattr__(self, "summary", summary)
        self._write_spec()

    @property
    def length(self) -> int:
        return self.sequence_length

    def pairs(self, length: int) -> Iterator[tuple[IntArray, IntArray]]:
        position = np.arange(length, dtype=np.int32)
        for distance in range(min(self.stride, length)):
            query = position[distance:]
            query = query[query % self.stride >= distance]
            yield query, query - distance
        for block in range(self.stride, length, self.stride):
            query = position[block:]
            for key in range(block - self.summary, block):
                yield query, np.full_like(query, key)

    @classmethod
    def _from_spec(cls, spec: str, arguments: dict[str, Any]) -> Pattern:
        return cls(arguments["sequence_length"], arguments["stride"], arguments["summary"])


class MaskPattern(Pattern):
    """Any boolean matrix: `mask` [S, S], True where query i sees key j. Compared and hashed by its content.

    Raises:
        ValueError: if `mask` is not a square boolean matrix.

    Example:
        >>> MaskPattern(torch.ones(3, 3, dtype=torch.bool).tril()).visible_pairs
        6
    """

    _living: ClassVar[WeakValueDictionary[str, MaskPattern]] = WeakValueDictionary()

    def __init__(self, mask: torch.Tensor | np.ndarray) -> None:
        if isinstance(mask, torch.Tensor):
            mask = mask.detach().cpu().numpy()
        dense = np.array(mask, order="C")
        if dense.dtype != np.bool_ or dense.ndim != 2 or dense.shape[0] != dense.shape[1] or not dense.size:
            raise ValueError(f"mask: got {dense.dtype} of shape {dense.shape}, wanted bool of shape (S, S)")
        dense.setflags(write=False)
        self._dense = dense
        # The mask itself, in a few kilobytes where it has some structure: an exported graph finds it anywhere.
        bits = base64.b64encode(zlib.compress(np.packbits(dense).tobytes())).decode()
        self.spec = json.dumps({"pattern": "MaskPattern", "length": len(dense), "bits": bits})
        self._living.setdefault(self.spec, self)

    def __reduce__(self) -> tuple[Any, ...]:
        return MaskPattern, (self._dense,)  # so that a copy in another process is found by its spec too

    @property
    def length(self) -> int:
        return len(self._dense)

    def pairs(self, length: int) -> Iterator[tuple[IntArray, IntArray]]:
        query, key = np.nonzero(self._dense[:length, :length])
        yield from by_turn(query, key, length)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MaskPattern) and self.spec == other.spec

    def __hash__(self) -> int:
        return hash(self.spec)

    def __repr__(self) -> str:
        return f"MaskPattern(<{self.length} x {self.length}>)"

    @classmethod
    def _from_spec(cls, spec: str, arguments: dict[str, Any]) -> Pattern:
        if (living := cls._living.get(spec)) is not None:
            return living
        length = arguments["length"]
        bits = np.frombuffer(zlib.decompress(base64.b64decode(arguments["bits"])), np.uint8)
        return cls(np.unpackbits(bits, count=length * length).view(np.bool_).reshape(length, length))


@lru_cache(maxsize=64)
def dalle_pattern_schedule(layers: int, layout: TokenLayout, kernel_size: int = 11) -> tuple[_GridPattern, ...]:
    """The paper's patterns, one a layer: row, with column at every fourth from the second, the last a convolution.

    Source: Ramesh et al. 2021, appendix B.1: layer i, counted from 1, is column where (i - 2) % 4 == 0.

    Example:
        >>> [type(pattern).__name__ for pattern in dalle_pattern_schedule(4, TokenLayout())]
        ['Row', 'Column', 'Row', 'Convolution']
    """
    _check_positive(layers=layers)
    kinds = (Row(layout), Column(layout), Convolution(layout, kernel_size))
    return tuple(kinds[dalle_pattern_kind(layer, layers)] for layer in range(layers))


def dalle_pattern_kind(layer: int, layers: int) -> int:
    """Which pattern `dalle_pattern_schedule` gives layer 0, 1, ... of `layers`: 0 row, 1 column, 2 convolution."""
    if layer == layers - 1:
        return 2
    return 1 if layer % 4 == 1 else 0
