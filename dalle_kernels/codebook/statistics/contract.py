"""What the statistics of codes ask of their backends; see backends/contract.py."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch

from dalle_kernels.backends import contract
from dalle_kernels.backends.contract import Call
from dalle_kernels.backends.sharding import Axis


class Inputs(NamedTuple):
    features: torch.Tensor  # [H, N, D], rows contiguous
    indices: torch.Tensor  # int64 [H, N], contiguous; -1 where a row does not count
    codes: int


class Outputs(NamedTuple):
    counts: torch.Tensor  # float32 [H, K] (float64 for float64 features)
    sums: torch.Tensor  # likewise [H, K, D]


AXES = (
    Axis({"features": 1, "indices": 1}, {}),
    Axis({"features": 0, "indices": 0}, {"counts": 0, "sums": 0}),
)

Backend: TypeAlias = contract.Backend[Inputs, Outputs]


def call_of(values: Inputs) -> Call:
    return Call(values.features.device, values.features.dtype, values.features.shape[-1])
