"""The Gumbel lookup by the CUDA kernels of csrc/codebook."""

from __future__ import annotations

import torch

from dalle_kernels.backends import cuda_library
from dalle_kernels.backends.contract import Call
from dalle_kernels.codebook.gumbel.contract import Grads, Inputs, Kept, Needs, Outputs
from dalle_kernels.noise import on_device

_WIDTHS = (32, 64, 128, 256)  # as csrc/codebook/gumbel_forward_kernel.cuh has them
_ROWS = 256  # of the table; fewer are not worth another block of the backward


def refuse(call: Call) -> str | None:
    if reason := cuda_library.refuse(call.device, call.dtype, (torch.bfloat16, torch.float16, torch.float32)):
        return reason
    widths = _WIDTHS[:3] if call.dtype == torch.float32 else _WIDTHS  # terms of wider rows leave no registers
    if call.width not in widths:
        return f"it takes {call.dtype} codebooks of widths {', '.join(map(str, widths))}, not {call.width}"
    needed, there = _backward_bytes(call.width, call.dtype), cuda_library.shared_memory(call.device, 1)
    if needed > there:
        return f"its backward needs {needed} bytes of shared memory a block at this width and dtype, here are {there}"
    return None


def _group(width: int, dtype: torch.dtype) -> int:
    """Codes of a step: kStepCodes of csrc/codebook/codes.cuh."""
    return 128 if width <= 128 and dtype.itemsize == 2 else 64


def _backward_bytes(width: int, dtype: torch.dtype) -> int:
    """Backward::kSharedBytes of csrc/codebook/gumbel_backward_kernel.cuh: codes, one or two tiles of dL's rows, y."""
    codes, pitch = _group(width, dtype), 2 * width + 16
    terms = 1 if dtype.itemsize == 2 else 3
    stages = 2 if width <= 128 and terms == 1 else 1
    return terms * (codes * pitch + stages * 128 * pitch + 128 * (2 * codes + 16))


def _terms(tensor: torch.Tensor) -> torch.Tensor:
    """[terms, ...], what products read: float32 as three bfloat16 tensors whose sum it is, others as they are."""
    if tensor.dtype != torch.float32:
        return tensor[None]
    first = tensor.bfloat16()
    second = (tensor - first).bfloat16()
    return torch.stack([first, second, (tensor - first - second).bfloat16()])


def forward(inputs: Inputs) -> Outputs:
    logits, codebook, temperature, hard, noise, seed, row_offset = inputs
    temperature, key = on_device(temperature, seed, row_offset, logits.device)
    rows, width = logits.shape[0], codebook.shape[1]
    latents = torch.empty((rows, width), dtype=logits.dtype, device=logits.device)
    indices = torch.empty(rows, dtype=torch.int64, device=logits.device)
    kl, maximum, log_noisy, log_clean = torch.empty((4, rows), dtype=torch.float32, device=logits.device).unbind()
    mixture = torch.empty((rows, width) if hard else 0, dtype=torch.float32, device=logits.device)
    if rows:
        codebook = cuda_library.aligned(codebook)
        cuda_library.operations().gumbel_forward(
            logits,
            codebook,
            _terms(codebook),
            temperature,
            hard,
            noise,
            key,
            latents,
            indices,
            kl,
            maximum,
            log_noisy,
            log_clean,
            mixture,
        )
    return Outputs(latents, indices, kl, maximum, log_noisy, log_clean, mixture)


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    grad_latents, grad_kl = grads
    logits, codebook, temperature, hard, noise, seed, row_offset, *made = kept
    latents, indices, kl, maximum, log_noisy, log_clean, mixture = made
    temperature, key = on_device(temperature, seed, row_offset, logits.device)
    rows, codes = logits.shape
    delta = partial = None
    # A block walks over its codes' column of the logits, or a share of its rows where columns are few.
    columns = -(-codes // _group(codebook.shape[1], codebook.dtype))
    parts = max(1, min(cuda_library.multiprocessors(logits.device) // columns, rows // _ROWS))
    through_latents = needs.codebook and grad_latents is not None
    if grad_latents is not None:
        delta = (grad_latents.float() * (mixture if hard else latents)).sum(-1)
    if through_latents:
        partial = torch.empty((parts, *codebook.shape), dtype=torch.float32, device=logits.device)
    dlogits = torch.empty((rows, codes), dtype=logits.dtype, device=logits.device) if needs.logits else None
    if rows and (needs.logits or through_latents):
        cuda_library.operations().gumbel_backward(
            None if grad_latents is None else _terms(cuda_library.aligned(grad_latents)),
            grad_kl,
            logits,
            _terms(cuda_library.aligned(codebook)),
            temperature,
            noise,
            key,
            kl,
            maximum,
            log_noisy,
            log_clean,
            delta,
            indices if hard and grad_latents is not None else None,
            parts,
            dlogits,
            partial,
        )
    if not needs.codebook:
        return dlogits, None
    if partial is None or not rows:
        return dlogits, torch.zeros_like(codebook)
    return dlogits, partial.sum(0).to(codebook.dtype)
