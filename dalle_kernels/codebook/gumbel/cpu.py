"""The Gumbel-softmax lookup in native code: csrc/codebook."""

from __future__ import annotations

import torch

from dalle_kernels.backends import native
from dalle_kernels.backends.contract import Call
from dalle_kernels.codebook.gumbel.contract import Grads, Inputs, Kept, Needs, Outputs

_ops = torch.ops.dalle_kernels_cpu


def refuse(call: Call) -> str | None:
    return native.refuse_cpu(call.device, call.dtype)


def describe() -> str:
    return native.instruction_set()


def forward(inputs: Inputs) -> Outputs:
    logits, codebook, temperature, hard, noise, seed, row_offset, counter_offset = inputs
    of_noise = float(temperature), hard, noise, int(seed), int(row_offset), counter_offset
    return Outputs(*_ops.gumbel_forward(logits, codebook, *of_noise))


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    """The same bits for any number of threads."""
    logits, codebook, temperature, hard, noise, seed, row_offset, *made = kept  # with the counter's offset
    of_noise = float(temperature), hard, noise, int(seed), int(row_offset)
    gradients = _ops.gumbel_backward(*grads, logits, codebook, *of_noise, *made, *needs)
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
