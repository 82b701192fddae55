"""The logit-Laplace likelihood, defined: plain PyTorch, in float32 or float64."""

from __future__ import annotations

import math

import torch

from dalle_kernels.backends.contract import Call
from dalle_kernels.likelihood.contract import Grads, Inputs, Kept, Needs, Outputs
from dalle_kernels.precision import widen


def refuse(call: Call) -> str | None:
    return None


def forward(inputs: Inputs) -> Outputs:
    """log(2 b x (1 - x)) + abs(logit(x) - mu) / b."""
    x, mu, log_b = map(widen, inputs)
    return Outputs(math.log(2) + log_b + x.log() + (-x).log1p() + (x.logit() - mu).abs() * (-log_b).exp())


def _slopes(kept: Kept) -> tuple[torch.Tensor, torch.Tensor]:
    """d/dmu = -sign(logit(x) - mu) / b; d/dlog b = 1 - abs(logit(x) - mu) / b."""
    x, mu, log_b = map(widen, kept)
    difference, rate = x.logit() - mu, (-log_b).exp()
    return -difference.sign() * rate, 1 - difference.abs() * rate


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    assert grads.nll is not None
    by_mu, by_log_b = _slopes(kept)
    return (
        (grads.nll * by_mu).to(kept.mu.dtype) if needs.mu else None,
        (grads.nll * by_log_b).to(kept.log_b.dtype) if needs.log_b else None,
    )


def jvp(tangents: tuple[torch.Tensor | None, ...], kept: Kept) -> tuple[torch.Tensor]:
    slopes = _slopes(kept)
    moved = [widen(tangent) * slope for tangent, slope in zip(tangents, slopes, strict=True) if tangent is not None]
    return (sum(moved, torch.zeros_like(slopes[0])),)
