"""Which backend serves a call, and why.

The rule: `backend="auto"` takes the first of the device's list below that does not refuse the call. A backend that is
named serves the call or raises with its reason; nothing falls back silently. `explain` tells the choice.

    CPU tensors    cpu, reference
    CUDA tensors   triton, reference        (before them cuda, where its module's `leads` says so)
    others         reference

A GPU backend that does not refuse is checked before it first serves (self_check.py): one whose answers are wrong on
the device at hand refuses from then on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar, cast

from dalle_kernels.backends import native, self_check
from dalle_kernels.backends.contract import Backend, Call

BACKENDS = ("cuda", "triton", "cpu", "reference")
_AUTOMATIC = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}

B = TypeVar("B", bound=Backend[Any, Any])


class Candidate(NamedTuple):
    """What is known of a backend before a call."""

    name: str
    automatic: bool  # whether "auto" considers it on the call's device
    refusal: str | None


@dataclass(frozen=True, eq=False)
class Operation(Generic[B]):
    """One operation's backends, a module each."""

    name: str
    modules: Mapping[str, str]  # backend -> module
    describe: Callable[..., Call]  # the public function's arguments -> Call
    _chosen: dict[tuple[str, Call], B] = field(default_factory=dict, init=False, repr=False)

    def candidates(self, call: Call) -> list[Candidate]:
        """Every backend in the order in which "auto" asks them, those that it never takes last."""
        refusals = {name: self._refusal(name, call) for name in BACKENDS}
        automatic = _AUTOMATIC.get(call.device.type, ("reference",))
        may_lead = call.device.type == "cuda" and refusals["cuda"] is None
        if may_lead and getattr(self.load("cuda"), "leads", lambda _: False)(call):
            automatic = ("cuda", *automatic)
        names = (*automatic, *(name for name in BACKENDS if name not in automatic))
        return [Candidate(name, name in automatic, refusals[name]) for name in names]

    def _refusal(self, backend: str, call: Call) -> str | None:
        if backend not in self.modules:
            return f"there is no {backend} kernel for {self.name}"
        try:
            reason = self.load(backend).refuse(call)
        except ImportError as error:
            return f"it cannot be imported here: {error}"
        if reason is None and (verdict := self_check.known(self.name, backend, call)):
            return self_check.refusal(verdict)
        return reason

    def load(self, backend: str) -> B:
        return cast(B, importlib.import_module(self.modules[backend]))

    def choose(self, backend: str, call: Call) -> B:
        """The module that serves `call`.

        Raises:
            ValueError: for an unknown backend name, or a named backend that cannot serve the call.
        """
        chosen = self._chosen.get((backend, call))
        if chosen is None:
            serving = self._serving(backend, call)
            chosen = self.load(serving)
            if not self_check.pending(self.name, serving, call):
                if len(self._chosen) >= 1024:
                    self._chosen.clear()
                self._chosen[backend, call] = chosen
        return chosen

    def _serving(self, backend: str, call: Call) -> str:
        check_backend(backend)
        candidates = [self._checked(candidate, backend, call) for candidate in self.candidates(call)]
        if backend == "auto":
            serving = first(candidates)
            if serving == "reference" and native.absence() in [
                each.refusal for each in candidates if each.name == "cpu"
            ]:
                native.warn_of_absence()
            return serving
        refusal = next(candidate.refusal for candidate in candidates if candidate.name == backend)
        if refusal is not None:
            raise ValueError(f"backend: {backend!r} cannot serve this {self.name} call: {refusal}")
        return backend

    def _checked(self, candidate: Candidate, backend: str, call: Call) -> Candidate:
        """The candidate after its self-check, which is made, or warned of again, where the choice may fall on it."""
        asked = candidate.automatic if backend == "auto" else candidate.name == backend
        if not asked or not (candidate.refusal or self_check.WRONG).startswith(self_check.WRONG):
            return candidate
        return candidate._replace(refusal=self_check.refuse(self.name, candidate.name, call))


def first(candidates: list[Candidate]) -> str:
    """The one that "auto" takes."""
    return next(candidate.name for candidate in candidates if candidate.automatic and candidate.refusal is None)


def check_backend(backend: str) -> None:
    """`backend` is "auto" or a backend's name; whether it can serve is known only at a call."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wanted 'auto' or one of {', '.join(BACKENDS)}")


_OPERATIONS: dict[Callable[..., Any], Operation[Any]] = {}


def forget_choices() -> None:
    """Makes the next calls choose anew: for whoever changes what a backend can do, as tests do."""
    self_check.forget()
    for operation in _OPERATIONS.values():
        operation._chosen.clear()


def register(function: Callable[..., Any], operation: Operation[Any]) -> None:
    """Lets `explain` answer for the public `function`."""
    _OPERATIONS[function] = operation


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call. Prints as a short table.

    Attributes:
        operation: the operation's name.
        backend: the backend that `backend="auto"` chooses.
        detail: what that backend says of itself (the CPU backend its instruction set), or the self-check of it.
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
        TypeError: for arguments that are no tensors where the operation wants tensors.

    Example:
        >>> q = torch.randn(1, 2, 1280, 64)
        >>> explain(sparse_attention, q, q, q, Row(TokenLayout())).backend in ("cpu", "reference")
        True
    """
    try:
        operation = _OPERATIONS[function]
    except (KeyError, TypeError):  # TypeError: no key at all
        known = ", ".join(entry.name for entry in _OPERATIONS.values())
        raise ValueError(f"function: got {function!r}, wanted one of {known}") from None
    kwargs.pop("backend", None)
    call = operation.describe(*args, **kwargs)
    candidates = operation.candidates(call)
    chosen = first(candidates)
    refusals: dict[str, str] = {}
    for candidate in candidates:
        if candidate.refusal is not None:
            refusals[candidate.name] = candidate.refusal
        elif not candidate.automatic:
            refusals[candidate.name] = f'could serve, when named: backend="{candidate.name}"'
        elif candidate.name != chosen:
            refusals[candidate.name] = f"could serve, but {chosen} comes first"
    say = getattr(operation.load(chosen), "describe", lambda: "")
    detail = say() or self_check.describe(operation.name, chosen, call)
    return Explanation(operation.name, chosen, detail, refusals)
