"""Keys and values in eight bits: whole numbers from -127 to 127 and a scale for each row of D of them."""

from __future__ import annotations

import torch

MOST = 127
LEAST_SCALE = torch.finfo(torch.float32).tiny
"""Rows whose scale would be smaller count as zeros: its inverse would not be a float32."""


def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [..., D] as int8 [..., D] and float32 scales [...], to the same bits in every backend.

    The scale is the row's greatest magnitude over 127, and what is nearest to a whole number of scales (to even where
    two are) takes its place. A row with an infinity or a NaN in it, or beyond float32, has the scale NaN.
    """
    wide = rows if rows.dtype == torch.float64 else rows.float()
    scale = (wide.abs().amax(-1) / MOST).float()
    scale = scale.masked_fill(scale < LEAST_SCALE, 0).masked_fill(scale.isinf(), torch.nan)
    steps = wide / scale[..., None].to(wide.dtype)
    return steps.round().where((scale > 0)[..., None], 0).to(torch.int8), scale


def widen(rows: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `quantize` made, as numbers of `dtype`."""
    return rows.to(dtype) * scales[..., None].to(dtype)
