"""Records of tensors that move to a device together, and tensors that outlive the mode they were first asked for in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, ParamSpec, Self, TypeVar, cast

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
T = TypeVar("T")


def remembered(maxsize: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """`functools.lru_cache` for functions that make tensors: they are made as if no mode and no transform were on.

    Without that, a table first asked for under FakeTensorMode, torch.export, inference mode, `torch.device("meta")` or
    a transform of torch.func would stay fake, or belong to the transform, for every later call of the process.
    """

    def remember(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def make(*args: P.args, **kwargs: P.kwargs) -> T:
            with (
                temporarily_clear_interpreter_stack(),
                _disable_current_modes(),
                torch._C.DisableTorchFunction(),
                torch.inference_mode(False),
            ):
                return function(*args, **kwargs)

        return cast(Callable[P, T], functools.lru_cache(maxsize)(make))

    return remember


class OnDevice:
    """For dataclasses: the fields that are tensors, or such records, share a device."""

    def to(self, device: torch.device | str) -> Self:
        """The same record with its tensors on `device`."""
        moved: dict[str, Any] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, (torch.Tensor, OnDevice)):
                moved[field.name] = value.to(device)
        return replace(self, **moved)  # type: ignore[type-var]
