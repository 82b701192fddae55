"""Decoding on the CPU: hands the decode table and the tensors to the kernels of csrc/decode."""

from __future__ import annotations

import torch

from dalle_kernels.backends import native
from dalle_kernels.backends.contract import Call
from dalle_kernels.decode.store import Store
from dalle_kernels.patterns.decode_table import DecodeTable
from dalle_kernels.patterns.patterns import Pattern

_WIDEST = 256


def refuse(call: Call) -> str | None:
    reason = native.refuse_cpu(call.device, call.dtype)
    if reason is None and (call.width % 8 or not 8 <= call.width <= _WIDEST):
        reason = f"it takes a head dimension D that is a multiple of 8 up to {_WIDEST}, not {call.width}"
    if reason is None and "shared prompts" in call.extras:
        reason = "it has no shared prompts"
    return reason


def describe() -> str:
    return native.instruction_set()


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    store: Store,
    position: torch.Tensor,
    scale: float,
    pattern: Pattern,
) -> torch.Tensor:
    """Output [B, H, G, D] like q; k and v go into `store`. `position` int64 of 0 dimensions, or [B]."""
    table, rows, tokens = store.table(pattern), q.shape[0], q.shape[2]
    by_row = position.dim() > 0 or store.hidden is not None
    parts = [slice(row, row + 1) for row in range(rows)] if by_row else [slice(0, rows)]
    outs = []
    for token in range(tokens):
        here = position.expand(rows) + token if token or by_row else position.reshape(1)
        step = [tensor[:, :, token : token + 1] for tensor in (q, k, v)] if tokens > 1 else [q, k, v]
        outs.append(torch.cat([_step(step, store, here, part, scale, table) for part in parts]))
    return torch.cat(outs, 2)


def _step(
    qkv: list[torch.Tensor], store: Store, position: torch.Tensor, rows: slice, scale: float, table: DecodeTable
) -> torch.Tensor:
    """One token of `rows`, all of them at position[rows.start]."""
    where, arrays = position[rows.start], (table.slot, table.prefix, table.offsets, table.slots)
    if store.hidden is not None:
        here = int(where)
        listed = table.slots[table.offsets[here] : table.offsets[here + 1]]
        seen = torch.cat([torch.arange(int(table.prefix[here]), dtype=torch.int32), listed])
        seen = seen[~store.hidden[rows.start, seen]]
        arrays = table.slot[here : here + 1], torch.zeros(1, dtype=torch.int32), torch.tensor([0, len(seen)]), seen
        where = torch.zeros((), dtype=torch.int64)
    return torch.ops.dalle_kernels_cpu.decode_forward(
        *(tensor[rows] for tensor in qkv), store.keys[rows], store.values[rows], where, scale, *arrays
    )
