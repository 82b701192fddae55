"""Neighbourhood attention: every cell of a line, a grid or a volume sees the window of cells around it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dalle_kernels.patterns.layout import TokenLayout
from dalle_kernels.patterns.patterns import Grid, IntArray, Pattern


@dataclass(frozen=True, repr=False)
class Neighborhood(Pattern):
    """The `window` nearest cells along each axis; at a border the window shifts inward and keeps its size, as NATTEN's.

    Sources: Hassani et al. 2023 (neighbourhood attention), Hassani and Shi 2022 (dilation), Hassani et al. 2025
    (generalised: stride). With `stride` s, cells share the window of their group of s: that of its middle cell (the
    right one of an even group). With `dilation` d, a cell sees only cells whose index is its own modulo d. Along a
    causal axis the window ends at the cell itself, and starts where that of its group's last cell does.

    Args:
        shape: cells along one to three axes, the first the slowest; or a `TokenLayout`: then its text stands in front
            (text sees text causally, every cell sees all text), and its grid is the shape.
        window: cells that a query sees along each axis, 1 <= window, window x dilation <= shape.
        stride: 1 <= stride <= window.
        dilation: at least 1.
        causal: whether keys along this axis must not come later. Each of these is one value or one an axis.

    Raises:
        TypeError, ValueError: for values outside of these bounds, or a number of them that does not suit the shape.

    Example:
        >>> Neighborhood((5,), window=3).mask().int().tolist()
        [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
        >>> Neighborhood((64, 64), window=13).visible_pairs
        692224
    """

    shape: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    text_length: int

    def __init__(
        self,
        shape: Sequence[int] | TokenLayout,
        window: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
    ) -> None:
        text_length, cells = (shape.text_length, shape.grid) if isinstance(shape, TokenLayout) else (0, shape)
        if not hasattr(cells, "__len__") or not 1 <= len(cells) <= 3:
            raise ValueError(f"shape: got {shape!r}, wanted the lengths of one to three axes, or a TokenLayout")
        cells = _whole("shape", cells, len(cells))
        windows, strides, dilations = (
            _whole(name, value, len(cells))
            for name, value in (("window", window), ("stride", stride), ("dilation", dilation))
        )
        causals = tuple(causal) if isinstance(causal, Sequence) else (causal,) * len(cells)
        if len(causals) != len(cells) or not all(isinstance(flag, (bool, np.bool_)) for flag in causals):
            raise ValueError(f"causal: got {causal!r}, wanted a bool, or one for each of {len(cells)} axes")
        for axis, (length, wide, step, spread) in enumerate(zip(cells, windows, strides, dilations, strict=True)):
            if wide * spread > length:
                raise ValueError(
                    f"window: got {wide} x dilation {spread} along axis {axis}, wanted at most its {length} cells"
                )
            if step > wide:
                raise ValueError(f"stride: got {step} along axis {axis}, wanted at most the window, {wide}")
        for name, value in (
            ("shape", cells),
            ("window", windows),
            ("stride", strides),
            ("dilation", dilations),
            ("causal", tuple(map(bool, causals))),
            ("text_length", text_length),
        ):
            object.__setattr__(self, name, value)
        self._write_spec()

    def __repr__(self) -> str:
        shape = self.layout_or_none if self.text_length else self.shape
        said = [f"{shape}, window={_short(self.window)}"]
        for name, usual in (("stride", 1), ("dilation", 1), ("causal", False)):
            values = getattr(self, name)
            if any(value != usual for value in values):
                said.append(f"{name}={_short(values)}")
        return f"Neighborhood({', '.join(said)})"

    @classmethod
    def _from_spec(cls, spec: str, arguments: dict[str, Any]) -> Pattern:
        shape, text_length = arguments.pop("shape"), arguments.pop("text_length")
        return cls(TokenLayout(text_length, tuple(shape)) if text_length else shape, **arguments)

    @property
    def length(self) -> int:
        return self.text_length + math.prod(self.shape)

    @property
    def layout_or_none(self) -> TokenLayout | None:
        return TokenLayout(self.text_length, (self.shape[0], self.shape[1])) if len(self.shape) == 2 else None

    @property
    def grid_or_none(self) -> Grid:
        return Grid(self.text_length, self.shape, self.dilation)

    def leading(self, length: int) -> IntArray:
        return np.minimum(np.arange(1, length + 1, dtype=np.int32), np.int32(self.text_length))

    def _keys(self, axis: int) -> IntArray:
        """int32 [cells, window]: the keys that each cell sees along `axis`; -1 for none."""
        length, window = self.shape[axis], self.window[axis]
        stride, dilation = self.stride[axis], self.dilation[axis]
        cell = np.arange(length, dtype=np.int32)
        group, place = cell % dilation, cell // dilation
        last = (length - group + dilation - 1) // dilation - 1  # of the cell's own group
        turn = np.arange(window, dtype=np.int32)
        if self.causal[axis]:
            leader = np.minimum(place // stride * stride + stride - 1, last)
            seen = np.maximum(leader - window + 1, 0)[:, None] + turn
            return np.where(seen <= place[:, None], seen * dilation + group[:, None], np.int32(-1))
        leader = np.minimum(place // stride * stride + stride // 2, last)
        left = window // 2
        start = np.clip(leader, left, last - (window - 1 - left)) - left
        return (start[:, None] + turn) * dilation + group[:, None]

    def pairs(self, length: int) -> Iterator[tuple[IntArray, IntArray]]:
        number = max(length - self.text_length, 0)
        if not number:
            return
        cells = np.unravel_index(np.arange(number), self.shape)
        keys = [self._keys(axis)[cell] for axis, cell in enumerate(cells)]  # [cells, window] along each axis
        query = np.arange(number, dtype=np.int32)
        for turns in itertools.product(*(range(window) for window in self.window)):
            key, visible = np.zeros(number, np.int32), np.ones(number, np.bool_)
            for axis, turn in enumerate(turns):
                seen = keys[axis][:, turn]
                visible &= seen >= 0
                key = key * np.int32(self.shape[axis]) + seen
            visible &= key < number  # of a prefix
            if visible.any():
                yield query[visible] + np.int32(self.text_length), key[visible] + np.int32(self.text_length)


def _short(values: tuple[object, ...]) -> object:
    """The one value that all axes share, or all of them."""
    return values[0] if len(set(values)) == 1 else values


def _whole(name: str, value: object, axes: int) -> tuple[int, ...]:
    """`value` as a positive int for each axis."""
    values: tuple[Any, ...] = tuple(value) if isinstance(value, Sequence) else (value,) * axes
    if len(values) != axes or not all(isinstance(each, (int, np.integer)) and each >= 1 for each in values):
        raise ValueError(f"{name}: got {value!r}, wanted an int >= 1, or one for each of {axes} axes")
    return tuple(int(each) for each in values)
