"""What the lookup from features asks of its backends; see backends/contract.py."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch

from dalle_kernels.backends.contract import Call, Differentiable
from dalle_kernels.codebook.gumbel.contract import Grads, Outputs

__all__ = ["Backend", "Grads", "Inputs", "Kept", "Needs", "Outputs", "call_of"]


class Inputs(NamedTuple):
    features: torch.Tensor  # [N, C], rows contiguous
    weight: torch.Tensor  # [K, C], contiguous
    bias: torch.Tensor | None  # [K]
    codebook: torch.Tensor  # [K, D], contiguous
    temperature: torch.Tensor  # 0-dim float32
    hard: bool
    noise: bool
    seed: torch.Tensor  # 0-dim int64


class Kept(NamedTuple):
    features: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    codebook: torch.Tensor
    temperature: torch.Tensor
    hard: bool
    noise: bool
    seed: torch.Tensor
    latents: torch.Tensor
    indices: torch.Tensor
    kl: torch.Tensor
    maximum: torch.Tensor
    log_noisy: torch.Tensor
    log_clean: torch.Tensor
    mixture: torch.Tensor


class Needs(NamedTuple):
    features: bool
    weight: bool
    bias: bool
    codebook: bool


Backend: TypeAlias = Differentiable[Inputs, Outputs, Grads, Kept, Needs]


def call_of(values: Inputs | Kept) -> Call:
    return Call(values.features.device, values.features.dtype, values.codebook.shape[1])
