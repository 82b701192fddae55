"""What the command line asks for, as the benchmarks read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dalle_kernels import AxialRow, Causal, Column, Convolution, Pattern, Row, TokenLayout

PATTERNS = {
    "row": Row,
    "column": Column,
    "convolution": Convolution,
    "clamp": lambda layout: Convolution(layout, 11, "clamp"),
    "corner": lambda layout: Convolution(layout, 5, "corner"),
    "axial_row": AxialRow,
    "causal": Causal,
}


@dataclass(frozen=True)
class Choice:
    """Which cells to measure; an empty tuple leaves the benchmark its own."""

    device: torch.device
    quick: bool = False
    grids: tuple[int, ...] = ()
    texts: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    patterns: tuple[str, ...] = ()

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"


def pattern_of(name: str, text: int, grid: int) -> Pattern:
    """The pattern called `name` over `text` tokens and a square grid."""
    return PATTERNS[name](TokenLayout(text, (grid, grid)))
