"""Which backend serves a call, and why.

The rule: `backend="auto"` takes the first of the device's list below that does not refuse the call. A backend that is
named serves the call or raises with its reason; nothing falls back silently. `explain` tells the choice.

    CPU tensors    cpu, reference
    CUDA tensors   triton, reference        (cuda joins where a measurement shows that it beats triton)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch

BACKENDS = ("cuda", "triton", "cpu", "reference")
_AUTOMATIC = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}


class Call(NamedTuple):
    """What a backend looks at before it accepts a call."""

    device: torch.device
    dtype: torch.dtype
    width: int  # head dimension, codebook width or vocabulary, as the operation says
    extras: tuple[str, ...] = ()  # what of the call not every backend has, in words


@dataclass(frozen=True)
class Operation:
    """One operation's backends: a module each, with `refuse(call)` (a reason or None) and its functions."""

    name: str
    modules: tuple[tuple[str, str], ...]  # (backend, module)
    describe: Callable[..., Call]  # the public function's arguments -> Call

    def refusal(self, backend: str, call: Call) -> str | None:
        """Why `backend` cannot serve `call`, or None."""
        module = dict(self.modules).get(backend)
        if module is None:
            return f"there is no {backend} kernel for {self.name}"
        try:
            loaded = importlib.import_module(module)
        except ImportError as error:
            return f"it cannot be imported here: {error}"
        return loaded.refuse(call)

    def choose(self, backend: str, call: Call) -> ModuleType:
        """The module that serves `call`.

        Raises:
            ValueError: for an unknown backend name, or a named backend that cannot serve the call.
        """
        return _choose(self, backend, call)


def check_backend(backend: str) -> None:
    """`backend` is "auto" or a backend's name; whether it can serve is known only at a call."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wanted 'auto' or one of {', '.join(BACKENDS)}")


@lru_cache(maxsize=1024)
def _choose(operation: Operation, backend: str, call: Call) -> ModuleType:
    check_backend(backend)
    if backend == "auto":
        candidates = _AUTOMATIC.get(call.device.type, ("reference",))
        backend = next(name for name in candidates if operation.refusal(name, call) is None)
    elif reason := operation.refusal(backend, call):
        raise ValueError(f"backend: {backend!r} cannot serve this {operation.name} call: {reason}")
    return importlib.import_module(dict(operation.modules)[backend])


def forget_choices() -> None:
    """Makes the next calls choose anew: for whoever changes what a backend can do, as tests do."""
    _choose.cache_clear()


_OPERATIONS: dict[Callable[..., Any], Operation] = {}


def register(function: Callable[..., Any], operation: Operation) -> None:
    """Lets `explain` answer for the public `function`."""
    _OPERATIONS[function] = operation


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call. Prints as a short table.

    Attributes:
        operation: the operation's name.
        backend: the backend that `backend="auto"` chooses.
        detail: what that backend says of itself (the CPU backend its instruction set).
        refusals: for every other backend, why it does not serve the call.
    """

    operation: str
    backend: str
    detail: str
    refusals: dict[str, str]

    def __str__(self) -> str:
        chosen = f"{self.operation}: {self.backend}" + (f" ({self.detail})" if self.detail else "")
        return "\n".join([chosen, *(f"  {name}: {reason}" for name, reason in self.refusals.items())])


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would serve `function(*args, **kwargs)` under "auto", and what the others lack.

    Args:
        function: a public operation of this library.
        args, kwargs: the arguments of the call in question; nothing is computed.

    Raises:
        ValueError: if `function` is not an operation of this library.

    Example:
        >>> q = torch.randn(1, 2, 1280, 64)
        >>> explain(sparse_attention, q, q, q, Row(TokenLayout())).backend in ("cpu", "reference")
        True
    """
    operation = _OPERATIONS.get(function)
    if operation is None:
        known = ", ".join(entry.name for entry in _OPERATIONS.values())
        raise ValueError(f"function: got {function!r}, wanted one of {known}")
    kwargs.pop("backend", None)
    call = operation.describe(*args, **kwargs)
    automatic = _AUTOMATIC.get(call.device.type, ("reference",))
    chosen: str | None = None
    refusals: dict[str, str] = {}
    for name in (*automatic, *(name for name in BACKENDS if name not in automatic)):
        reason = operation.refusal(name, call)
        if reason is None and chosen is None:
            chosen = name
        elif reason is not None:
            refusals[name] = reason
        elif name in automatic:
            refusals[name] = f"could serve, but {chosen} comes first"
        else:
            refusals[name] = f'could serve, when named: backend="{name}"'
    assert chosen is not None, "the reference backend serves every call"
    module = operation.choose(chosen, call)
    detail = module.describe() if hasattr(module, "describe") else ""
    return Explanation(operation.name, chosen, detail, refusals)
