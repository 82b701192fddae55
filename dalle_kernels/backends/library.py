"""The torch.library namespace `dalle_kernels::`, and how a room adds an operation to it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("dalle_kernels", "FRAGMENT")


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines the operation of `schema`, served on CPU and CUDA by `kernel` and on fake tensors by `fake`."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CPU")
    _LIBRARY.impl(name, _where_the_tensors_are(kernel), "CUDA")
    torch.library.register_fake(f"dalle_kernels::{name}", fake, lib=_LIBRARY)


def _where_the_tensors_are(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` with its first tensor's device current: that is where launches go, whatever they are given."""

    @functools.wraps(kernel)
    def guarded(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        if device.index == torch.cuda.current_device():
            return kernel(*args)
        with torch.cuda.device(device):
            return kernel(*args)

    return guarded


class _Once(torch.autograd.Function):
    """A gradient as it is, whose own derivative is an error where it would otherwise be taken for zero."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: torch.Tensor, *_saved: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{ctx.name}: asked for a second derivative, which it does not have")


def differentiate(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Gives the operation its first derivative; `backward` calls another operation of this library."""

    def first(ctx: Any, *grads: Any) -> Any:
        gradients = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return gradients
        return tuple(x if x is None else _Once.apply(name, x, *ctx.saved_tensors) for x in gradients)

    torch.library.register_autograd(f"dalle_kernels::{name}", first, setup_context=setup_context, lib=_LIBRARY)
