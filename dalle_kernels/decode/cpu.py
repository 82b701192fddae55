"""Decoding on the CPU: hands the decode table and the tensors to the kernels of csrc/decode."""

from __future__ import annotations

import torch

from dalle_kernels.backends import native
from dalle_kernels.backends.contract import Call
from dalle_kernels.decode.store import Store
from dalle_kernels.patterns.patterns import Pattern

_WIDEST = 256


def refuse(call: Call) -> str | None:
    reason = native.refuse_cpu(call.device, call.dtype)
    if reason is None and call.width > _WIDEST:
        reason = f"it takes a head dimension D up to {_WIDEST}, not {call.width}"
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
    softcap: float | None = None,
) -> torch.Tensor:
    """Output [B, H, G, D] like q; k and v go into `store`. `position` int64 of 0 dimensions, or [B]."""
    table = store.table(pattern)
    shared: tuple[torch.Tensor | None, ...] = (None, None)
    lists: tuple[torch.Tensor | None, ...] = (None, None, None)
    if table.shared is not None:
        shared = store.shared_keys, store.shared_values
        lists = table.shared.prefix, table.shared.offsets, table.shared.slots
    return torch.ops.dalle_kernels_cpu.decode_forward(
        q,
        k,
        v,
        store.keys,
        store.values,
        *shared,
        store.hidden,
        None if table.shared is None else store.shared_hidden,
        store.scales,
        None if table.shared is None else store.shared_scales,
        position,
        scale,
        softcap,
        table.slot,
        table.prefix,
        table.offsets,
        table.slots,
        *lists,
    )
