"""The nearest-row lookup, defined: plain PyTorch, in float32 or float64, over the whole N x K table."""

from __future__ import annotations

import torch

from dalle_kernels.backends.choice import Call
from dalle_kernels.precision import widen


def refuse(call: Call) -> str | None:
    return None


def vq_forward(features: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest row's index, and its squared distance computed from the difference, not from expanded squares."""
    wide, table = widen(features), widen(codebook)
    indices = ((table * table).sum(-1) / 2 - wide @ table.T).argmin(-1)
    return indices, (wide - table[indices]).square().sum(-1)


def vq_backward(
    grad_squared_distance: torch.Tensor, features: torch.Tensor, codebook: torch.Tensor, indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    wide, table = widen(features), widen(codebook)
    dfeatures = 2 * grad_squared_distance[:, None] * (wide - table[indices])
    dcodebook = torch.zeros_like(table).index_add_(0, indices, -dfeatures)
    return dfeatures.to(features.dtype), dcodebook.to(codebook.dtype)
