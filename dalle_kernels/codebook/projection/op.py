"""The door to the codebook's second level: from features straight to latents."""

from __future__ import annotations

from typing import Any

import torch

from dalle_kernels.backends.choice import Call, Operation, register
from dalle_kernels.backends.library import define, differentiate
from dalle_kernels.checks import (
    autocast,
    check_alike,
    check_temperature,
    check_tensor,
    positive_temperature,
    rows_contiguous,
    seed_tensor,
)


def _describe(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, codebook: torch.Tensor, *_: Any, **__: Any
) -> Call:
    return Call(features.device, autocast(features)[0].dtype, codebook.shape[-1])


OPERATION = Operation(
    "gumbel_projection_lookup",
    (
        ("triton", "dalle_kernels.codebook.projection.triton"),
        ("reference", "dalle_kernels.codebook.projection.reference"),
    ),
    _describe,
)


def gumbel_projection_lookup(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: torch.Tensor,
    temperature: float | torch.Tensor,
    hard: bool = False,
    noise: bool = True,
    seed: int | torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gumbel_lookup(features @ weight.T + bias, codebook, ...)` without storing the logits.

    The last 1 x 1 convolution of a dVAE's encoder and the lookup in one: the logits, N x K, are made a tile at a time
    and made again in the backward pass. They stay in float32 between the two, where the two calls would round them to
    the dtype of `features`. Differentiable with respect to `features`, `weight`, `bias` and `codebook`.

    Source: as for `gumbel_lookup`; Ramesh et al. 2021, appendix A.1 for the encoder's last layer.

    Args:
        features: [..., C], float16, bfloat16, float32 or float64.
        weight: [K, C], bias: [K] or None, codebook: [K, D]; dtype and device of `features` (under autocast all are
            cast).
        temperature, hard, noise, seed: as for `gumbel_lookup`; the same seed draws the same noise.
        backend: "auto", "reference" or "triton"; see `explain`.

    Returns:
        latents: [..., D] in the dtype of `features`.
        indices: int64 [...], argmax(logits + g).
        kl: float32 [...] (float64 for float64 features), log K - entropy of softmax(logits), in nats.

    Raises:
        TypeError, ValueError: for wrong shapes, dtypes, devices or a temperature that is not above 0.

    Example:
        >>> features, weight, codebook = torch.randn(2, 16, 24), torch.randn(512, 24), torch.randn(512, 32)
        >>> latents, indices, kl = gumbel_projection_lookup(features, weight, None, codebook, temperature=0.9)
        >>> latents.shape, indices.shape, kl.shape
        (torch.Size([2, 16, 32]), torch.Size([2, 16]), torch.Size([2, 16]))
    """
    check_tensor("features", features)
    check_tensor("weight", weight, rank=2)
    check_tensor("codebook", codebook, rank=2)
    if bias is not None:
        check_tensor("bias", bias, rank=1)
    if features.dim() < 1 or 0 in weight.shape or 0 in codebook.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (features, weight, codebook))
        raise ValueError(f"features, weight, codebook: got shapes {shapes}, wanted at least one channel and one code")
    if weight.shape[1] != features.shape[-1]:
        raise ValueError(f"weight: got {weight.shape[1]} channels, wanted {features.shape[-1]} as features have")
    codes = weight.shape[0]
    if codebook.shape[0] != codes:
        raise ValueError(f"codebook: got {codebook.shape[0]} rows, wanted {codes}, one for each row of weight")
    if bias is not None and bias.shape[0] != codes:
        raise ValueError(f"bias: got {bias.shape[0]} numbers, wanted {codes}, one for each row of weight")
    features, weight, codebook = autocast(features, weight, codebook)
    check_alike("weight", weight, "features", features)
    check_alike("codebook", codebook, "features", features)
    if bias is not None:
        (bias,) = autocast(bias)
        check_alike("bias", bias, "features", features)
    rows = features.shape[:-1]
    latents, indices, kl, *_ = torch.ops.dalle_kernels.gumbel_projection_forward(
        rows_contiguous(features).reshape(-1, features.shape[-1]),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        codebook.contiguous(),
        positive_temperature(temperature, features.device),
        hard or not noise,
        noise,
        seed_tensor(seed, features.device),
        backend,
    )
    return latents.reshape(*rows, codebook.shape[1]), indices.reshape(rows), kl.reshape(rows)


register(gumbel_projection_lookup, OPERATION)


def _forward(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: torch.Tensor,
    temperature: torch.Tensor,
    hard: bool,
    noise: bool,
    seed: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    if features.device.type == "cpu":
        check_temperature(float(temperature))
    module = OPERATION.choose(backend, Call(features.device, features.dtype, codebook.shape[1]))
    latents, *rest = module.projection_forward(features, weight, bias, codebook, temperature, hard, noise, seed)
    return latents.to(features.dtype), *rest


def _forward_fake(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: torch.Tensor,
    temperature: torch.Tensor,
    hard: bool,
    *_: Any,
) -> tuple[torch.Tensor, ...]:
    rows, width = features.shape[0], codebook.shape[1]
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    return (
        features.new_empty(rows, width),
        features.new_empty(rows, dtype=torch.int64),
        *(features.new_empty(rows, dtype=wide) for _ in range(3)),
        features.new_empty((rows, width) if hard else (0,), dtype=wide),
    )


def _backward(
    grad_latents: torch.Tensor | None,
    grad_kl: torch.Tensor | None,
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    module = OPERATION.choose(backend, Call(features.device, features.dtype, codebook.shape[1]))
    saved = (temperature, hard, noise, seed, latents, indices, kl, lse_noisy, lse_clean, mixture)
    dfeatures, dweight, dbias, dcodebook = module.projection_backward(
        grad_latents, grad_kl, features, weight, bias, codebook, *saved
    )
    return dfeatures, dweight, features.new_empty(0) if dbias is None else dbias, dcodebook


def _backward_fake(
    grad_latents: torch.Tensor | None,
    grad_kl: torch.Tensor | None,
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dbias = features.new_empty(0 if bias is None else bias.shape[0])
    return features.new_empty(features.shape), torch.empty_like(weight), dbias, torch.empty_like(codebook)


define(
    "gumbel_projection_forward(Tensor features, Tensor weight, Tensor? bias, Tensor codebook, Tensor temperature,"
    " bool hard, bool noise, Tensor seed, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define(
    "gumbel_projection_backward(Tensor? grad_latents, Tensor? grad_kl, Tensor features, Tensor weight, Tensor? bias,"
    " Tensor codebook, Tensor temperature, bool hard, bool noise, Tensor seed, Tensor latents, Tensor indices,"
    " Tensor kl, Tensor lse_noisy, Tensor lse_clean, Tensor mixture, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    features, weight, bias, codebook, temperature, ctx.hard, ctx.noise, seed, ctx.backend = inputs
    ctx.save_for_backward(features, weight, bias, codebook, temperature, seed, *output)
    ctx.mark_non_differentiable(output[1], *output[3:])
    ctx.set_materialize_grads(False)


def _autograd(
    ctx: Any, grad_latents: torch.Tensor | None, _indices: None, grad_kl: torch.Tensor | None, *_: None
) -> tuple[Any, ...]:
    if grad_latents is None and grad_kl is None:
        return (None,) * 9
    features, weight, bias, codebook, temperature, seed, *kept = ctx.saved_tensors
    dfeatures, dweight, dbias, dcodebook = torch.ops.dalle_kernels.gumbel_projection_backward(
        None if grad_latents is None else grad_latents.contiguous(),
        None if grad_kl is None else grad_kl.contiguous(),
        features,
        weight,
        bias,
        codebook,
        temperature,
        ctx.hard,
        ctx.noise,
        seed,
        *kept,
        ctx.backend,
    )
    return dfeatures, dweight, None if bias is None else dbias, dcodebook, None, None, None, None, None


differentiate("gumbel_projection_forward", _setup, _autograd)
