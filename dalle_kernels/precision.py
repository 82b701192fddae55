"""The precision that the reference definitions compute in."""

from __future__ import annotations

import torch


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or as it is where it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
