"""What the nearest-row lookup asks of its backends; see backends/contract.py."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch

from dalle_kernels.backends.contract import Call, Differentiable
from dalle_kernels.backends.sharding import Axis, Choice

Metric: TypeAlias = Literal["euclidean", "distance", "dot", "cosine"]
METRICS: tuple[Metric, ...] = ("euclidean", "distance", "dot", "cosine")
MOST = 8  # nearest rows at once


class Inputs(NamedTuple):
    features: torch.Tensor  # [H, N, D], rows contiguous
    codebook: torch.Tensor  # [H, K, D], contiguous
    codes: int  # K, which the backward wants without the codebook
    metric: str
    k: int  # how many rows
    temperature: float | torch.Tensor | None  # 0-dim, on a GPU float32; None: the nearest rows, and no seed
    seed: int | torch.Tensor | None  # 0-dim int64
    row_offset: int | torch.Tensor | None  # the row of the noise that row 0 of each head takes; 0-dim int64


class Outputs(NamedTuple):
    nearest: torch.Tensor  # [H, N, k, D], the chosen rows of the codebook
    squared_distance: torch.Tensor  # float32 [H, N, k] (float64 for float64 features)
    indices: torch.Tensor  # int64 [H, N, k], best first


class Kept(NamedTuple):
    """Not the codebook: an EMA step may change it in place before the backward."""

    features: torch.Tensor
    nearest: torch.Tensor
    indices: torch.Tensor
    codes: int


class Grads(NamedTuple):
    squared_distance: torch.Tensor | None  # contiguous; a backend is never given None


class Needs(NamedTuple):
    features: bool
    codebook: bool


AXES = (
    Axis({"features": 1}, dict.fromkeys(Outputs._fields, 1), draws=True),
    Axis({"features": 0, "codebook": 0}, dict.fromkeys(Outputs._fields, 0)),  # heads draw from streams of their own
)


def _nearest_alone(inputs: Inputs) -> bool:
    return inputs.metric in ("euclidean", "distance") and inputs.k == 1 and inputs.temperature is None


CODES = Choice(Axis({"codebook": 1}, {}), "squared_distance", "indices", "codes", _nearest_alone)

Backend: TypeAlias = Differentiable[Inputs, Outputs, Grads, Kept, Needs]


def call_of(values: Inputs | Kept) -> Call:
    features = values.features
    if isinstance(values, Inputs):
        return Call(features.device, features.dtype, features.shape[-1], extras(values.k, values.temperature))
    return Call(features.device, features.dtype, features.shape[-1], extras(values.indices.shape[-1], None))


def extras(k: int | None, temperature: object) -> tuple[str, ...]:
    """What not every backend has."""
    asked = {"several nearest rows": k is not None and k > 1, "a temperature": temperature is not None}
    return tuple(name for name, present in asked.items() if present)
