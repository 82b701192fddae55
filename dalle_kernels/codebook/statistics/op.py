"""The door to the statistics of codes: checks, schemas, shapes and choice of backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dalle_kernels.backends.choice import Operation, register
from dalle_kernels.backends.contract import Call
from dalle_kernels.backends.library import Entry
from dalle_kernels.checks import check_tensor, rows_contiguous
from dalle_kernels.codebook.statistics.contract import AXES, Backend, Inputs, Outputs, call_of

if TYPE_CHECKING:
    from dalle_kernels.codebook.statistics import cpu, reference, triton

    _BACKENDS: tuple[Backend, ...] = (cpu, triton, reference)


class CodeStatistics(NamedTuple):
    """What chose each code; float32 (float64 for float64 features).

    Attributes:
        counts: [K] or [H, K], how many rows.
        sums: [K, D] or [H, K, D], the sum of those rows.
    """

    counts: torch.Tensor
    sums: torch.Tensor


def _describe(features: torch.Tensor, *_: Any, **__: Any) -> Call:
    check_tensor("features", features)
    return Call(features.device, features.dtype, features.shape[-1])


OPERATION: Operation[Backend] = Operation(
    "code_statistics",
    {
        "triton": "dalle_kernels.codebook.statistics.triton",
        "cpu": "dalle_kernels.codebook.statistics.cpu",
        "reference": "dalle_kernels.codebook.statistics.reference",
    },
    _describe,
)


def code_statistics(
    features: torch.Tensor,
    indices: torch.Tensor,
    codes: int,
    heads: bool = False,
    all_reduce: Callable[[torch.Tensor], object] | None = None,
    backend: str = "auto",
) -> CodeStatistics:
    """How many rows chose each code, and their sums: what EMA codebooks, k-means and the revival of dead codes need.

    Sums are taken in float32 in the order of the rows: on the CPU, and by the Triton kernels, the same bits every time
    and for any number of threads. Nothing is differentiable.

    Source: van den Oord et al. 2017 (VQ-VAE), appendix A.1.

    Args:
        features: [..., D], float16, bfloat16, float32 or float64.
        indices: int64 [...], 0 to codes - 1, or -1 where a row does not count: what `vq_lookup` gives.
        codes: K.
        heads: whether the first dimension is one of heads, each with statistics of its own.
        all_reduce: called on the counts and on the sums, which it changes in place: `torch.distributed.all_reduce`
            makes them those of all processes.
        backend: "auto", "reference", "cpu" or "triton"; see `explain`.

    Raises:
        TypeError, ValueError: for wrong shapes, dtypes or devices.
        IndexError: on the CPU, for an index out of range.

    Example:
        >>> counts, sums = code_statistics(torch.ones(4, 2), torch.tensor([1, 0, 1, -1]), codes=3)
        >>> counts.tolist(), sums.tolist()
        ([1.0, 2.0, 0.0], [[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]])
    """
    check_tensor("features", features)
    if not isinstance(indices, torch.Tensor):
        raise TypeError(f"indices: got {type(indices).__name__}, wanted a torch.Tensor")
    if indices.dtype != torch.int64:
        raise TypeError(f"indices: got {indices.dtype}, wanted torch.int64")
    if features.dim() < 1 + heads or indices.shape != features.shape[:-1]:
        shapes = f"{tuple(features.shape)}, {tuple(indices.shape)}"
        raise ValueError(f"features, indices: got shapes {shapes}, wanted [..., D] and [...]")
    if indices.device != features.device:
        raise ValueError(f"indices: got a tensor on {indices.device}, wanted {features.device} where features are")
    if codes < 1:
        raise ValueError(f"codes: got {codes}, wanted at least 1")
    first = features.shape[0] if heads else 1
    inputs = Inputs(
        rows_contiguous(features.detach()).reshape(first, indices.numel() // max(first, 1), features.shape[-1]),
        indices.reshape(first, -1 if first else 0).contiguous(),
        codes,
    )
    found = _ENTRY(inputs, backend)
    counts, sums = found if heads else (found.counts[0], found.sums[0])
    if all_reduce is not None:
        all_reduce(counts)
        all_reduce(sums)
    return CodeStatistics(counts, sums)


register(code_statistics, OPERATION)


def _forward(backend: Backend, inputs: Inputs) -> Outputs:
    indices = inputs.indices
    if indices.device.type == "cpu" and indices.numel() and not -1 <= indices.min() <= indices.max() < inputs.codes:
        worst = int(indices.min() if indices.min() < -1 else indices.max())
        raise IndexError(f"indices: got {worst}, wanted 0 to {inputs.codes - 1}, or -1")
    return backend.forward(inputs)


def _forward_fake(inputs: Inputs, _: str) -> Outputs:
    features = inputs.features
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    heads, width = features.shape[0], features.shape[2]
    return Outputs(
        features.new_empty(heads, inputs.codes, dtype=wide), features.new_empty(heads, inputs.codes, width, dtype=wide)
    )


_ENTRY = Entry("code_statistics", OPERATION, Inputs, Outputs, call_of, _forward, _forward_fake, AXES)
