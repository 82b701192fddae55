"""Sparse attention, defined: plain PyTorch on the dense mask, in float32 or float64."""

from __future__ import annotations

import torch

from dalle_kernels.backends.choice import Call
from dalle_kernels.device import remembered
from dalle_kernels.patterns.patterns import Pattern
from dalle_kernels.precision import widen


def refuse(call: Call) -> str | None:
    return None


@remembered(maxsize=32)
def _mask(pattern: Pattern, length: int, device: torch.device) -> torch.Tensor:
    return pattern.mask(length).to(device)


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, key_padding_mask: torch.Tensor | None, scale: float, pattern: Pattern
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax [B, H, S, S] over the visible keys, and its log-sum-exp [B, H, S]; zeros and -inf where there is none."""
    visible = _mask(pattern, q.shape[2], q.device)
    if key_padding_mask is not None:
        visible = visible & ~key_padding_mask[:, None, None, :]
    scores = (scale * q @ k.mT).masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().where(visible, 0), lse


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    scale: float,
    pattern: Pattern,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide_q, wide_k, wide_v = map(widen, (q, k, v))
    p, lse = _probabilities(wide_q, wide_k, key_padding_mask, scale, pattern)
    return torch.empty_like(q).copy_(p @ wide_v), lse


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    scale: float,
    pattern: Pattern,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With S = scale q k^T, P = softmax(S), dP = dO v^T: dS = P (dP - rowsum(dO O) + dLSE)."""
    wide_grad, wide_q, wide_k, wide_v, wide_out = map(widen, (grad_out, q, k, v, out))
    p, _ = _probabilities(wide_q, wide_k, key_padding_mask, scale, pattern)
    delta = (wide_grad * wide_out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    ds = scale * p * (wide_grad @ wide_v.mT - delta[..., None])
    return (
        torch.empty_like(q).copy_(ds @ wide_k),
        torch.empty_like(k).copy_(ds.mT @ wide_q),
        torch.empty_like(v).copy_(p.mT @ wide_grad),
    )
