"""Sparse attention, defined: plain PyTorch on the dense mask, in float32 or float64."""

from __future__ import annotations

import torch

from dalle_kernels.attention.contract import Grads, Inputs, Kept, Needs, Outputs
from dalle_kernels.backends.contract import Call
from dalle_kernels.device import lasting, remembered, settled
from dalle_kernels.patterns.patterns import Pattern
from dalle_kernels.precision import widen


def refuse(call: Call) -> str | None:
    return None


@remembered(maxsize=32)
def _mask(pattern: Pattern, length: int, device: torch.device) -> torch.Tensor:
    return settled(device, lambda: pattern.mask(length).to(device))


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, key_padding_mask: torch.Tensor | None, scale: float, pattern: Pattern
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax [B, H, S, S] over the visible keys, and its log-sum-exp [B, H, S]; zeros and -inf where there is none."""
    visible = lasting(_mask(pattern, q.shape[2], q.device), q.device)
    if key_padding_mask is not None:
        visible = visible & ~key_padding_mask[:, None, None, :]
    scores = (scale * q @ k.mT).masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().where(visible, 0), lse


def forward(inputs: Inputs) -> Outputs:
    q, k, v, key_padding_mask, scale, pattern = inputs
    assert scale is not None
    wide_q, wide_k, wide_v = map(widen, (q, k, v))
    p, lse = _probabilities(wide_q, wide_k, key_padding_mask, scale, pattern)
    return Outputs(torch.empty_like(q).copy_(p @ wide_v), lse)


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    """With S = scale q k^T, P = softmax(S), dP = dO v^T: dS = P (dP - rowsum(dO O) + dLSE)."""
    (grad_out, grad_lse), (q, k, v, out, _, key_padding_mask, scale, pattern) = grads, kept
    assert grad_out is not None
    assert scale is not None
    wide_grad, wide_q, wide_k, wide_v, wide_out = map(widen, (grad_out, q, k, v, out))
    p, _ = _probabilities(wide_q, wide_k, key_padding_mask, scale, pattern)
    delta = (wide_grad * wide_out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    dq = dk = dv = None
    if needs.q or needs.k:
        ds = scale * p * (wide_grad @ wide_v.mT - delta[..., None])
        dq = torch.empty_like(q).copy_(ds @ wide_k) if needs.q else None
        dk = torch.empty_like(k).copy_(ds.mT @ wide_q) if needs.k else None
    if needs.v:
        dv = torch.empty_like(v).copy_(p.mT @ wide_grad)
    return dq, dk, dv


def jvp(tangents: tuple[torch.Tensor | None, ...], kept: Kept) -> tuple[torch.Tensor, torch.Tensor]:
    """With dS = scale (dq k^T + q dk^T): dO = P (dS - rowsum(P dS)) v + P dv, dLSE = rowsum(P dS)."""
    assert kept.scale is not None
    q, k, v = map(widen, (kept.q, kept.k, kept.v))
    p, lse = _probabilities(q, k, kept.key_padding_mask, kept.scale, kept.pattern)
    dq, dk, dv = (None if tangent is None else widen(tangent) for tangent in tangents)
    dout, dlse = torch.zeros_like(q), torch.zeros_like(lse)
    if dq is not None:
        dlse, dout = _through_scores(kept.scale * dq @ k.mT, p, v)
    if dk is not None:
        from_k = _through_scores(kept.scale * q @ dk.mT, p, v)
        dlse, dout = dlse + from_k[0], dout + from_k[1]
    if dv is not None:
        dout = dout + p @ dv
    return dout.to(kept.out.dtype), dlse


def _through_scores(ds: torch.Tensor, p: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dlse = (p * ds).sum(-1)
    return dlse, (p * (ds - dlse[..., None])) @ v
