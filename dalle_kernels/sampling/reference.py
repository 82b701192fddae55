"""Drawing tokens, defined: plain PyTorch, in float32 or float64."""

from __future__ import annotations

import torch

from dalle_kernels.backends.contract import Call
from dalle_kernels.noise import SAMPLING_STREAM, gumbel_noise
from dalle_kernels.precision import widen
from dalle_kernels.sampling.contract import Inputs, Outputs


def refuse(call: Call) -> str | None:
    return None


def forward(inputs: Inputs) -> Outputs:
    """Top-k and top-p keep or drop equal logits together: no sort's order ever shows."""
    logits, unconditional, guidance_scale, temperature, top_k, top_p, seed, row_offset = inputs
    wide = widen(logits)
    if unconditional is not None:
        base = unconditional.to(wide.dtype)
        guided = base + guidance_scale * (wide - base)
        # Infinities that are no number together, two of -inf first of all, rule a token out as -inf on one side does.
        ruled_out = wide.isneginf() | base.isneginf() | guided.isnan()
        wide = guided.masked_fill(ruled_out, -torch.inf)
    if temperature == 0:
        return Outputs(wide.argmax(-1))
    scaled = wide / temperature
    if 0 < top_k < scaled.shape[-1]:
        threshold = scaled.topk(top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < threshold, -torch.inf)
    if top_p < 1:
        ordered, order = scaled.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        above = p.cumsum(-1) - p
        # Equal logits share the mass above the first of them.
        first = torch.searchsorted(-ordered, -ordered, side="left")
        dropped = above.gather(-1, first) >= top_p
        scaled = scaled.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    rows, tokens = scaled.shape
    noise = gumbel_noise(seed, rows, tokens, SAMPLING_STREAM, row_offset, scaled.device)
    return Outputs((scaled + noise).argmax(-1))
