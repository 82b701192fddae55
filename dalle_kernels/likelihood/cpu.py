"""The logit-Laplace likelihood in native code: csrc/likelihood. Any layout, every array read once and written once."""

from __future__ import annotations

import torch

from dalle_kernels.backends import native
from dalle_kernels.backends.choice import Call


def refuse(call: Call) -> str | None:
    return native.refuse_cpu(call.device, call.dtype)


def describe() -> str:
    return native.instruction_set()


def forward(pixels: torch.Tensor, mu: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """float32, shape and layout of `pixels`."""
    return torch.ops.dalle_kernels_cpu.logit_laplace_forward(pixels, mu, log_b)


def backward(
    grad: torch.Tensor, pixels: torch.Tensor, mu: torch.Tensor, log_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dmu, dlog_b), like `mu` and `log_b`."""
    return torch.ops.dalle_kernels_cpu.logit_laplace_backward(grad, pixels, mu, log_b)
