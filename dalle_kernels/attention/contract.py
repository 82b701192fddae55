"""What sparse attention asks of its backends; see backends/contract.py."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch

from dalle_kernels.backends.contract import Call, Differentiable
from dalle_kernels.backends.sharding import Axis
from dalle_kernels.patterns.patterns import Pattern


class Inputs(NamedTuple):
    q: torch.Tensor  # [B, H, L, D], the last dimension contiguous
    k: torch.Tensor  # [B, H, S, D], as v; L is S or less
    v: torch.Tensor
    key_padding_mask: torch.Tensor | None  # bool [B, S], True where a key is to be ignored
    scale: float | None  # what q . k is multiplied with; a backend is never given None, which the door makes D ** -0.5
    pattern: Pattern
    softcap: float | None = None  # scaled scores s become softcap tanh(s / softcap)
    query_start: int = 0  # the token that is the first query


class Outputs(NamedTuple):
    out: torch.Tensor  # like q
    lse: torch.Tensor  # [B, H, L], natural, -inf for a query that sees no key


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
    query_start: int = 0


class Grads(NamedTuple):
    out: torch.Tensor | None  # the last dimension contiguous; a backend is never given None
    lse: torch.Tensor | None


class Needs(NamedTuple):
    q: bool
    k: bool
    v: bool


AXES = (
    Axis({"q": 1, "k": 1, "v": 1}, {"out": 1, "lse": 1}),
    Axis({"q": 0, "k": 0, "v": 0, "key_padding_mask": 0}, {"out": 0, "lse": 0}),
    Axis({"q": 2, "k": 2, "v": 2}, {"out": 2, "lse": 2}, exchanged=True),
)

Backend: TypeAlias = Differentiable[Inputs, Outputs, Grads, Kept, Needs]


def call_of(values: Inputs | Kept) -> Call:
    return Call(values.q.device, values.q.dtype, values.q.shape[-1], extras(values.q, values.k, values.softcap))


def extras(q: torch.Tensor, k: torch.Tensor, softcap: float | None) -> tuple[str, ...]:
    """What of a call not every backend has."""
    if softcap is None and q.shape[2] == k.shape[2]:
        return ()
    wanted = {"logit soft cap": softcap is not None, "queries for a part of the tokens": q.shape[2] != k.shape[2]}
    return tuple(name for name, asked in wanted.items() if asked)


def rows_of(values: Inputs | Kept) -> tuple[int, int] | None:
    """(first, stop) of the tokens that are queries, for a schedule; None where all are."""
    count = values.q.shape[2]
    if count == values.k.shape[2]:
        return None
    return values.query_start, values.query_start + count
