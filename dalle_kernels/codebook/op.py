"""The door to the codebook: checks, schemas, shapes, derivatives and choice of backend."""

from __future__ import annotations

from typing import Any

import torch

from dalle_kernels.backends import Call, Operation, register
from dalle_kernels.checks import (
    autocast,
    check_alike,
    check_temperature,
    check_tensor,
    positive_temperature,
    rows_contiguous,
    seed_tensor,
)
from dalle_kernels.library import define, differentiate


def _describe(inputs: torch.Tensor, codebook: torch.Tensor, *_: Any, **__: Any) -> Call:
    return Call(inputs.device, autocast(inputs)[0].dtype, codebook.shape[-1])


_MODULES = (
    ("cuda", "dalle_kernels.codebook.cuda"),
    ("triton", "dalle_kernels.codebook.triton_kernels"),
    ("cpu", "dalle_kernels.codebook.cpu"),
    ("reference", "dalle_kernels.codebook.reference"),
)
GUMBEL = Operation("gumbel_lookup", _MODULES, _describe)
VQ = Operation("vq_lookup", _MODULES[1:], _describe)  # the CUDA library has no kernel for it


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
    logits, codebook = _check("logits", logits, codebook)
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


def vq_lookup(
    features: torch.Tensor, codebook: torch.Tensor, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The nearest codebook row of each feature, with the straight-through gradient.

    Source: van den Oord et al. 2017 (VQ-VAE), equations 1 to 3. The squared distance is the codebook loss and the
    commitment loss at once: it is differentiable to both sides, with the index held fixed.

    Args:
        features: [..., D], float16, bfloat16, float32 or float64; computed in float32 inside.
        codebook: [K, D], dtype and device of `features` (under autocast both are cast).
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see `explain`.

    Returns:
        latents: [..., D], codebook[indices]; its gradient passes to `features` unchanged.
        indices: int64 [...], the first of the nearest rows.
        squared_distance: float32 [...] (float64 for float64 features).

    Raises:
        TypeError, ValueError: for wrong shapes, dtypes or devices, or, on the CPU, NaN among the features.

    Example:
        >>> latents, indices, squared_distance = vq_lookup(torch.randn(2, 16, 32), torch.randn(512, 32))
        >>> latents.shape, indices.shape
        (torch.Size([2, 16, 32]), torch.Size([2, 16]))
    """
    features, codebook = _check("features", features, codebook)
    if features.shape[-1] != codebook.shape[1]:
        raise ValueError(f"codebook: got width {codebook.shape[1]}, wanted {features.shape[-1]} as features have")
    rows = features.shape[:-1]
    squared_distance, indices = torch.ops.dalle_kernels.vq_forward(
        rows_contiguous(features).reshape(-1, features.shape[-1]), codebook.contiguous(), backend
    )
    indices = indices.reshape(rows)
    nearest = torch.nn.functional.embedding(indices, codebook.detach())
    # The value is the codebook's row to the last bit, which features + (nearest - features) would not be.
    latents = nearest + (features - features.detach())
    return latents, indices, squared_distance.reshape(rows)


register(gumbel_lookup, GUMBEL)
register(vq_lookup, VQ)


def _check(name: str, inputs: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    check_tensor(name, inputs)
    check_tensor("codebook", codebook, rank=2)
    if inputs.dim() < 1 or 0 in codebook.shape:
        raise ValueError(
            f"{name}, codebook: got shapes {tuple(inputs.shape)}, {tuple(codebook.shape)}, wanted at least one code"
        )
    inputs, codebook = autocast(inputs, codebook)
    check_alike("codebook", codebook, name, inputs)
    return inputs, codebook


def _refuse_nan(name: str, inputs: torch.Tensor, row_result: torch.Tensor) -> None:
    """On the CPU, a NaN in a row's result is traced to the row; on a GPU the host does not wait to look."""
    if row_result.device.type == "cpu" and row_result.isnan().any():
        for row in row_result.isnan().nonzero().flatten().tolist():
            if inputs[row].isnan().any():
                raise ValueError(f"{name}: row {row} holds NaN, wanted numbers")


def _gumbel_forward(
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
    module = GUMBEL.choose(backend, Call(logits.device, logits.dtype, codebook.shape[1]))
    result = module.gumbel_forward(logits, codebook, temperature, hard, noise, seed)
    _refuse_nan("logits", logits, result[2])
    return result


def _gumbel_forward_fake(
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


def _gumbel_backward(
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
    module = GUMBEL.choose(backend, Call(logits.device, logits.dtype, codebook.shape[1]))
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


def _gumbel_backward_fake(
    grad_latents: torch.Tensor | None,
    grad_kl: torch.Tensor | None,
    logits: torch.Tensor,
    codebook: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    return logits.new_empty(logits.shape), codebook.new_empty(codebook.shape)


def _vq_forward(features: torch.Tensor, codebook: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    module = VQ.choose(backend, Call(features.device, features.dtype, codebook.shape[1]))
    indices, squared_distance = module.vq_forward(features, codebook)
    _refuse_nan("features", features, squared_distance)
    return squared_distance, indices


def _vq_forward_fake(features: torch.Tensor, codebook: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    rows = features.shape[0]
    return features.new_empty(rows, dtype=wide), features.new_empty(rows, dtype=torch.int64)


def _vq_backward(
    grad_squared_distance: torch.Tensor,
    features: torch.Tensor,
    codebook: torch.Tensor,
    indices: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    module = VQ.choose(backend, Call(features.device, features.dtype, codebook.shape[1]))
    return module.vq_backward(grad_squared_distance, features, codebook, indices)


def _vq_backward_fake(
    grad_squared_distance: torch.Tensor, features: torch.Tensor, codebook: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return features.new_empty(features.shape), codebook.new_empty(codebook.shape)


define(
    "gumbel_forward(Tensor logits, Tensor codebook, Tensor temperature, bool hard, bool noise, Tensor seed,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gumbel_forward,
    _gumbel_forward_fake,
)
define(
    "gumbel_backward(Tensor? grad_latents, Tensor? grad_kl, Tensor logits, Tensor codebook, Tensor temperature,"
    " bool hard, bool noise, Tensor seed, Tensor latents, Tensor indices, Tensor kl, Tensor lse_noisy,"
    " Tensor lse_clean, Tensor mixture, str backend) -> (Tensor, Tensor)",
    _gumbel_backward,
    _gumbel_backward_fake,
)
define(
    "vq_forward(Tensor features, Tensor codebook, str backend) -> (Tensor, Tensor)",
    _vq_forward,
    _vq_forward_fake,
)
define(
    "vq_backward(Tensor grad_squared_distance, Tensor features, Tensor codebook, Tensor indices, str backend)"
    " -> (Tensor, Tensor)",
    _vq_backward,
    _vq_backward_fake,
)


def _gumbel_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, codebook, temperature, ctx.hard, ctx.noise, seed, ctx.backend = inputs
    ctx.save_for_backward(logits, codebook, temperature, seed, *output)
    ctx.mark_non_differentiable(output[1], *output[3:])
    ctx.set_materialize_grads(False)


def _gumbel_autograd(
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


def _vq_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    features, codebook, ctx.backend = inputs
    ctx.save_for_backward(features, codebook, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _vq_autograd(ctx: Any, grad: torch.Tensor | None, _indices: None) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None
    features, codebook, indices = ctx.saved_tensors
    return *torch.ops.dalle_kernels.vq_backward(grad.contiguous(), features, codebook, indices, ctx.backend), None


differentiate("gumbel_forward", _gumbel_setup, _gumbel_autograd)
differentiate("vq_forward", _vq_setup, _vq_autograd)
