"""The torch.library namespace `dalle_kernels::`, and how a room adds an operation to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("dalle_kernels", "FRAGMENT")


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines the operation of `schema`, served on CPU and CUDA by `kernel` and on fake tensors by `fake`."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, kernel, device)
    torch.library.register_fake(f"dalle_kernels::{name}", fake, lib=_LIBRARY)


def differentiate(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Gives the operation its derivative; `backward` calls another operation of this library."""
    torch.library.register_autograd(f"dalle_kernels::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
