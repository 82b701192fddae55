"""One decoding step, defined: write the new key and value, gather the visible slots, attend."""

from __future__ import annotations

import torch

from dalle_kernels.backends.choice import Call
from dalle_kernels.patterns.decode_table import decode_table_for
from dalle_kernels.patterns.patterns import Pattern


def refuse(call: Call) -> str | None:
    return None


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
    table, here = decode_table_for(pattern, q.device), int(position)
    slot = int(table.slot[here])
    keys[:, :, slot : slot + 1] = k
    values[:, :, slot : slot + 1] = v
    prefix = torch.arange(int(table.prefix[here]), device=q.device)
    visible = torch.cat([prefix, table.slots[table.offsets[here] : table.offsets[here + 1]]])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = scale * q.to(wide) @ keys[:, :, visible].to(wide).mT
    out = scores.softmax(-1) @ values[:, :, visible].to(wide)
    return torch.empty_like(q).copy_(out)
