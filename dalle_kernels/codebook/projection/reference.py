"""gumbel_projection_lookup, defined: the projection, then the lookup of `reference`."""

from __future__ import annotations

from typing import Any

import torch

from dalle_kernels.codebook.gumbel import reference
from dalle_kernels.codebook.gumbel.reference import refuse
from dalle_kernels.precision import widen

__all__ = ["projection_backward", "projection_forward", "refuse"]


def _logits(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(widen(features), widen(weight), None if bias is None else widen(bias))


def projection_forward(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: torch.Tensor,
    temperature: torch.Tensor,
    hard: bool,
    noise: bool,
    seed: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """What `gumbel_forward(features @ weight.T + bias, codebook, ...)` returns."""
    logits = _logits(features, weight, bias)
    return reference.gumbel_forward(logits, codebook, temperature, hard, noise, seed)


def projection_backward(
    grad_latents: torch.Tensor | None,
    grad_kl: torch.Tensor | None,
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: torch.Tensor,
    *saved: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(dfeatures, dweight, dbias or None, dcodebook); `saved` as `reference.gumbel_backward` takes it."""
    logits = _logits(features, weight, bias)
    dlogits, dcodebook = reference.gumbel_backward(grad_latents, grad_kl, logits, codebook, *saved)
    dfeatures = (dlogits @ widen(weight)).to(features.dtype)
    dweight = (dlogits.T @ widen(features)).to(weight.dtype)
    return dfeatures, dweight, None if bias is None else dlogits.sum(0).to(bias.dtype), dcodebook
