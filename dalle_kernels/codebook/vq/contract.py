"""What the nearest-row lookup asks of its backends; see backends/contract.py."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch

from dalle_kernels.backends.contract import Call, Differentiable


class Inputs(NamedTuple):
    features: torch.Tensor  # [N, D], rows contiguous
    codebook: torch.Tensor  # [K, D], contiguous


class Outputs(NamedTuple):
    squared_distance: torch.Tensor  # float32 [N] (float64 for float64 features)
    indices: torch.Tensor  # int64 [N]


class Kept(NamedTuple):
    features: torch.Tensor
    codebook: torch.Tensor
    indices: torch.Tensor


class Grads(NamedTuple):
    squared_distance: torch.Tensor | None  # contiguous; a backend is never given None


class Needs(NamedTuple):
    features: bool
    codebook: bool


Backend: TypeAlias = Differentiable[Inputs, Outputs, Grads, Kept, Needs]


def call_of(values: Inputs | Kept) -> Call:
    return Call(values.features.device, values.features.dtype, values.codebook.shape[1])
