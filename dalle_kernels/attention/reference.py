"""Sparse attention, defined: plain PyTorch on the dense mask, in float32 or float64."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dalle_kernels.attention.contract import Grads, Inputs, Kept, Needs, Outputs
from dalle_kernels.backends.contract import Call
from dalle_kernels.device import remembered, settled
from dalle_kernels.patterns.patterns import Pattern
from dalle_kernels.precision import widen


def refuse(call: Call) -> str | None:
    return None


@remembered(maxsize=32)
def _mask(pattern: Pattern, length: int, device: torch.device | str) -> torch.Tensor:
    return settled(device, lambda: pattern.mask(length).to(device))


class _Softmax(NamedTuple):
    p: torch.Tensor  # [B, H, L, S] over the visible keys; zeros where there is none
    lse: torch.Tensor  # [B, H, L], -inf where there is none
    slope: torch.Tensor | float  # d score / d (q . k): [B, H, L, S] under a soft cap


def _softmax(q: torch.Tensor, k: torch.Tensor, values: Inputs | Kept) -> _Softmax:
    scale, softcap = values.scale, values.softcap
    assert scale is not None
    visible = _mask(values.pattern, k.shape[2], q.device)
    visible = visible[values.query_start : values.query_start + q.shape[2]]
    if values.key_padding_mask is not None:
        visible = visible & ~values.key_padding_mask[:, None, None, :]
    scores = scale * q @ k.mT
    slope: torch.Tensor | float = scale
    if softcap is not None:
        bent = (scores / softcap).tanh()
        scores, slope = softcap * bent, scale * (1 - bent.square())
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    return _Softmax((scores - lse[..., None]).exp().where(visible, 0), lse, slope)


def forward(inputs: Inputs) -> Outputs:
    wide_q, wide_k, wide_v = map(widen, inputs[:3])
    p, lse, _ = _softmax(wide_q, wide_k, inputs)
    return Outputs(torch.empty_like(inputs.q).copy_(p @ wide_v), lse)


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    """With S = cap(scale q k^T), P = softmax(S), dP = dO v^T: dS = P (dP - rowsum(dO O) + dLSE)."""
    (grad_out, grad_lse), (q, k, v, out) = grads, kept[:4]
    assert grad_out is not None
    wide_grad, wide_q, wide_k, wide_v, wide_out = map(widen, (grad_out, q, k, v, out))
    p, _, slope = _softmax(wide_q, wide_k, kept)
    delta = (wide_grad * wide_out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    dq = dk = dv = None
    if needs.q or needs.k:
        ds = slope * p * (wide_grad @ wide_v.mT - delta[..., None])
        dq = torch.empty_like(q).copy_(ds @ wide_k) if needs.q else None
        dk = torch.empty_like(k).copy_(ds.mT @ wide_q) if needs.k else None
    if needs.v:
        dv = torch.empty_like(v).copy_(p.mT @ wide_grad)
    return dq, dk, dv


def jvp(tangents: tuple[torch.Tensor | None, ...], kept: Kept) -> tuple[torch.Tensor, torch.Tensor]:
    """With dS = cap' scale (dq k^T + q dk^T): dO = P (dS - rowsum(P dS)) v + P dv, dLSE = rowsum(P dS)."""
    q, k, v = map(widen, (kept.q, kept.k, kept.v))
    p, lse, slope = _softmax(q, k, kept)
    dq, dk, dv = (None if tangent is None else widen(tangent) for tangent in tangents)
    dout, dlse = torch.zeros_like(q), torch.zeros_like(lse)
    if dq is not None:
        dlse, dout = _through_scores(slope * (dq @ k.mT), p, v)
    if dk is not None:
        from_k = _through_scores(slope * (q @ dk.mT), p, v)
        dlse, dout = dlse + from_k[0], dout + from_k[1]
    if dv is not None:
        dout = dout + p @ dv
    return dout.to(kept.out.dtype), dlse


def _through_scores(ds: torch.Tensor, p: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dlse = (p * ds).sum(-1)
    return dlse, (p * (ds - dlse[..., None])) @ v
