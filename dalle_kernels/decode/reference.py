"""Decoding, defined: write the new keys and values, gather the visible slots, attend."""

from __future__ import annotations

import torch

from dalle_kernels.backends.contract import Call
from dalle_kernels.decode.eight_bit import quantize, widen
from dalle_kernels.decode.store import Store
from dalle_kernels.patterns.decode_table import DecodeTable
from dalle_kernels.patterns.patterns import Pattern


def refuse(call: Call) -> str | None:
    return None


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
    table, out = store.table(pattern, q.device), torch.empty_like(q)
    starts = position.expand(q.shape[0]).tolist()
    for start in sorted(set(starts)):
        rows = torch.tensor([row for row, other in enumerate(starts) if other == start], device=q.device)
        for token in range(q.shape[2]):  # one after another: a later one may take a slot that an earlier one reads
            here = slice(token, token + 1)
            step = q[rows, :, here], k[rows, :, here], v[rows, :, here]
            out[rows, :, here] = _attend(*step, store, rows, start + token, scale, softcap, table)
    return out


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    store: Store,
    rows: torch.Tensor,
    position: int,
    scale: float,
    softcap: float | None,
    table: DecodeTable,
) -> torch.Tensor:
    """One token of `rows`, all of them at `position`."""
    slot = int(table.slot[position])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    for part, (held, new) in enumerate(((store.keys, k), (store.values, v))):
        if store.scales is None:
            held[rows, :, slot] = new[:, :, 0]
        else:
            held[rows, :, slot], store.scales[rows, :, slot, part] = quantize(new[:, :, 0])
    if store.hidden is not None:
        store.hidden[rows, slot] = False  # what is new is not padding
    seen = _visible(table, position)
    keys, values = _read(store.keys, store.values, store.scales, rows, seen, wide)
    hidden = None if store.hidden is None else store.hidden[rows][:, seen]
    if table.shared is not None:
        assert store.shared_keys is not None
        assert store.shared_values is not None
        prompts, seen = rows // store.copies, _visible(table.shared, position)
        ours = torch.zeros(keys.shape[::2], dtype=torch.bool, device=q.device) if hidden is None else hidden
        before = _read(store.shared_keys, store.shared_values, store.shared_scales, prompts, seen, wide)
        keys, values = torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)
        if store.shared_hidden is not None:
            hidden = torch.cat([store.shared_hidden[prompts][:, seen], ours], 1)
    groups = q.shape[1] // keys.shape[1]  # of query heads, which see the same keys
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scores = scale * q.to(wide) @ keys.mT
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if hidden is None:
        return (scores.softmax(-1) @ values).to(q.dtype)
    blind = hidden.all(-1)[:, None, None, None]
    weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1).masked_fill(blind, 0)
    return (weights @ values.masked_fill(hidden[:, None, :, None], 0)).to(q.dtype)


def _read(
    keys: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor | None,
    rows: torch.Tensor,
    seen: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots `seen` of `rows` as numbers of `dtype`."""
    keys, values = keys[rows][:, :, seen], values[rows][:, :, seen]
    if scales is None:
        return keys.to(dtype), values.to(dtype)
    its = scales[rows][:, :, seen]
    return widen(keys, its[..., 0], dtype), widen(values, its[..., 1], dtype)


def _visible(table: DecodeTable, position: int) -> torch.Tensor:
    prefix = torch.arange(int(table.prefix[position]), device=table.slots.device)
    return torch.cat([prefix, table.slots[table.offsets[position] : table.offsets[position + 1]]])
