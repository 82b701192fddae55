"""What else computes one decoding step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.competitors.adapter import Made, Problem
from benchmarks.competitors.attention import mask_mod


@dataclass(frozen=True)
class Decode:
    """A competitor of `decode_attention` at one position: `make(problem, position)` gives a function of
    (q, k, v [B, H, 1, D], keys, values [B, H, S, D] of the whole sequence) that writes the new key and attends."""

    name: str
    make: Callable[[Problem, int], Made]
    dense: bool = False


def decode_competitors() -> list[Decode]:
    return [
        Decode("SDPA over a full cache, masked", _decode_masked),
        Decode("SDPA over gathered keys", _decode_gathered),
        Decode("SDPA over a full cache, dense", _decode_dense, dense=True),
        Decode("FlexAttention over a full cache", _decode_flex),
    ]


def _write(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: int) -> None:
    keys[:, :, position : position + 1] = k
    values[:, :, position : position + 1] = v


def _decode_masked(problem: Problem, position: int) -> Made:
    seen = problem.pattern.mask()[position].to(problem.device)[None, None, None]

    def function(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        _write(k, v, keys, values, position)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)

    return Made(function)


def _decode_gathered(problem: Problem, position: int) -> Made:
    visible = problem.pattern.mask()[position].nonzero()[:, 0].to(problem.device)

    def function(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        _write(k, v, keys, values, position)
        return F.scaled_dot_product_attention(q, keys.index_select(2, visible), values.index_select(2, visible))

    return Made(function)


def _decode_dense(problem: Problem, position: int) -> Made:
    def function(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        _write(k, v, keys, values, position)
        return F.scaled_dot_product_attention(q, keys[:, :, : position + 1], values[:, :, : position + 1])

    return Made(function)


def _decode_flex(problem: Problem, position: int) -> Made:
    length, device = problem.pattern.length, problem.device
    rule = mask_mod(problem.pattern, device)

    def here(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return rule(b, h, i + position, j)

    start = time.perf_counter()
    blocks = create_block_mask(here, None, None, 1, length, device=device.type)
    notes = {"block_mask_ms": (time.perf_counter() - start) * 1e3}

    def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return flex_attention(q, keys, values, block_mask=blocks)

    compiled = torch.compile(attend, dynamic=False, fullgraph=True)

    def function(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        _write(k, v, keys, values, position)
        return compiled(q, keys, values)

    return Made(function, notes)
