"""The nearest-row lookup, defined: plain PyTorch, in float32 or float64, over the whole N x K table."""

from __future__ import annotations

import torch

from dalle_kernels.backends.contract import Call
from dalle_kernels.codebook.vq.contract import Grads, Inputs, Kept, Needs, Outputs
from dalle_kernels.precision import widen


def refuse(call: Call) -> str | None:
    return None


def forward(inputs: Inputs) -> Outputs:
    """The squared distance is computed from the difference, not from expanded squares."""
    wide, table = map(widen, inputs)
    indices = ((table * table).sum(-1) / 2 - wide @ table.T).argmin(-1)
    return Outputs((wide - table[indices]).square().sum(-1), indices)


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    assert grads.squared_distance is not None
    wide, table = widen(kept.features), widen(kept.codebook)
    dfeatures = 2 * grads.squared_distance[:, None] * (wide - table[kept.indices])
    dcodebook = torch.zeros_like(table).index_add_(0, kept.indices, -dfeatures) if needs.codebook else None
    return dfeatures.to(kept.features.dtype), None if dcodebook is None else dcodebook.to(kept.codebook.dtype)


def jvp(tangents: tuple[torch.Tensor | None, ...], kept: Kept) -> tuple[torch.Tensor]:
    """With r = f - c and the index held fixed: 2 r . (df - dc)."""
    dfeatures, dcodebook = (None if tangent is None else widen(tangent) for tangent in tangents)
    difference = widen(kept.features) - widen(kept.codebook)[kept.indices]
    total = torch.zeros_like(difference[:, 0])
    if dfeatures is not None:
        total = total + 2 * (difference * dfeatures).sum(-1)
    if dcodebook is not None:
        total = total - 2 * (difference * dcodebook[kept.indices]).sum(-1)
    return (total,)
