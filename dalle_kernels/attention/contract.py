"""What sparse attention asks of its backends; see backends/contract.py."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch

from dalle_kernels.backends.contract import Call, Differentiable
from dalle_kernels.patterns.patterns import Pattern


class Inputs(NamedTuple):
    q: torch.Tensor  # [B, H, S, D], as k and v, the last dimension contiguous
    k: torch.Tensor
    v: torch.Tensor
    key_padding_mask: torch.Tensor | None  # bool [B, S], True where a key is to be ignored
    scale: float | None  # what q . k is multiplied with; a backend is never given None, which the door makes D ** -0.5
    pattern: Pattern
    softcap: float | None = None  # scaled scores s become softcap tanh(s / softcap)

    @property
    def extras(self) -> tuple[str, ...]:
        return extras(self.softcap)


class Outputs(NamedTuple):
    out: torch.Tensor  # like q
    lse: torch.Tensor  # [B, H, S], natural, -inf for a query that sees no key


class Kept(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    key_padding_mask: torch.Tensor | None
    scale: float | None
    pattern: Pattern
    softcap: float | None = None

    @property
    def extras(self) -> tuple[str, ...]:
        return extras(self.softcap)


class Grads(NamedTuple):
    out: torch.Tensor | None  # the last dimension contiguous; a backend is never given None
    lse: torch.Tensor | None


class Needs(NamedTuple):
    q: bool
    k: bool
    v: bool


Backend: TypeAlias = Differentiable[Inputs, Outputs, Grads, Kept, Needs]


def call_of(values: Inputs | Kept) -> Call:
    return Call(values.q.device, values.q.dtype, values.q.shape[-1], values.extras)


def extras(softcap: float | torch.Tensor | None) -> tuple[str, ...]:
    """What of a call not every backend has."""
    return () if softcap is None else ("logit soft cap",)
