"""The Gumbel-softmax lookup in native code: csrc/codebook."""

from __future__ import annotations

import torch

from dalle_kernels.backends import native
from dalle_kernels.backends.choice import Call

_ops = torch.ops.dalle_kernels_cpu


def refuse(call: Call) -> str | None:
    return native.refuse_cpu(call.device, call.dtype)


def describe() -> str:
    return native.instruction_set()


def gumbel_forward(
    logits: torch.Tensor,
    codebook: torch.Tensor,
    temperature: torch.Tensor,
    hard: bool,
    noise: bool,
    seed: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """(latents, indices, kl, lse_noisy, lse_clean, mixture), as in `reference`."""
    return _ops.gumbel_forward(logits, codebook, temperature, hard, noise, seed)


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
    """(dlogits, dcodebook), as in `reference`; the same bits for any number of threads."""
    return _ops.gumbel_backward(
        grad_latents,
        grad_kl,
        logits,
        codebook,
        temperature,
        hard,
        noise,
        seed,
        latents,
        indices,
        kl,
        lse_noisy,
        lse_clean,
        mixture,
    )
