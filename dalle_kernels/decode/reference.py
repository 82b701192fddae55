"""Decoding, defined: write the new keys and values, gather the visible slots, attend."""

from __future__ import annotations

import torch

from dalle_kernels.backends.contract import Call
from dalle_kernels.decode.contract import Inputs, Outputs
from dalle_kernels.decode.eight_bit import quantize, widen
from dalle_kernels.patterns.decode_table import DecodeTable


def refuse(call: Call) -> str | None:
    return None


def forward(inputs: Inputs) -> Outputs:
    (q, k, v), table, out = inputs[:3], inputs.table(inputs.q.device), torch.empty_like(inputs.q)
    starts = torch.as_tensor(inputs.position).expand(q.shape[0]).tolist()
    for start in sorted(set(starts)):
        rows = torch.tensor([row for row, other in enumerate(starts) if other == start], device=q.device)
        for token in range(q.shape[2]):  # one after another: a later one may take a slot that an earlier one reads
            here = slice(token, token + 1)
            step = inputs._replace(q=q[rows, :, here], k=k[rows, :, here], v=v[rows, :, here])
            out[rows, :, here] = _attend(step, rows, start + token, table)
    return Outputs(out)


def _attend(step: Inputs, rows: torch.Tensor, position: int, table: DecodeTable) -> torch.Tensor:
    """One token of `rows`, all of them at `position`, whose q, k and v `step` has."""
    q, k, v, softcap = *step[:3], step.softcap
    slot = int(table.slot[position])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    for part, (held, new) in enumerate(((step.keys, k), (step.values, v))):
        if step.scales is None:
            held[rows, :, slot] = new[:, :, 0]
        else:
            held[rows, :, slot], step.scales[rows, :, slot, part] = quantize(new[:, :, 0])
    if step.hidden is not None:
        step.hidden[rows, slot] = False  # what is new is not padding
    seen = _visible(table, position)
    keys, values = _read(step.keys, step.values, step.scales, rows, seen, wide)
    hidden = None if step.hidden is None else step.hidden[rows][:, seen]
    if table.shared is not None:
        assert step.shared_keys is not None
        assert step.shared_values is not None
        prompts, seen = rows // step.copies, _visible(table.shared, position)
        ours = torch.zeros(keys.shape[::2], dtype=torch.bool, device=q.device) if hidden is None else hidden
        before = _read(step.shared_keys, step.shared_values, step.shared_scales, prompts, seen, wide)
        keys, values = torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)
        if step.shared_hidden is not None:
            hidden = torch.cat([step.shared_hidden[prompts][:, seen], ours], 1)
    groups = q.shape[1] // keys.shape[1]  # of query heads, which see the same keys
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scores = step.factor * q.to(wide) @ keys.mT
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
