"""One decoding step on the CPU: hands the decode table and the tensors to the kernels of csrc/decode."""

from __future__ import annotations

import torch

from dalle_kernels.backends import native
from dalle_kernels.backends.choice import Call
from dalle_kernels.patterns.decode_table import decode_table_for
from dalle_kernels.patterns.patterns import Pattern

_WIDEST = 256


def refuse(call: Call) -> str | None:
    reason = native.refuse_cpu(call.device, call.dtype)
    if reason is None and (call.width % 8 or not 8 <= call.width <= _WIDEST):
        reason = f"it takes a head dimension D that is a multiple of 8 up to {_WIDEST}, not {call.width}"
    return reason


def describe() -> str:
    return native.instruction_set()


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    scale: float,
    pattern: Pattern,
) -> torch.Tensor:
    table = decode_table_for(pattern)
    return torch.ops.dalle_kernels_cpu.decode_forward(
        q, k, v, keys, values, position, scale, table.slot, table.prefix, table.offsets, table.slots
    )
