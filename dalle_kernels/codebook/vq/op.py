"""The door to the nearest-row lookup: checks, schemas, shapes, derivative and choice of backend."""

from __future__ import annotations

from typing import Any

import torch

from dalle_kernels.backends.choice import Call, Operation, register
from dalle_kernels.backends.library import define, differentiate
from dalle_kernels.checks import rows_contiguous
from dalle_kernels.codebook.checks import check_pair, describe, refuse_nan

OPERATION = Operation(
    "vq_lookup",
    (
        ("triton", "dalle_kernels.codebook.vq.triton"),
        ("cpu", "dalle_kernels.codebook.vq.cpu"),
        ("reference", "dalle_kernels.codebook.vq.reference"),
    ),
    describe,
)


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
    features, codebook = check_pair("features", features, codebook)
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


register(vq_lookup, OPERATION)


def _forward(features: torch.Tensor, codebook: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    module = OPERATION.choose(backend, Call(features.device, features.dtype, codebook.shape[1]))
    indices, squared_distance = module.vq_forward(features, codebook)
    refuse_nan("features", features, squared_distance)
    return squared_distance, indices


def _forward_fake(features: torch.Tensor, codebook: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    rows = features.shape[0]
    return features.new_empty(rows, dtype=wide), features.new_empty(rows, dtype=torch.int64)


def _backward(
    grad_squared_distance: torch.Tensor,
    features: torch.Tensor,
    codebook: torch.Tensor,
    indices: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    module = OPERATION.choose(backend, Call(features.device, features.dtype, codebook.shape[1]))
    return module.vq_backward(grad_squared_distance, features, codebook, indices)


def _backward_fake(
    grad_squared_distance: torch.Tensor, features: torch.Tensor, codebook: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return features.new_empty(features.shape), codebook.new_empty(codebook.shape)


define(
    "vq_forward(Tensor features, Tensor codebook, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define(
    "vq_backward(Tensor grad_squared_distance, Tensor features, Tensor codebook, Tensor indices, str backend)"
    " -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    features, codebook, ctx.backend = inputs
    ctx.save_for_backward(features, codebook, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: torch.Tensor | None, _indices: None) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None
    features, codebook, indices = ctx.saved_tensors
    return *torch.ops.dalle_kernels.vq_backward(grad.contiguous(), features, codebook, indices, ctx.backend), None


differentiate("vq_forward", _setup, _autograd)
