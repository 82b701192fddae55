"""The Gumbel-softmax lookup, defined: plain PyTorch, in float32 or float64, over the whole N x K table."""

from __future__ import annotations

import math

import torch

from dalle_kernels.backends.contract import Call
from dalle_kernels.codebook.gumbel.contract import Grads, Inputs, Kept, Needs, Outputs
from dalle_kernels.noise import GUMBEL_STREAM, gumbel_noise
from dalle_kernels.precision import widen


def refuse(call: Call) -> str | None:
    return None


def _noisy(logits: torch.Tensor, values: Inputs | Kept) -> torch.Tensor:
    if not values.noise:
        return logits
    rows, codes = logits.shape
    of_rows = values.row_offset, logits.device, values.counter_offset
    return logits + gumbel_noise(values.seed, rows, codes, GUMBEL_STREAM, *of_rows)


def forward(inputs: Inputs) -> Outputs:
    logits, codebook, temperature, hard = inputs[:4]
    wide, table = widen(logits), widen(codebook)
    noisy = _noisy(wide, inputs)
    maximum = noisy.amax(-1)
    scaled = (noisy - maximum[:, None]) / temperature
    mixture = scaled.softmax(-1) @ table
    indices = noisy.argmax(-1)
    clean = wide.log_softmax(-1)
    # xlogy(p, p) = p log p, and 0 for a code that -inf rules out.
    kl = math.log(logits.shape[-1]) + torch.xlogy(clean.exp(), clean.exp()).sum(-1)
    latents = codebook[indices] if hard else mixture.to(codebook.dtype)
    kept = mixture if hard else mixture.new_empty(0)
    log_clean = (wide - maximum[:, None]).logsumexp(-1)
    return Outputs(latents, indices, kl, maximum, scaled.logsumexp(-1), log_clean, kept)


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    """With y = softmax((logits + g) / tau), p = softmax(logits) and d = dL codebook^T:

    dlogits = y (d - y . d) / tau + dKL p (log p + H(p)); the codebook receives y^T dL, or where hard the
    one-hot rows' share.
    """
    grad_latents, grad_kl = grads
    logits, codebook, temperature, hard, *_, indices, kl, maximum, log_noisy, log_clean, mixture, _ = kept
    wide, table = widen(logits), widen(codebook)
    dlogits, dcodebook = torch.zeros_like(wide), torch.zeros_like(table)
    if grad_latents is not None:
        grad = widen(grad_latents)
        if needs.logits or not hard:
            y = ((_noisy(wide, kept) - maximum[:, None]) / temperature - log_noisy[:, None]).exp()
        if needs.logits:
            pull = grad @ table.T
            mean = (grad * mixture if mixture.numel() else y * pull).sum(-1, keepdim=True)
            dlogits += y * (pull - mean) / temperature
        if needs.codebook and hard:
            dcodebook.index_add_(0, indices.clamp(min=0), grad * (indices >= 0)[:, None])
        elif needs.codebook:
            dcodebook = y.T @ grad
    if grad_kl is not None and needs.logits:
        log_p = wide - maximum[:, None] - log_clean[:, None]
        entropy = math.log(logits.shape[-1]) - kl[:, None]
        p = log_p.exp()
        dlogits += grad_kl[:, None] * (torch.xlogy(p, p) + p * entropy)
    return dlogits.to(logits.dtype), dcodebook.to(codebook.dtype)


def jvp(tangents: tuple[torch.Tensor | None, ...], kept: Kept) -> tuple[torch.Tensor, torch.Tensor]:
    """With y and p as above and z = dlogits / tau: dlatents = (y (z - y . z)) codebook + y dcodebook, the latter of the
    one-hot rows where hard, and dkl = p (log p + H(p)) . dlogits.
    """
    dlogits, dcodebook = (None if tangent is None else widen(tangent) for tangent in tangents)
    logits, table = widen(kept.logits), widen(kept.codebook)
    dlatents, dkl = torch.zeros_like(kept.latents, dtype=logits.dtype), torch.zeros_like(kept.kl)
    y = (_noisy(logits, kept) / kept.temperature).softmax(-1)
    if dlogits is not None:
        z = dlogits / kept.temperature
        dlatents = dlatents + (y * (z - (y * z).sum(-1, keepdim=True))) @ table
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        entropy = math.log(logits.shape[-1]) - kept.kl[:, None]
        dkl = ((torch.xlogy(p, p) + p * entropy) * dlogits).sum(-1)
    if dcodebook is not None:
        dlatents = dlatents + (dcodebook[kept.indices] if kept.hard else y @ dcodebook)
    return dlatents.to(kept.latents.dtype), dkl
