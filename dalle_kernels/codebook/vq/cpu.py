"""The nearest-row lookup in native code: csrc/codebook."""

from __future__ import annotations

import torch

from dalle_kernels.backends import native
from dalle_kernels.backends.choice import Call

_ops = torch.ops.dalle_kernels_cpu


def refuse(call: Call) -> str | None:
    return native.refuse_cpu(call.device, call.dtype)


def describe() -> str:
    return native.instruction_set()


def vq_forward(features: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices, squared distances), as in `reference`."""
    return _ops.vq_forward(features, codebook)


def vq_backward(
    grad_squared_distance: torch.Tensor, features: torch.Tensor, codebook: torch.Tensor, indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dfeatures, dcodebook), as in `reference`; the same bits for any number of threads."""
    return _ops.vq_backward(grad_squared_distance, features, codebook, indices)
