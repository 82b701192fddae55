"""The lookup from features in native code: csrc/codebook/projection.h."""

from __future__ import annotations

from typing import Any

import torch

from dalle_kernels.backends import native
from dalle_kernels.backends.contract import Call
from dalle_kernels.codebook.projection.contract import Grads, Inputs, Kept, Needs, Outputs

_ops = torch.ops.dalle_kernels_cpu


def refuse(call: Call) -> str | None:
    return native.refuse_cpu(call.device, call.dtype)


def describe() -> str:
    return native.instruction_set()


def _numbers(values: Inputs | Kept) -> tuple[Any, ...]:
    """What both operations begin with, its numbers no tensors."""
    features, weight, bias, codebook, temperature, hard, noise, seed, row_offset = values[:9]
    of_noise = int(seed), int(row_offset), values.counter_offset
    return features, weight, bias, codebook, float(temperature), hard, noise, *of_noise


def forward(inputs: Inputs) -> Outputs:
    *of_rows, distribution = _ops.projection_forward(*_numbers(inputs), inputs.with_distribution)
    return Outputs._make((*of_rows, distribution.new_empty(0), distribution))


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    """The same bits for any number of threads."""
    asked = needs._replace(bias=needs.bias and kept.bias is not None)
    delta = None
    if kept.mixture.numel() and grads.latents is not None:
        delta = (grads.latents.float() * kept.mixture).sum(-1)
    made = (kept.indices, kept.kl, kept.maximum, kept.log_noisy, kept.log_clean, delta)
    gradients = _ops.projection_backward(*grads, *_numbers(kept), *made, kept.tied, *asked)
    return tuple(gradient if need else None for gradient, need in zip(gradients, asked, strict=True))
