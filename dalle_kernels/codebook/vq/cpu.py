"""The nearest-row lookup in native code: csrc/codebook."""

from __future__ import annotations

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
    metric = _METRICS.index(inputs.metric)
    return Outputs(
        *_ops.vq_forward(inputs.features, inputs.codebook, metric, inputs.k, inputs.temperature, inputs.seed)
    )


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    """The same bits for any number of threads."""
    return _ops.vq_backward(*grads, *kept, *needs)
