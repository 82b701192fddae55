"""The logit-Laplace likelihood in Triton: every tensor is read once and written once.

nll = log 2 + log b + log x + log(1 - x) + abs(logit x - mu) / b
dmu = -sign(logit x - mu) / b        dlog_b = 1 - abs(logit x - mu) / b
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dalle_kernels.backends.contract import Call
from dalle_kernels.backends.triton_common import ceil_div, obstacle
from dalle_kernels.likelihood.contract import Grads, Inputs, Kept, Needs, Outputs

LN_2 = tl.constexpr(0.6931471805599453)
BLOCK = 1024


@triton.jit
def forward_kernel(pixels, mu, log_b, out, total, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = place < total
    x = tl.load(pixels + place, mask=kept, other=0.5).to(tl.float32)
    location = tl.load(mu + place, mask=kept, other=0.0).to(tl.float32)
    log_scale = tl.load(log_b + place, mask=kept, other=0.0).to(tl.float32)
    log_x, log_y = tl.log(x), tl.log(1.0 - x)
    distance = tl.abs(log_x - log_y - location)
    tl.store(out + place, log_scale + log_x + log_y + distance * tl.exp(-log_scale) + LN_2, mask=kept)


@triton.jit
def backward_kernel(grad, pixels, mu, log_b, dmu, dlog_b, total, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = place < total
    x = tl.load(pixels + place, mask=kept, other=0.5).to(tl.float32)
    location = tl.load(mu + place, mask=kept, other=0.0).to(tl.float32)
    log_scale = tl.load(log_b + place, mask=kept, other=0.0).to(tl.float32)
    g = tl.load(grad + place, mask=kept, other=0.0)
    difference = tl.log(x) - tl.log(1.0 - x) - location
    rate = tl.exp(-log_scale)
    if dmu is not None:
        sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
        tl.store(dmu + place, (-g * sign * rate).to(dmu.dtype.element_ty), mask=kept)
    if dlog_b is not None:
        tl.store(dlog_b + place, (g * (1.0 - tl.abs(difference) * rate)).to(dlog_b.dtype.element_ty), mask=kept)


def refuse(call: Call) -> str | None:
    return obstacle(call.device, call.dtype)


def forward(inputs: Inputs) -> Outputs:
    x, location, log_scale = (tensor.contiguous() for tensor in inputs)
    nll = torch.empty_like(x, dtype=torch.float32)
    if total := nll.numel():
        forward_kernel[(ceil_div(total, BLOCK),)](
            x, location, log_scale, nll, total, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return Outputs(_laid_out_as(inputs.pixels, nll))


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    grad, pixels, mu, log_b = *grads, *kept
    assert grad is not None
    inputs = [tensor.contiguous() for tensor in (grad, pixels, mu, log_b)]
    dmu = torch.empty_like(inputs[2]) if needs.mu else None
    dlog_b = torch.empty_like(inputs[3]) if needs.log_b else None
    if total := grad.numel():
        backward_kernel[(ceil_div(total, BLOCK),)](
            *inputs, dmu, dlog_b, total, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return (
        None if dmu is None else _laid_out_as(mu, dmu),
        None if dlog_b is None else _laid_out_as(log_b, dlog_b),
    )


def _laid_out_as(original: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """`made`, contiguous, with the strides that the door promises: those of `empty_like(original)`."""
    if torch.empty_like(original, device="meta").is_contiguous():
        return made
    return torch.empty_like(original, dtype=made.dtype).copy_(made)
