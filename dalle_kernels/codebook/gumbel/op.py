"""The door to the Gumbel-softmax lookup: checks, schemas, shapes, derivative and choice of backend."""

from __future__ import annotations

from typing import Any

import torch

from dalle_kernels.backends.choice import Call, Operation, register
from dalle_kernels.backends.library import define, differentiate
from dalle_kernels.checks import check_temperature, positive_temperature, rows_contiguous, seed_tensor
from dalle_kernels.codebook.checks import check_pair, describe, refuse_nan

OPERATION = Operation(
    "gumbel_lookup",
    (
        ("cuda", "dalle_kernels.codebook.gumbel.cuda"),
        ("triton", "dalle_kernels.codebook.gumbel.triton"),
        ("cpu", "dalle_kernels.codebook.gumbel.cpu"),
        ("reference", "dalle_kernels.codebook.gumbel.reference"),
    ),
    describe,
)


def gumbel_lookup(
    logits: torch.Tensor,
    codebook: torch.Tensor,
    temperature: float | torch.Tensor,
    hard: bool = False,
    noise: bool = True,
    seed: int | torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """softmax((logits + g) / temperature) @ codebook, the sampled index and the KL to uniform, in one pass.

    g is the Gumbel noise that `dalle_kernels.noise` defines, regenerated in the backward pass instead of stored; no
    N x K table is made. Differentiable with respect to `logits` and `codebook`; `temperature` is a constant.

    Source: Jang et al. 2017 (Gumbel-softmax), equations 2 and 3; Ramesh et al. 2021, section 2.1.

    Args:
        logits: [..., K], float16, bfloat16, float32 or float64; computed in float32 inside. Row n of the flattened
            table takes row n of the noise.
        codebook: [K, D], dtype and device of `logits` (under autocast both are cast).
        temperature: tau > 0, a number or a one-element tensor (which a CUDA graph can change between replays).
        hard: straight-through: latents are the sampled row itself, the gradient is that of the soft mixture.
        noise: False for evaluation: the argmax row, without noise (straight-through as well).
        seed: a 64-bit int or one-element int64 tensor; None draws one from torch's generator.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see `explain`.

    Returns:
        latents: [..., D] in the dtype of `logits`.
        indices: int64 [...], argmax(logits + g), the first where several are equal.
        kl: float32 [...] (float64 for float64 logits), log K - entropy of softmax(logits), in nats.

    Raises:
        TypeError, ValueError: for wrong shapes, dtypes, devices, a temperature that is not above 0, or, on the CPU, NaN
            among the logits (on a GPU, where looking would make the host wait, NaN goes through to latents and kl).

    Example:
        >>> latents, indices, kl = gumbel_lookup(torch.randn(2, 16, 512), torch.randn(512, 32), temperature=0.9)
        >>> latents.shape, indices.shape, kl.shape
        (torch.Size([2, 16, 32]), torch.Size([2, 16]), torch.Size([2, 16]))
    """
    logits, codebook = check_pair("logits", logits, codebook)
    if logits.shape[-1] != codebook.shape[0]:
        raise ValueError(
            f"codebook: got {codebook.shape[0]} rows, wanted {logits.shape[-1]}, one for each of the logits' codes"
        )
    rows = logits.shape[:-1]
    latents, indices, kl, *_ = torch.ops.dalle_kernels.gumbel_forward(
        rows_contiguous(logits).reshape(-1, logits.shape[-1]),
        codebook.contiguous(),
        positive_temperature(temperature, logits.device),
        hard or not noise,
        noise,
        seed_tensor(seed, logits.device),
        backend,
    )
    return latents.reshape(*rows, codebook.shape[1]), indices.reshape(rows), kl.reshape(rows)


register(gumbel_lookup, OPERATION)


def _forward(
    logits: torch.Tensor,
    codebook: torch.Tensor,
    temperature: torch.Tensor,
    hard: bool,
    noise: bool,
    seed: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    if logits.device.type == "cpu":
        check_temperature(float(temperature))
    module = OPERATION.choose(backend, Call(logits.device, logits.dtype, codebook.shape[1]))
    result = module.gumbel_forward(logits, codebook, temperature, hard, noise, seed)
    refuse_nan("logits", logits, result[2])
    return result


def _forward_fake(
    logits: torch.Tensor, codebook: torch.Tensor, temperature: torch.Tensor, hard: bool, *_: Any
) -> tuple[torch.Tensor, ...]:
    rows, width = logits.shape[0], codebook.shape[1]
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    per_row = [logits.new_empty(rows, dtype=wide) for _ in range(3)]
    return (
        logits.new_empty(rows, width),
        logits.new_empty(rows, dtype=torch.int64),
        *per_row,
        logits.new_empty((rows, width) if hard else (0,), dtype=wide),
    )


def _backward(
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
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    module = OPERATION.choose(backend, Call(logits.device, logits.dtype, codebook.shape[1]))
    return module.gumbel_backward(
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


def _backward_fake(
    grad_latents: torch.Tensor | None,
    grad_kl: torch.Tensor | None,
    logits: torch.Tensor,
    codebook: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    return logits.new_empty(logits.shape), codebook.new_empty(codebook.shape)


define(
    "gumbel_forward(Tensor logits, Tensor codebook, Tensor temperature, bool hard, bool noise, Tensor seed,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define(
    "gumbel_backward(Tensor? grad_latents, Tensor? grad_kl, Tensor logits, Tensor codebook, Tensor temperature,"
    " bool hard, bool noise, Tensor seed, Tensor latents, Tensor indices, Tensor kl, Tensor lse_noisy,"
    " Tensor lse_clean, Tensor mixture, str backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, codebook, temperature, ctx.hard, ctx.noise, seed, ctx.backend = inputs
    ctx.save_for_backward(logits, codebook, temperature, seed, *output)
    ctx.mark_non_differentiable(output[1], *output[3:])
    ctx.set_materialize_grads(False)


def _autograd(
    ctx: Any,
    grad_latents: torch.Tensor | None,
    _indices: None,
    grad_kl: torch.Tensor | None,
    *_: None,
) -> tuple[Any, ...]:
    if grad_latents is None and grad_kl is None:
        return (None,) * 7
    logits, codebook, temperature, seed, *kept = ctx.saved_tensors
    dlogits, dcodebook = torch.ops.dalle_kernels.gumbel_backward(
        None if grad_latents is None else grad_latents.contiguous(),
        None if grad_kl is None else grad_kl.contiguous(),
        logits,
        codebook,
        temperature,
        ctx.hard,
        ctx.noise,
        seed,
        *kept,
        ctx.backend,
    )
    return dlogits, dcodebook, None, None, None, None, None


differentiate("gumbel_forward", _setup, _autograd)
