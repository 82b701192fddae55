"""Sparse attention on the CPU: hands a pattern's plan and the tensors to the kernels of csrc/attention."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from dalle_kernels.attention.contract import Grads, Inputs, Kept, Needs, Outputs, rows_of
from dalle_kernels.backends import native
from dalle_kernels.backends.contract import Call
from dalle_kernels.device import remembered
from dalle_kernels.patterns.patterns import Pattern
from dalle_kernels.patterns.schedule import schedule_for

_TILE = (64, 64)  # what csrc/attention/plan.h is written for
_WIDEST = 256


def refuse(call: Call) -> str | None:
    reason = native.refuse_cpu(call.device, call.dtype)
    if reason is None and call.width > _WIDEST:
        reason = f"it takes a head dimension D up to {_WIDEST}, not {call.width}"
    return reason


def describe() -> str:
    return native.instruction_set()


@remembered(maxsize=256)
def _plan(pattern: Pattern, length: int, queries: tuple[int, int] | None) -> torch.Tensor:
    """The masked tiles resolved to the keys that each group of 16 queries sees: csrc/attention/plan.h."""
    schedule = schedule_for(pattern, _TILE, length, queries=queries)
    return torch.ops.dalle_kernels_cpu.attention_plan(
        schedule.order,
        schedule.query_order,
        schedule.key_offsets,
        schedule.key_tiles,
        schedule.mask_ids,
        schedule.full_counts,
        schedule.query_offsets,
        schedule.query_tiles,
        schedule.query_mask_ids,
        schedule.query_full_counts,
        schedule.masks,
        schedule.masks_transposed,
    )


def _filled(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors with zeros up to a width that is a multiple of 8, which kernels take: no score or sum changes."""
    return [pad(tensor, (0, -tensor.shape[-1] % 8)) for tensor in tensors]


def _cut(filled: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like).copy_(filled[..., : like.shape[-1]])


def forward(inputs: Inputs) -> Outputs:
    q, k, v, key_padding_mask, scale, pattern, softcap, _ = inputs
    run, plan = torch.ops.dalle_kernels_cpu.attention_forward, _plan(pattern, k.shape[2], rows_of(inputs))
    if q.shape[-1] % 8 == 0:
        return Outputs(*run(q, k, v, key_padding_mask, scale, softcap, plan))
    out, lse = run(*_filled(q, k, v), key_padding_mask, scale, softcap, plan)
    return Outputs(_cut(out, q), lse)


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    (grad_out, grad_lse), (q, k, v, out, lse, key_padding_mask, scale, pattern, softcap, _) = grads, kept
    assert grad_out is not None
    run, plan = torch.ops.dalle_kernels_cpu.attention_backward, _plan(pattern, k.shape[2], rows_of(kept))
    if q.shape[-1] % 8 == 0:
        made = run(grad_out, grad_lse, q, k, v, out, lse, key_padding_mask, scale, softcap, plan, *needs)
        return tuple(gradient if need else None for gradient, need in zip(made, needs, strict=True))
    wide_grad, *wide = _filled(grad_out, q, k, v, out)
    filled = run(wide_grad, grad_lse, *wide, lse, key_padding_mask, scale, softcap, plan, *needs)
    return tuple(
        _cut(gradient, like) if need else None for gradient, like, need in zip(filled, (q, k, v), needs, strict=True)
    )
