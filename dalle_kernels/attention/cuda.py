"""Sparse attention by the CUDA kernels of csrc/attention: mma.sync and cp.async, for sm_80 and later."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from dalle_kernels.attention.contract import Grads, Inputs, Kept, Needs, Outputs
from dalle_kernels.attention.cuda_walk import Walk, parts_for, walk_for
from dalle_kernels.backends import cuda_library
from dalle_kernels.backends.contract import Call
from dalle_kernels.patterns.patterns import Pattern


class _Tiles(NamedTuple):
    """Of the kernels, as csrc/attention/cuda.h has them for a head dimension. Slots are in bytes."""

    rows: int
    columns: int
    ahead: int  # steps before its use, in which a column tile is loaded
    blocks: int  # that share a multiprocessor
    slot: int
    key_slot: int  # of dk's and dv's walk

    @property
    def fewest_slots(self) -> int:
        return self.ahead + 1


@lru_cache(maxsize=16)
def _tiles(width: int) -> _Tiles:
    return _Tiles(**cuda_library.numbers("attention_tiles", width))


def refuse(call: Call) -> str | None:
    if reason := cuda_library.refuse(call.device, call.dtype, (torch.bfloat16, torch.float16)):
        return reason
    if call.extras:
        return f"it has no {call.extras[0]}"
    widths = cuda_library.operations().attention_widths()
    if call.width not in widths:
        listed = ", ".join(map(str, widths))
        return f"it takes head dimensions {listed}, not {call.width}"
    tiles = _tiles(call.width)
    needed = tiles.fewest_slots * tiles.key_slot
    there = cuda_library.shared_memory(call.device, 1)
    if needed > there:
        return f"it needs {needed} bytes of shared memory a block at this head dimension, here are {there}"
    return None


def leads(call: Call) -> bool:
    """Whether "auto" asks these kernels before Triton's: where their floors, counted from machine code, lie under
    Triton's forward, and more than 1.15 times under them with the backward, for every head dimension and each of the
    paper's patterns (benchmarks/notes/sass.md): on sm_80."""
    return torch.cuda.get_device_capability(call.device) == (8, 0)


def _walk(q: torch.Tensor, pattern: Pattern, transposed: bool = False) -> Walk:
    """The walk for tensors like q, when blocks share a multiprocessor's memory.

    Where as many as there could be do not fit with the fewest slots each, fewer share it.
    """
    batch, heads, length, width = q.shape
    tiles = _tiles(width)
    slot = tiles.key_slot if transposed else tiles.slot
    slots = max(cuda_library.shared_memory(q.device, tiles.blocks) // slot, tiles.fewest_slots)
    at_a_time = tiles.blocks * cuda_library.multiprocessors(q.device)
    parts = parts_for(pattern, tiles.rows, tiles.columns, transposed, length, batch * heads, at_a_time)
    return walk_for(pattern, tiles.rows, tiles.columns, transposed, length, slots, tiles.ahead, parts, q.device)


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
    walk = _walk(q, pattern)
    cuda_library.operations().attention_forward(
        q, k, v, _padding(key_padding_mask), walk.order, *walk.arguments, scale, *targets, lse
    )
    return Outputs(_return(outputs, targets)[0], lse)


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    """One kernel makes dq, another dk and dv, whichever of the two is asked for."""
    (grad_out, grad_lse), (q, k, v, out, lse, key_padding_mask, scale, pattern) = grads, kept[:8]
    assert grad_out is not None
    assert scale is not None
    batch, heads, length, width = q.shape
    columns, operations = _tiles(width).columns, cuda_library.operations()
    by_query = _walk(q, pattern) if needs.q else None
    by_key = _walk(q, pattern, transposed=True) if needs.k or needs.v else None
    either = by_query or by_key
    if either is None:
        return None, None, None
    padded = -(-length // columns) * columns
    statistics = torch.empty((batch, heads, 2, padded), dtype=torch.float32, device=q.device)
    grad_out, grad_lse = cuda_library.aligned(grad_out), None if grad_lse is None else grad_lse.contiguous()
    operations.attention_statistics(grad_out, grad_lse, cuda_library.aligned(out), lse, either.order, statistics)
    rows = grad_out, *map(cuda_library.aligned, (q, k, v)), _padding(key_padding_mask)
    dq = dk = dv = None
    if by_query is not None:
        outputs, targets = _outputs(q)
        operations.attention_backward_queries(*rows, by_query.order, *by_query.arguments, scale, statistics, *targets)
        (dq,) = _return(outputs, targets)
    if by_key is not None:
        outputs, targets = _outputs(k, v)
        operations.attention_backward_keys(*rows, by_key.order, *by_key.arguments, scale, statistics, *targets)
        dk, dv = _return(outputs, targets)
    return dq, dk if needs.k else None, dv if needs.v else None
