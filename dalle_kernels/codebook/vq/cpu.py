"""The nearest-row lookup in native code: csrc/codebook."""

from __future__ import annotations

from typing import Any

import torch

from dalle_kernels.backends import native
from dalle_kernels.backends.contract import Call
from dalle_kernels.codebook.vq.contract import METRICS, Grads, Inputs, Kept, Needs, Outputs

_ops = torch.ops.dalle_kernels_cpu
_METRICS: tuple[str, ...] = METRICS  # csrc/codebook/kernels.h counts them in this order


def refuse(call: Call) -> str | None:
    return native.refuse_cpu(call.device, call.dtype)


def describe() -> str:
    return native.instruction_set()


def forward(inputs: Inputs) -> Outputs:
    features, codebook, _, metric, k, temperature, seed, row_offset = inputs
    noise: tuple[Any, ...] = None, 0, 0
    if temperature is not None and seed is not None and row_offset is not None:
        noise = float(temperature), int(seed), int(row_offset)
    return Outputs(*_ops.vq_forward(features, codebook, _METRICS.index(metric), k, *noise))


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    """The same bits for any number of threads."""
    return _ops.vq_backward(*grads, *kept, *needs)
