"""What the Gumbel-softmax lookup asks of its backends; see backends/contract.py."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch

from dalle_kernels.backends.contract import Call, Differentiable
from dalle_kernels.backends.sharding import Axis


class Inputs(NamedTuple):
    logits: torch.Tensor  # [N, K], rows contiguous
    codebook: torch.Tensor  # [K, D], contiguous
    temperature: float | torch.Tensor  # 0-dim, on a GPU float32
    hard: bool
    noise: bool
    seed: int | torch.Tensor  # 0-dim int64
    row_offset: int | torch.Tensor  # the row of the noise that row 0 takes; 0-dim int64
    counter_offset: int = 0  # which code of its quarter each quarter's first is, in a larger codebook


class Outputs(NamedTuple):
    latents: torch.Tensor  # [N, D], the dtype of logits
    indices: torch.Tensor  # int64 [N]
    kl: torch.Tensor  # [N], float32 as what follows (float64 for float64 logits)
    # Kept apart, because logits may be so large that the logarithms are lost beside them.
    maximum: torch.Tensor  # [N], m: the largest of logits + g (of g and a constant, where a backend likes)
    log_noisy: torch.Tensor  # [N], log sum exp((logits + g - m) / temperature)
    log_clean: torch.Tensor  # [N], log sum exp(logits - m)
    mixture: torch.Tensor  # [N, D] the soft mixture where `hard`, else [0]


class Kept(NamedTuple):
    """Of a part of a codebook, what was made of the whole one, but for `kl`, whose log K is the part's, and `indices`,
    which count within it, -1 where the sampled code is elsewhere."""

    logits: torch.Tensor
    codebook: torch.Tensor
    temperature: float | torch.Tensor
    hard: bool
    noise: bool
    seed: int | torch.Tensor
    row_offset: int | torch.Tensor
    latents: torch.Tensor
    indices: torch.Tensor
    kl: torch.Tensor
    maximum: torch.Tensor
    log_noisy: torch.Tensor
    log_clean: torch.Tensor
    mixture: torch.Tensor
    counter_offset: int = 0


class Grads(NamedTuple):
    latents: torch.Tensor | None  # contiguous
    kl: torch.Tensor | None  # contiguous


class Needs(NamedTuple):
    logits: bool
    codebook: bool


AXES = (Axis({"logits": 0}, {"latents": 0, "indices": 0, "kl": 0}, draws=True),)
OFFSET = "offset of counters"  # what not every backend has
CODES = Axis({"logits": 1, "codebook": 0}, {})

Backend: TypeAlias = Differentiable[Inputs, Outputs, Grads, Kept, Needs]


def call_of(values: Inputs | Kept) -> Call:
    extras = (OFFSET,) if values.counter_offset else ()
    return Call(values.logits.device, values.logits.dtype, values.codebook.shape[1], extras)
