"""The nearest-row lookup in native code: csrc/codebook."""

from __future__ import annotations

import torch

from dalle_kernels.backends import native
from dalle_kernels.backends.contract import Call
from dalle_kernels.codebook.vq.contract import Grads, Inputs, Kept, Needs, Outputs

_ops = torch.ops.dalle_kernels_cpu


def refuse(call: Call) -> str | None:
    return native.refuse_cpu(call.device, call.dtype)


def describe() -> str:
    return native.instruction_set()


def forward(inputs: Inputs) -> Outputs:
    indices, squared_distance = _ops.vq_forward(*inputs)
    return Outputs(squared_distance, indices)


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    """The same bits for any number of threads."""
    return _ops.vq_backward(*grads, *kept, *needs)
