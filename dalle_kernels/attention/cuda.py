"""Sparse attention by the CUDA kernels of csrc/attention: mma.sync and cp.async, for sm_80 and later."""

from __future__ import annotations

import torch

from dalle_kernels import cuda_library
from dalle_kernels.attention.cuda_plan import SMALLEST, Plan, plan_for
from dalle_kernels.attention.patterns import Pattern
from dalle_kernels.backends import Call

_WIDTHS = (16, 32, 64, 80, 96, 128)  # as csrc/attention/forward_kernel.cuh has them
_ROWS = 128  # kRowTile of csrc/attention/tiles.cuh


def refuse(call: Call) -> str | None:
    if reason := cuda_library.refuse(call.device, call.dtype, (torch.bfloat16, torch.float16)):
        return reason
    if call.width not in _WIDTHS:
        return f"it takes head dimensions {', '.join(map(str, _WIDTHS))}, not {call.width}"
    return None


def _plan(
    q: torch.Tensor, pattern: Pattern, columns: int, blocks: int, transposed: bool = False, extra: int = 0
) -> Plan:
    """The walk for tensors like q, when `blocks` blocks share a multiprocessor's memory.

    A slot holds two tiles of `columns` rows, of D elements and 16 bytes of padding each (kPitch), and `extra` bytes.
    """
    batch, heads, length, width = q.shape
    slot_bytes = 2 * columns * (2 * width + 16) + extra
    slots = max(cuda_library.shared_memory(q.device, blocks) // slot_bytes, SMALLEST)
    parts = -(-blocks * cuda_library.multiprocessors(q.device) // (batch * heads))
    return plan_for(pattern, _ROWS, columns, transposed, length, slots, parts, q.device)


def _outputs(*likes: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Empty tensors with the given ones' strides, and for each the tensor that a kernel can write for it."""
    outputs = [torch.empty_like(like) for like in likes]
    return outputs, [cuda_library.aligned(output) for output in outputs]


def _return(outputs: list[torch.Tensor], targets: list[torch.Tensor]) -> list[torch.Tensor]:
    return [out if out is target else out.copy_(target) for out, target in zip(outputs, targets, strict=True)]


def _padding(key_padding_mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if key_padding_mask is None else key_padding_mask.contiguous()


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    scale: float,
    pattern: Pattern,
) -> tuple[torch.Tensor, torch.Tensor]:
    plan = _plan(q, pattern, columns=64, blocks=2 if q.shape[-1] <= 64 else 1)
    outputs, targets = _outputs(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    cuda_library.operations().attention_forward(
        *map(cuda_library.aligned, (q, k, v)),
        _padding(key_padding_mask),
        plan.order,
        *plan.walk,
        scale,
        *targets,
        lse,
    )
    return _return(outputs, targets)[0], lse


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    scale: float,
    pattern: Pattern,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    columns = 64 if q.shape[-1] <= 64 else 32  # kBackwardColumns of csrc/attention/cuda.h
    by_query = _plan(q, pattern, columns, blocks=1)
    by_key = _plan(q, pattern, columns, blocks=1, transposed=True, extra=2 * columns * 4)
    batch, heads, length, _ = q.shape
    padded = -(-length // columns) * columns
    statistics = torch.empty((batch, heads, 2, padded), dtype=torch.float32, device=q.device)
    outputs, targets = _outputs(q, k, v)
    cuda_library.operations().attention_backward(
        cuda_library.aligned(grad_out),
        None if grad_lse is None else grad_lse.contiguous(),
        *map(cuda_library.aligned, (q, k, v, out)),
        lse,
        _padding(key_padding_mask),
        by_query.order,
        *by_query.walk,
        *by_key.walk,
        scale,
        statistics,
        *targets,
    )
    dq, dk, dv = _return(outputs, targets)
    return dq, dk, dv
