"""The door to the nearest-row lookup: checks, schemas, shapes, derivative and choice of backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dalle_kernels.backends.choice import Operation, register
from dalle_kernels.backends.library import Derivative, Entry
from dalle_kernels.checks import rows_contiguous
from dalle_kernels.codebook.checks import check_pair, describe, gradient_like, refuse_nan
from dalle_kernels.codebook.vq import reference
from dalle_kernels.codebook.vq.contract import Backend, Grads, Inputs, Kept, Needs, Outputs, call_of

if TYPE_CHECKING:
    from dalle_kernels.codebook.vq import cpu, triton

    _BACKENDS: tuple[Backend, ...] = (cpu, triton, reference)

OPERATION: Operation[Backend] = Operation(
    "vq_lookup",
    {
        "triton": "dalle_kernels.codebook.vq.triton",
        "cpu": "dalle_kernels.codebook.vq.cpu",
        "reference": "dalle_kernels.codebook.vq.reference",
    },
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
    squared_distance, indices = _ENTRY(
        Inputs(rows_contiguous(features).reshape(-1, features.shape[-1]), codebook.contiguous()), backend
    )
    indices = indices.reshape(rows)
    nearest = torch.nn.functional.embedding(indices, codebook.detach())
    # The value is the codebook's row to the last bit, which features + (nearest - features) would not be.
    latents = nearest + (features - features.detach())
    return latents, indices, squared_distance.reshape(rows)


register(vq_lookup, OPERATION)


def _forward(backend: Backend, inputs: Inputs) -> Outputs:
    outputs = backend.forward(inputs)
    refuse_nan("features", inputs.features, outputs.squared_distance)
    return outputs


def _forward_fake(inputs: Inputs) -> Outputs:
    features = inputs.features
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    rows = features.shape[0]
    return Outputs(features.new_empty(rows, dtype=wide), features.new_empty(rows, dtype=torch.int64))


def _backward(backend: Backend, grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    assert grads.squared_distance is not None
    return backend.backward(Grads(grads.squared_distance.contiguous()), kept, needs)


_ENTRY = Entry(
    "vq_forward",
    OPERATION,
    Inputs,
    Outputs,
    call_of,
    _forward,
    _forward_fake,
    Derivative("vq_backward", Grads, Kept, Needs, _backward, reference.jvp, gradient_like),
)
