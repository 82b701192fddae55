"""What else computes the same: one adapter per competitor, each at its best setting.

An adapter's `make` prepares everything that a user would prepare once (masks, compiled functions, modules) and returns
a plain function of the input. It raises `UnavailableError`, with the reason, where the competitor cannot run. Adapters
that need a GPU are written against the documented interface of their project and marked "GPU:"; no machine that this
was written on could run them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from benchmarks.harness import UnavailableError
from dalle_kernels import Pattern, TokenLayout

# Adapters compile one function body for many masks: each is a graph of its own, not a recompilation to warn of.
torch._dynamo.config.recompile_limit = 64
torch._dynamo.config.accumulated_recompile_limit = 1024


def imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"{name} cannot be imported: {str(error).splitlines()[0]}") from error


def needs_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise UnavailableError("it needs a CUDA device")


@dataclass(frozen=True)
class Problem:
    """One attention: a pattern, and tensors [batch, heads, pattern.length, width] of a dtype on a device."""

    pattern: Pattern
    batch: int
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device
    backward: bool = False

    @property
    def layout(self) -> TokenLayout:
        """The text and grid of the pattern; UnavailableError for a pattern over a plain sequence."""
        layout = self.pattern.layout_or_none
        if layout is None:
            raise UnavailableError("it is written for text and an image grid")
        return layout


@dataclass
class Made:
    """A prepared competitor: a function of its input, and figures for the row."""

    function: Callable[..., Any]
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Lookup:
    """A competitor of a codebook operation: a function of the operation's tensors."""

    name: str
    make: Callable[[], Made]
