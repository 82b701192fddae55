"""The door to the likelihood: checks, schema, shapes, derivative and choice of backend."""

from __future__ import annotations

from typing import Any

import torch

from dalle_kernels.backends.choice import Call, Operation, register
from dalle_kernels.backends.library import define, differentiate
from dalle_kernels.checks import check_alike, check_tensor


def _describe(pixels: torch.Tensor, mu: torch.Tensor, log_b: torch.Tensor) -> Call:
    return Call(mu.device, mu.dtype, mu.shape[-1] if mu.dim() else 1)


OPERATION = Operation(
    "logit_laplace_nll",
    (
        ("triton", "dalle_kernels.likelihood.triton"),
        ("cpu", "dalle_kernels.likelihood.cpu"),
        ("reference", "dalle_kernels.likelihood.reference"),
    ),
    _describe,
)


def logit_laplace_nll(
    pixels: torch.Tensor, mu: torch.Tensor, log_b: torch.Tensor, backend: str = "auto"
) -> torch.Tensor:
    """Negative log-likelihood of pixels under the logit-Laplace distribution; differentiable to `mu` and `log_b`.

    Source: Ramesh et al. 2021, appendix A.3, equation 2: f(x | mu, b) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x)).

    Args:
        pixels: values strictly between 0 and 1, as x -> (1 - 2 eps) x + eps makes them; no gradient goes to them.
        mu, log_b: location and log scale, shape, dtype and device of `pixels`.
        backend: "auto", "reference", "cpu" or "triton"; see `explain`.

    Returns:
        float32 (float64 for float64 inputs), shape of `pixels`, in nats.

    Raises:
        TypeError, ValueError: for tensors that differ in shape, dtype or device.

    Example:
        >>> logit_laplace_nll(torch.full((2, 3), 0.5), torch.zeros(2, 3), torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """
    check_tensor("pixels", pixels)
    for name, tensor in (("mu", mu), ("log_b", log_b)):
        check_tensor(name, tensor)
        check_alike(name, tensor, "pixels", pixels)
        if tensor.shape != pixels.shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted {tuple(pixels.shape)} as pixels have")
    return torch.ops.dalle_kernels.logit_laplace_forward(pixels.detach(), mu, log_b, backend)


register(logit_laplace_nll, OPERATION)


def _forward(pixels: torch.Tensor, mu: torch.Tensor, log_b: torch.Tensor, backend: str) -> torch.Tensor:
    return OPERATION.choose(backend, _describe(pixels, mu, log_b)).forward(pixels, mu, log_b)


def _forward_fake(pixels: torch.Tensor, mu: torch.Tensor, log_b: torch.Tensor, backend: str) -> torch.Tensor:
    return torch.empty_like(pixels, dtype=torch.float64 if mu.dtype == torch.float64 else torch.float32)


def _backward(
    grad: torch.Tensor, pixels: torch.Tensor, mu: torch.Tensor, log_b: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return OPERATION.choose(backend, _describe(pixels, mu, log_b)).backward(grad, pixels, mu, log_b)


def _backward_fake(
    grad: torch.Tensor, pixels: torch.Tensor, mu: torch.Tensor, log_b: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(mu), torch.empty_like(log_b)


define(
    "logit_laplace_forward(Tensor pixels, Tensor mu, Tensor log_b, str backend) -> Tensor",
    _forward,
    _forward_fake,
)
define(
    "logit_laplace_backward(Tensor grad, Tensor pixels, Tensor mu, Tensor log_b, str backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    dmu, dlog_b = torch.ops.dalle_kernels.logit_laplace_backward(grad, *ctx.saved_tensors, ctx.backend)
    return None, dmu, dlog_b, None


differentiate("logit_laplace_forward", _setup_context, _autograd)
