"""Sparse attention by the CUDA kernels of csrc/attention: mma.sync and cp.async, for sm_80 and later."""

from __future__ import annotations

import torch

from dalle_kernels.attention.contract import Grads, Inputs, Kept, Needs, Outputs
from dalle_kernels.attention.cuda_plan import SMALLEST, Walk, parts_for, walk_for
from dalle_kernels.backends import cuda_library
from dalle_kernels.backends.contract import Call
from dalle_kernels.patterns.patterns import Pattern

_WIDTHS = (16, 32, 64, 80, 96, 128)  # as csrc/attention/forward_kernel.cuh has them
_ROWS = 128  # kRowTile of csrc/attention/tiles.cuh
_FORWARD_COLUMNS = 64  # kColumns of csrc/attention/forward_kernel.cuh


def refuse(call: Call) -> str | None:
    if reason := cuda_library.refuse(call.device, call.dtype, (torch.bfloat16, torch.float16)):
        return reason
    if call.width not in _WIDTHS:
        return f"it takes head dimensions {', '.join(map(str, _WIDTHS))}, not {call.width}"
    if call.extras:
        return f"it has no {call.extras[0]}"
    needed, there = SMALLEST * _slot_bytes(_FORWARD_COLUMNS, call.width), cuda_library.shared_memory(call.device, 1)
    if needed > there:
        return f"it needs {needed} bytes of shared memory a block at this head dimension, here are {there}"
    return None


def _slot_bytes(columns: int, width: int) -> int:
    """Two tiles of `columns` rows, of `width` elements and 16 bytes of padding each (kPitch)."""
    return 2 * columns * (2 * width + 16)


def _walk(
    q: torch.Tensor, pattern: Pattern, columns: int, blocks: int, transposed: bool = False, extra: int = 0
) -> Walk:
    """The walk for tensors like q, when `blocks` blocks share a multiprocessor's memory.

    Where so many do not fit with the fewest slots each, fewer share it. A slot has `extra` bytes beside its tiles.
    """
    batch, heads, length, width = q.shape
    slots = max(cuda_library.shared_memory(q.device, blocks) // (_slot_bytes(columns, width) + extra), SMALLEST)
    at_a_time = blocks * cuda_library.multiprocessors(q.device)
    parts = parts_for(pattern, _ROWS, columns, transposed, length, batch * heads, at_a_time)
    return walk_for(pattern, _ROWS, columns, transposed, length, slots, parts, q.device)


def _outputs(*likes: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Empty tensors with the given ones' strides, and for each the tensor that a kernel can write for it."""
    outputs = [torch.empty_like(like) for like in likes]
    return outputs, [cuda_library.aligned(output) for output in outputs]


def _return(outputs: list[torch.Tensor], targets: list[torch.Tensor]) -> list[torch.Tensor]:
    return [out if out is target else out.copy_(target) for out, target in zip(outputs, targets, strict=True)]


def _padding(key_padding_mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if key_padding_mask is None else key_padding_mask.contiguous()


def forward(inputs: Inputs) -> Outputs:
    q, k, v, key_padding_mask, scale, pattern = inputs[:6]
    assert scale is not None
    outputs, targets = _outputs(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    q, k, v = map(cuda_library.aligned, (q, k, v))
    padding = _padding(key_padding_mask)
    walk = _walk(q, pattern, _FORWARD_COLUMNS, blocks=2 if q.shape[-1] <= 64 else 1)
    cuda_library.operations().attention_forward(q, k, v, padding, walk.order, *walk.arguments, scale, *targets, lse)
    return Outputs(_return(outputs, targets)[0], lse)


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    (grad_out, grad_lse), (q, k, v, out, lse, key_padding_mask, scale, pattern) = grads, kept[:8]
    assert grad_out is not None
    assert scale is not None
    columns = 64 if q.shape[-1] <= 64 else 32  # kBackwardColumns of csrc/attention/cuda.h
    by_query = _walk(q, pattern, columns, blocks=1)
    by_key = _walk(q, pattern, columns, blocks=1, transposed=True, extra=2 * columns * 4)
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
        *by_query.arguments,
        *by_key.arguments,
        scale,
        statistics,
        *targets,
    )
    dq, dk, dv = _return(outputs, targets)
    return dq, dk, dv
