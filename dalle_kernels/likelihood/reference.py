"""The logit-Laplace likelihood, defined: plain PyTorch, in float32 or float64."""

from __future__ import annotations

import math

import torch

from dalle_kernels.backends.choice import Call
from dalle_kernels.precision import widen


def refuse(call: Call) -> str | None:
    return None


def forward(pixels: torch.Tensor, mu: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """log(2 b x (1 - x)) + abs(logit(x) - mu) / b."""
    x, mu, log_b = widen(pixels), widen(mu), widen(log_b)
    return math.log(2) + log_b + x.log() + (-x).log1p() + (x.logit() - mu).abs() * (-log_b).exp()


def backward(
    grad: torch.Tensor, pixels: torch.Tensor, mu: torch.Tensor, log_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """d/dmu = -sign(logit(x) - mu) / b; d/dlog b = 1 - abs(logit(x) - mu) / b."""
    x, wide_mu, wide_log_b = widen(pixels), widen(mu), widen(log_b)
    difference, rate = x.logit() - wide_mu, (-wide_log_b).exp()
    dmu = -grad * difference.sign() * rate
    dlog_b = grad * (1 - difference.abs() * rate)
    return dmu.to(mu.dtype), dlog_b.to(log_b.dtype)
