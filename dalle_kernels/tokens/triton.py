"""The likelihood of tokens in Triton: logits are read once, forward; read and their gradient written once, backward.

A program owns a row of the forward pass and keeps the largest logit and the sum of exponentials beneath it, tile by
tile; a program of the backward pass owns a tile of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dalle_kernels.backends.contract import Call
from dalle_kernels.backends.triton_common import ceil_div, obstacle
from dalle_kernels.tokens.contract import Grads, Inputs, Kept, Needs, Outputs

BLOCK = 1024


@triton.jit
def token_forward_kernel(logits, tokens, nll, lse, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * V + column, mask=column < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, tl.max(x))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # where nothing is possible so far
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(x - base))
        largest = higher
    own_lse = largest + tl.log(total)
    chosen = tl.load(logits + row * V + tl.load(tokens + row)).to(tl.float32)
    tl.store(lse + row, own_lse)
    tl.store(nll + row, own_lse - chosen)


@triton.jit
def token_backward_kernel(grad, logits, tokens, lse, dlogits, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = column < V
    x = tl.load(logits + row * V + column, mask=kept, other=0.0).to(tl.float32)
    p = tl.exp(x - tl.load(lse + row))
    slope = p - tl.where(column == tl.load(tokens + row), 1.0, 0.0)
    made = tl.load(grad + row) * slope
    tl.store(dlogits + row * V + column, made.to(dlogits.dtype.element_ty), mask=kept)


def refuse(call: Call) -> str | None:
    return obstacle(call.device, call.dtype)


def forward(inputs: Inputs) -> Outputs:
    logits, tokens = (tensor.contiguous() for tensor in inputs)
    nll = logits.new_empty(len(logits), dtype=torch.float32)
    lse = torch.empty_like(nll)
    if len(logits):
        token_forward_kernel[(len(logits),)](logits, tokens, nll, lse, logits.shape[1], BLOCK=BLOCK, num_warps=4)
    return Outputs(nll, lse)


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    if not needs.logits:
        return (None,)
    assert grads.nll is not None
    logits, tokens, lse = (tensor.contiguous() for tensor in kept)
    dlogits = torch.empty_like(logits)
    if len(logits):
        grid = len(logits), ceil_div(logits.shape[1], BLOCK)
        token_backward_kernel[grid](
            grads.nll.contiguous(), logits, tokens, lse, dlogits, logits.shape[1], BLOCK=BLOCK, num_warps=4
        )
    return (dlogits,)
