"""The door to the likelihood: checks, schema, shapes, derivative and choice of backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dalle_kernels.backends.choice import Operation, register
from dalle_kernels.backends.contract import Call
from dalle_kernels.backends.library import Derivative, Entry
from dalle_kernels.checks import autocast_to_float32, check_alike, check_tensor
from dalle_kernels.likelihood import reference
from dalle_kernels.likelihood.contract import AXES, Backend, Grads, Inputs, Kept, Needs, Outputs, call_of

if TYPE_CHECKING:
    from dalle_kernels.likelihood import cpu, triton

    _BACKENDS: tuple[Backend, ...] = (cpu, triton, reference)


def _checked(pixels: torch.Tensor, mu: torch.Tensor, log_b: torch.Tensor) -> Inputs:
    check_tensor("pixels", pixels)
    check_tensor("mu", mu)
    check_tensor("log_b", log_b)
    pixels, mu, log_b = autocast_to_float32(pixels, mu, log_b)
    for name, tensor in (("mu", mu), ("log_b", log_b)):
        check_alike(name, tensor, "pixels", pixels)
        if tensor.shape != pixels.shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted {tuple(pixels.shape)} as pixels have")
    return Inputs(pixels.detach(), mu, log_b)


def _describe(pixels: torch.Tensor, mu: torch.Tensor, log_b: torch.Tensor) -> Call:
    return call_of(_checked(pixels, mu, log_b))


OPERATION: Operation[Backend] = Operation(
    "logit_laplace_nll",
    {
        "triton": "dalle_kernels.likelihood.triton",
        "cpu": "dalle_kernels.likelihood.cpu",
        "reference": "dalle_kernels.likelihood.reference",
    },
    _describe,
)


def logit_laplace_nll(
    pixels: torch.Tensor, mu: torch.Tensor, log_b: torch.Tensor, backend: str = "auto"
) -> torch.Tensor:
    """Negative log-likelihood of pixels under the logit-Laplace distribution; differentiable to `mu` and `log_b`.

    Source: Ramesh et al. 2021, appendix A.3, equation 2: f(x | mu, b) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x)).

    Args:
        pixels: values strictly between 0 and 1, as x -> (1 - 2 eps) x + eps makes them; no gradient goes to them.
        mu, log_b: location and log scale, shape, dtype and device of `pixels` (under autocast all are cast to float32,
            as for torch's own losses).
        backend: "auto", "reference", "cpu" or "triton"; see `explain`.

    Returns:
        float32 (float64 for float64 inputs), shape of `pixels`, in nats.

    Raises:
        TypeError, ValueError: for tensors that differ in shape, dtype or device.

    Example:
        >>> logit_laplace_nll(torch.full((2, 3), 0.5), torch.zeros(2, 3), torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """
    return _ENTRY(_checked(pixels, mu, log_b), backend).nll


register(logit_laplace_nll, OPERATION)


def _forward(backend: Backend, inputs: Inputs) -> Outputs:
    return backend.forward(inputs)


def _forward_fake(inputs: Inputs, _: str) -> Outputs:
    wide = torch.float64 if inputs.mu.dtype == torch.float64 else torch.float32
    return Outputs(torch.empty_like(inputs.pixels, dtype=wide))


def _backward(backend: Backend, grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    return backend.backward(grads, kept, needs)


_ENTRY = Entry(
    "logit_laplace_forward",
    OPERATION,
    Inputs,
    Outputs,
    call_of,
    _forward,
    _forward_fake,
    AXES,
    Derivative("logit_laplace_backward", Grads, Kept, Needs, _backward, reference.jvp),
)
