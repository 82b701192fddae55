"""The logit-Laplace likelihood in native code: csrc/likelihood. Any layout, every array read once and written once."""

from __future__ import annotations

import torch

from dalle_kernels.backends import native
from dalle_kernels.backends.contract import Call
from dalle_kernels.likelihood.contract import Grads, Inputs, Kept, Needs, Outputs


def refuse(call: Call) -> str | None:
    return native.refuse_cpu(call.device, call.dtype)


def describe() -> str:
    return native.instruction_set()


def forward(inputs: Inputs) -> Outputs:
    return Outputs(torch.ops.dalle_kernels_cpu.logit_laplace_forward(*inputs))


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    return torch.ops.dalle_kernels_cpu.logit_laplace_backward(*grads, *kept, *needs)
