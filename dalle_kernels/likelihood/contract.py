"""What the likelihood asks of its backends; see backends/contract.py."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch

from dalle_kernels.backends.contract import Call, Differentiable
from dalle_kernels.backends.sharding import Axis


class Inputs(NamedTuple):
    pixels: torch.Tensor  # any shape and layout
    mu: torch.Tensor  # the shape of pixels, any layout, as log_b
    log_b: torch.Tensor


class Outputs(NamedTuple):
    nll: torch.Tensor  # like pixels, float32 (float64 for float64 pixels)


class Kept(NamedTuple):
    pixels: torch.Tensor
    mu: torch.Tensor
    log_b: torch.Tensor


class Grads(NamedTuple):
    nll: torch.Tensor | None  # any layout; a backend is never given None


class Needs(NamedTuple):
    mu: bool
    log_b: bool


AXES = tuple(Axis({"pixels": at, "mu": at, "log_b": at}, {"nll": at}) for at in range(4))

Backend: TypeAlias = Differentiable[Inputs, Outputs, Grads, Kept, Needs]


def call_of(values: Inputs | Kept) -> Call:
    return Call(values.mu.device, values.mu.dtype, values.mu.shape[-1] if values.mu.dim() else 1)
