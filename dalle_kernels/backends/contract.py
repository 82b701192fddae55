"""What an operation asks of a backend: mypy holds every backend's module to it.

A room's `contract.py` has the operation's NamedTuples, each stated once:

- `Inputs`: what a forward is given,
- `Outputs`: what it gives,
- `Kept`: those of both that its backward reads,
- `Grads`: a loss's derivatives with respect to the differentiable outputs, None where there is none,
- `Needs`: which inputs' derivatives are asked for.

The fields of `Kept`, `Grads` and `Needs` are called as those of `Inputs` and `Outputs` that they belong to. From them
`library.py` reads the schemas, what autograd saves and what it hands back.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar

import torch

InputsT = TypeVar("InputsT", contravariant=True)
OutputsT = TypeVar("OutputsT", covariant=True)
GradsT = TypeVar("GradsT", contravariant=True)
KeptT = TypeVar("KeptT", contravariant=True)
NeedsT = TypeVar("NeedsT", contravariant=True)


class Call(NamedTuple):
    """What a backend looks at before it accepts a call."""

    device: torch.device
    dtype: torch.dtype
    width: int  # head dimension, codebook width or vocabulary, as the operation says
    extras: tuple[str, ...] = ()  # what of the call not every backend has, in words


class Backend(Protocol[InputsT, OutputsT]):
    """A module that serves an operation. It may also have `describe()`, what it says of itself in `explain`."""

    def refuse(self, call: Call) -> str | None:
        """Why it cannot serve `call`, or None."""

    def forward(self, inputs: InputsT) -> OutputsT: ...


class Differentiable(Backend[InputsT, OutputsT], Protocol[InputsT, OutputsT, GradsT, KeptT, NeedsT]):
    """A backend of an operation that has a derivative."""

    def backward(self, grads: GradsT, kept: KeptT, needs: NeedsT) -> tuple[torch.Tensor | None, ...]:
        """The gradients of the inputs in `needs`, in its order; None for those not asked for."""
