"""What the likelihood of tokens asks of its backends; see backends/contract.py."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch

from dalle_kernels.backends.contract import Call, Differentiable
from dalle_kernels.backends.sharding import Axis


class Inputs(NamedTuple):
    logits: torch.Tensor  # [N, V], rows contiguous
    tokens: torch.Tensor  # int64 [N]


class Outputs(NamedTuple):
    nll: torch.Tensor  # [N], float32 (float64 for float64 logits)
    lse: torch.Tensor  # like nll


class Kept(NamedTuple):
    logits: torch.Tensor
    tokens: torch.Tensor
    lse: torch.Tensor


class Grads(NamedTuple):
    nll: torch.Tensor | None  # any layout; a backend is never given None


class Needs(NamedTuple):
    logits: bool


AXES = (Axis({"logits": 0, "tokens": 0}, {"nll": 0}),)

Backend: TypeAlias = Differentiable[Inputs, Outputs, Grads, Kept, Needs]


def call_of(values: Inputs | Kept) -> Call:
    return Call(values.logits.device, values.logits.dtype, values.logits.shape[-1])
