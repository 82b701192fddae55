"""What else computes neighbourhood attention: FlexAttention, SDPA with the mask or dense, and gathered windows."""

from __future__ import annotations

import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.competitors.adapter import Made, Problem
from benchmarks.competitors.attention import Attention, sdpa_mask
from benchmarks.harness import UnavailableError
from dalle_kernels import Neighborhood, Pattern
from dalle_kernels.patterns.schedule import schedule_for


class Dense(Attention):
    """Every token sees every other: what a model without neighbourhoods does."""

    def answers(self, pattern: Pattern) -> Pattern:
        assert isinstance(pattern, Neighborhood)
        return Neighborhood(pattern.shape, pattern.shape)


def neighborhood_competitors() -> list[Attention]:
    """All of them, in the order in which they are printed."""
    return [
        Attention("FlexAttention", partial(_flex, permuted=False)),
        Attention("FlexAttention, blocks of cells", partial(_flex, permuted=True)),
        Attention("SDPA mask", partial(sdpa_mask, backend=None)),
        Dense("SDPA dense", _dense),
        Attention("einsum over gathered windows", _gathered),
    ]


def _dense(problem: Problem) -> Made:
    return Made(lambda q, k, v: F.scaled_dot_product_attention(q, k, v))


def _flex(problem: Problem, permuted: bool) -> Made:
    """Its rule as arithmetic on indices; `permuted`, with the tokens in blocks of cells, as NATTEN hands them over."""
    if problem.backward and problem.device.type == "cpu":
        raise UnavailableError("FlexAttention has no backward on the CPU")
    pattern, device = problem.pattern, problem.device
    assert isinstance(pattern, Neighborhood)
    order = schedule_for(pattern, (64, 64)).order.to(device).long() if permuted else None

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if order is not None:
            i, j = order[i], order[j]
        seen = None
        for length, window in zip(reversed(pattern.shape), reversed(pattern.window), strict=True):
            left = window // 2
            centre = (i % length).clamp(left, length - 1 - (window - 1 - left))
            here = (j % length >= centre - left) & (j % length < centre - left + window)
            seen = here if seen is None else seen & here
            i, j = i // length, j // length
        assert seen is not None
        return seen

    start = time.perf_counter()
    length = pattern.length
    blocks = create_block_mask(rule, None, None, length, length, device=device.type)
    notes = {"block_mask_ms": (time.perf_counter() - start) * 1e3, "block_sparsity_percent": float(blocks.sparsity())}
    inverse = None if order is None else order.argsort()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if order is None:
            return flex_attention(q, k, v, block_mask=blocks)
        q, k, v = (tensor[:, :, order] for tensor in (q, k, v))
        return flex_attention(q, k, v, block_mask=blocks)[:, :, inverse]

    return Made(torch.compile(attend, dynamic=False, fullgraph=True), notes)


def _gathered(problem: Problem) -> Made:
    """Each query's keys and values side by side, then two small products: the usual hand-written way."""
    pattern = problem.pattern
    keys = pattern.mask().nonzero()[:, 1].view(pattern.length, -1).to(problem.device)  # [S, window]
    scale = problem.width**-0.5

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhsd,bhswd->bhsw", q * scale, k[:, :, keys])
        return torch.einsum("bhsw,bhswd->bhsd", scores.softmax(-1), v[:, :, keys])

    return Made(attend)
