"""Guidance between logits that rule tokens out with -inf on one side, on the other or on both."""

from __future__ import annotations

from typing import Any

import torch

SCALES = [2.5, 1.0, 0.0, -1.5]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 3},
    {"top_k": 60},  # more than are left
    {"top_p": 0.6},
    {"temperature": 1.8, "top_k": 20, "top_p": 0.9},
]


def guided(dtype: torch.dtype, rows: int = 40, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`logits` and `unconditional_logits` [rows, 64], and which can be drawn: two of five, none in the last row."""
    generator = torch.Generator().manual_seed(12)
    logits, unconditional = (2 * torch.randn(2, rows, 64, generator=generator)).to(dtype)
    kind = torch.arange(64) % 5
    logits[:, (kind == 0) | (kind == 1)] = -torch.inf
    unconditional[:, (kind == 0) | (kind == 2)] = -torch.inf
    logits[-1] = unconditional[-1] = -torch.inf
    allowed = ~(logits.isneginf() | unconditional.isneginf())
    return logits.to(device), unconditional.to(device), allowed.to(device)


def nothing_to_draw(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """`logits` and `unconditional_logits` of which every token is ruled out, by both, by the first or by the second."""
    low = -torch.inf
    return (
        torch.tensor([[low, low, 1.0, low]], device=device),
        torch.tensor([[low, 2.0, low, low]], device=device),
    )
