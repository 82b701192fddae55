"""What the lookup from features asks of its backends; see backends/contract.py."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch

from dalle_kernels.backends.contract import Call, Differentiable
from dalle_kernels.backends.sharding import Axis
from dalle_kernels.codebook.gumbel.contract import OFFSET

__all__ = ["Backend", "Grads", "Inputs", "Kept", "Needs", "Outputs", "call_of"]


class Inputs(NamedTuple):
    features: torch.Tensor  # [N, C], rows contiguous
    weight: torch.Tensor  # [K, C], contiguous
    bias: torch.Tensor | None  # [K]
    codebook: torch.Tensor  # [K, D], contiguous
    temperature: float | torch.Tensor  # 0-dim, on a GPU float32
    hard: bool
    noise: bool
    seed: int | torch.Tensor  # 0-dim int64
    row_offset: int | torch.Tensor  # the row of the noise that row 0 takes; 0-dim int64
    with_distribution: bool
    tied: bool  # codebook is weight, detached: the gradient of weight is that of both
    counter_offset: int = 0  # which code of its quarter each quarter's first is, in a larger codebook


class Outputs(NamedTuple):
    """As of the Gumbel lookup, but for the last two."""

    latents: torch.Tensor  # [N, D], the dtype of features
    indices: torch.Tensor  # int64 [N]
    kl: torch.Tensor  # [N], float32 as what follows (float64 for float64 features)
    maximum: torch.Tensor  # [N]
    log_noisy: torch.Tensor  # [N]
    log_clean: torch.Tensor  # [N]
    mixture: torch.Tensor  # [N, D] the soft mixture where `keeps_mixture`, else [0]
    distribution: torch.Tensor  # [K] the mean over the rows of softmax(logits) where asked for, else [0]


class Kept(NamedTuple):
    """As of the Gumbel lookup; `mixture` is there too where it is not of these codes alone."""

    features: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    codebook: torch.Tensor
    temperature: float | torch.Tensor
    hard: bool
    noise: bool
    seed: int | torch.Tensor
    row_offset: int | torch.Tensor
    with_distribution: bool
    tied: bool
    latents: torch.Tensor
    indices: torch.Tensor
    kl: torch.Tensor
    maximum: torch.Tensor
    log_noisy: torch.Tensor
    log_clean: torch.Tensor
    mixture: torch.Tensor
    distribution: torch.Tensor
    counter_offset: int = 0


class Grads(NamedTuple):
    latents: torch.Tensor | None  # contiguous, as are the others
    kl: torch.Tensor | None
    distribution: torch.Tensor | None


class Needs(NamedTuple):
    features: bool
    weight: bool
    bias: bool
    codebook: bool


AXES = (
    Axis(
        {"features": 0},
        {"latents": 0, "indices": 0, "kl": 0},
        means=("distribution",),
        draws=True,
    ),
)
CODES = Axis({"weight": 0, "bias": 0, "codebook": 0}, {})

Backend: TypeAlias = Differentiable[Inputs, Outputs, Grads, Kept, Needs]


def call_of(values: Inputs | Kept) -> Call:
    extras = (OFFSET,) if values.counter_offset else ()
    return Call(values.features.device, values.features.dtype, values.codebook.shape[1], extras)


def keeps_mixture(hard: bool, backend: str, device: torch.device) -> bool:
    """Whether `Outputs.mixture` is there: Triton's backward reads it, others make it anew."""
    return hard and (device.type == "cuda" or backend == "triton")
