"""Codebook lookups, defined: plain PyTorch, in float32 or float64, over the whole N x K table."""

from __future__ import annotations

import math

import torch

from dalle_kernels.backends.choice import Call
from dalle_kernels.noise import GUMBEL_STREAM, gumbel_noise
from dalle_kernels.precision import widen


def refuse(call: Call) -> str | None:
    return None


def _noisy(logits: torch.Tensor, noise: bool, seed: torch.Tensor) -> torch.Tensor:
    return logits + gumbel_noise(seed, logits.shape[0], logits.shape[1], GUMBEL_STREAM) if noise else logits


def gumbel_forward(
    logits: torch.Tensor,
    codebook: torch.Tensor,
    temperature: torch.Tensor,
    hard: bool,
    noise: bool,
    seed: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """(latents, indices, kl, log-sum-exp of (logits + g) / tau, that of logits, the soft mixture where hard)."""
    wide, table = widen(logits), widen(codebook)
    noisy = _noisy(wide, noise, seed)
    scaled = noisy / temperature
    mixture = scaled.softmax(-1) @ table
    indices = noisy.argmax(-1)
    clean = wide.log_softmax(-1)
    # xlogy(p, p) = p log p, and 0 for a code that -inf rules out.
    kl = math.log(logits.shape[-1]) + torch.xlogy(clean.exp(), clean.exp()).sum(-1)
    latents = codebook[indices] if hard else mixture.to(codebook.dtype)
    kept = mixture if hard else mixture.new_empty(0)
    return latents, indices, kl, scaled.logsumexp(-1), wide.logsumexp(-1), kept


def gumbel_backward(
    grad_latents: torch.Tensor | None,
    grad_kl: torch.Tensor | None,
    logits: torch.Tensor,
    codebook: torch.Tensor,
    temperature: torch.Tensor,
    hard: bool,
    noise: bool,
    seed: torch.Tensor,
    latents: torch.Tensor,
    indices: torch.Tensor,
    kl: torch.Tensor,
    lse_noisy: torch.Tensor,
    lse_clean: torch.Tensor,
    mixture: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """With y = softmax((logits + g) / tau), p = softmax(logits) and d = dL codebook^T:

    dlogits = y (d - dL . mixture) / tau + dKL p (log p + H(p)); the codebook receives y^T dL, or where hard the
    one-hot rows' share.
    """
    wide, table = widen(logits), widen(codebook)
    dlogits, dcodebook = torch.zeros_like(wide), torch.zeros_like(table)
    if grad_latents is not None:
        grad = widen(grad_latents)
        y = (_noisy(wide, noise, seed) / temperature - lse_noisy[:, None]).exp()
        delta = (grad * (mixture if hard else widen(latents))).sum(-1, keepdim=True)
        dlogits += y * (grad @ table.T - delta) / temperature
        dcodebook = dcodebook.index_add_(0, indices, grad) if hard else y.T @ grad
    if grad_kl is not None:
        log_p = wide - lse_clean[:, None]
        entropy = math.log(logits.shape[-1]) - kl[:, None]
        p = log_p.exp()
        dlogits += grad_kl[:, None] * (torch.xlogy(p, p) + p * entropy)
    return dlogits.to(logits.dtype), dcodebook.to(codebook.dtype)
