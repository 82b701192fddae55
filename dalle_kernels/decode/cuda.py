"""Decoding by the CUDA kernel of csrc/decode/decode.cu."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from dalle_kernels.backends import cuda_library
from dalle_kernels.backends.contract import Call
from dalle_kernels.decode.contract import Inputs, Outputs, one_by_one

_KEYS_A_BLOCK = 64  # fewer are not worth another block


class _Shape(NamedTuple):
    """Of the kernel, as csrc/decode/cuda.h has it."""

    piece: int  # bytes of a row that are read at once
    most_bytes: int  # of a row
    softmax_state: int  # numbers that a split leaves beside a row's sums


@lru_cache(maxsize=1)
def _shape() -> _Shape:
    return _Shape(**cuda_library.numbers("decode_shape"))


def refuse(call: Call) -> str | None:
    if reason := cuda_library.refuse(call.device, call.dtype, (torch.bfloat16, torch.float16, torch.float32)):
        return reason
    if call.extras:
        return f"it has no {call.extras[0]}"
    shape = _shape()
    piece, most = shape.piece // call.dtype.itemsize, shape.most_bytes // call.dtype.itemsize
    if call.width % piece or call.width > most:
        return f"it takes head dimensions that are multiples of {piece} up to {most}, not {call.width}"
    return None


def forward(inputs: Inputs) -> Outputs:
    """A launch a token."""
    return one_by_one(_step, inputs)


def _step(inputs: Inputs) -> torch.Tensor:
    q, k, v, keys, values = inputs[:5]
    table = inputs.table(q.device)
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.data_ptr() % 16:
            raise ValueError(f"cache.{name}: got memory at {tensor.data_ptr():#x}, wanted a multiple of 16")
    batch, heads, _, width = q.shape
    # Two blocks a multiprocessor hide each other's latency; the count may not depend on the position, which the
    # host does not look at.
    wanted = -(-2 * cuda_library.multiprocessors(q.device) // (batch * heads))
    splits = max(1, min(wanted, table.cache_length // _KEYS_A_BLOCK))
    workspace = batch * heads * splits * (width + _shape().softmax_state) if splits > 1 else 0
    partial = torch.empty(workspace, dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    cuda_library.operations().decode_attention(
        cuda_library.aligned(q),
        cuda_library.aligned(k),
        cuda_library.aligned(v),
        keys,
        values,
        table.slot,
        table.prefix,
        table.offsets,
        table.slots,
        torch.as_tensor(inputs.position, dtype=torch.int64, device=q.device),
        partial,
        out,
        inputs.factor,
        splits,
    )
    return out
