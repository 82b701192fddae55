"""The Gumbel lookup by the CUDA kernels of csrc/codebook."""

from __future__ import annotations

import torch

from dalle_kernels import cuda_library
from dalle_kernels.backends import Call

_WIDTHS = (32, 64, 128, 256)  # as csrc/codebook/gumbel_forward_kernel.cuh has them
_ROWS = 256  # of the table; fewer are not worth another block of the backward


def refuse(call: Call) -> str | None:
    if reason := cuda_library.refuse(call.device, call.dtype, (torch.bfloat16, torch.float16)):
        return reason
    if call.width not in _WIDTHS:
        return f"it takes codebook widths {', '.join(map(str, _WIDTHS))}, not {call.width}"
    return None


def gumbel_forward(
    logits: torch.Tensor,
    codebook: torch.Tensor,
    temperature: torch.Tensor,
    hard: bool,
    noise: bool,
    seed: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    rows, width = logits.shape[0], codebook.shape[1]
    latents = torch.empty((rows, width), dtype=logits.dtype, device=logits.device)
    indices = torch.empty(rows, dtype=torch.int64, device=logits.device)
    kl, lse_noisy, lse_clean = torch.empty((3, rows), dtype=torch.float32, device=logits.device).unbind()
    mixture = torch.empty((rows, width) if hard else 0, dtype=torch.float32, device=logits.device)
    if rows:
        cuda_library.operations().gumbel_forward(
            logits,
            cuda_library.aligned(codebook),
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
    return latents, indices, kl, lse_noisy, lse_clean, mixture


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
    rows, codes = logits.shape
    delta = partial = None
    # A block walks over its codes' column of the logits, or a share of its rows where columns are few.
    group = 128 if codebook.shape[1] <= 128 else 64  # kStepCodes of csrc/codebook/codes.cuh
    columns = -(-codes // group)
    parts = max(1, min(cuda_library.multiprocessors(logits.device) // columns, rows // _ROWS))
    if grad_latents is not None:
        delta = (grad_latents.float() * (mixture if hard else latents)).sum(-1)
        if not hard:
            partial = torch.empty((parts, *codebook.shape), dtype=torch.float32, device=logits.device)
    dlogits = torch.empty((rows, codes), dtype=logits.dtype, device=logits.device)
    if rows:
        cuda_library.operations().gumbel_backward(
            None if grad_latents is None else cuda_library.aligned(grad_latents),
            grad_kl,
            logits,
            cuda_library.aligned(codebook),
            temperature,
            noise,
            seed,
            kl,
            lse_noisy,
            lse_clean,
            delta,
            parts,
            dlogits,
            partial,
        )
    if partial is not None and rows:
        return dlogits, partial.sum(0).to(codebook.dtype)
    dcodebook = torch.zeros(codebook.shape, dtype=torch.float32, device=codebook.device)
    if grad_latents is not None:
        dcodebook.index_add_(0, indices, grad_latents.float())
    return dlogits, dcodebook.to(codebook.dtype)
