"""Records of tensors that move to a device together, and tensors that outlive what they were first asked for in: a
mode, a transform, a CUDA graph's memory pool."""

from __future__ import annotations

import functools
import inspect
import threading
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

    An argument `device` reaches the function as a string. A CUDA graph that is being captured reads at each replay what
    it was given: that stays for good, even if it is no longer remembered.
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

        cached = functools.lru_cache(maxsize)(make)
        signature = inspect.signature(function)
        names = list(signature.parameters)
        if "device" not in names:
            return cast(Callable[P, T], cached)
        place = names.index("device")

        @functools.wraps(function)
        def keep(*args: Any, **kwargs: Any) -> T:
            if kwargs or len(args) < len(names):  # however it is called, it is remembered once
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                args = bound.args
            device = str(args[place])
            record = cached(*args[:place], device, *args[place + 1 :])
            if device != "cpu" and capturing():
                _captured[id(record)] = record
            return record

        keep.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
        return cast(Callable[P, T], keep)

    return remember


_captured: dict[int, object] = {}


def has_graphs(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


def capturing() -> bool:
    """Whether the current stream's work is being captured in a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def settled(device: torch.device | str, make: Callable[[], T]) -> T:
    """What `make` makes on `device`, in memory that no CUDA graph's pool has a hand in: for whatever is kept.

    While torch.compile(mode="reduce-overhead") warms a graph up, all that its thread allocates is taken from the
    graph's pool, and what is still alive afterwards without being an output is an error; in a pool that the caller
    set, it would be overwritten. Another thread's allocations are not. It waits for its work, so that any stream may
    read what it made.

    Raises:
        RuntimeError: under a capture, which takes no copies from the host.
    """
    if not has_graphs(device):
        return make()
    if capturing():
        raise RuntimeError(
            f"a table that this call reads is not on {device} yet, and cannot be copied there while a CUDA graph is"
            " captured: make the same call once before the capture"
        )
    made: list[T] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with torch.cuda.device(device):
                made.append(make())
                torch.cuda.current_stream().synchronize()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=work, name="dalle_kernels.settled")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return made[0]


class OnDevice:
    """For dataclasses: the fields that are tensors, or such records, share a device."""

    def to(self, device: torch.device | str) -> Self:
        """The same record with its tensors on `device`, where they may be kept: see `settled`."""
        return settled(device, lambda: self._moved(device))

    def _moved(self, device: torch.device | str) -> Self:
        moved: dict[str, Any] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                moved[field.name] = value.to(device)
            elif isinstance(value, OnDevice):
                moved[field.name] = value._moved(device)
        return replace(self, **moved)  # type: ignore[type-var]
