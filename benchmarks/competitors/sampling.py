"""What else draws tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.competitors.adapter import Lookup, Made


def sampling_competitors() -> list[Lookup]:
    """Functions (logits [B, V], unconditional or None, guidance, temperature, top_k or None, top_p or None, noise
    [B, V] or None) -> int64 [B]. With None they draw by multinomial, as samplers do; with ours, by Gumbel-argmax."""
    return [
        Lookup("eager, full sort", lambda: Made(_sample)),
        Lookup("compiled, full sort", lambda: Made(torch.compile(_sample, dynamic=False))),
    ]


def _sample(
    logits: Tensor,
    unconditional: Tensor | None,
    guidance: float,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    noise: Tensor | None = None,
) -> Tensor:
    logits = logits.float()
    if unconditional is not None:
        logits = unconditional.float() + guidance * (logits - unconditional.float())
    logits = logits / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None:
        descending, index = logits.sort(descending=True)
        p = descending.softmax(-1)
        drop = (p.cumsum(-1) - p) >= top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter_(-1, index, drop), -torch.inf)
    if noise is not None:
        return (logits + noise).argmax(-1)
    return logits.softmax(-1).multinomial(1)[:, 0]
