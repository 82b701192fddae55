"""What sampling asks of its backends; see backends/contract.py."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch

from dalle_kernels.backends import contract
from dalle_kernels.backends.contract import Call
from dalle_kernels.backends.sharding import Axis


class Inputs(NamedTuple):
    logits: torch.Tensor  # [B, V], rows contiguous
    unconditional: torch.Tensor | None  # likewise
    guidance_scale: float
    temperature: float  # 0 takes the largest logit
    top_k: int  # 0 is off
    top_p: float  # 1 is off
    seed: int | torch.Tensor  # 0-dim int64
    row_offset: int | torch.Tensor  # the row of the noise that row 0 takes; 0-dim int64


class Outputs(NamedTuple):
    tokens: torch.Tensor  # int64 [B]


AXES = (Axis({"logits": 0, "unconditional": 0}, {"tokens": 0}, draws=True),)

Backend: TypeAlias = contract.Backend[Inputs, Outputs]


def call_of(values: Inputs) -> Call:
    return Call(values.logits.device, values.logits.dtype, values.logits.shape[1])
