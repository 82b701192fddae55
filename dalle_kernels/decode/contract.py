"""What decoding asks of its backends; see backends/contract.py.

A backend changes the tensors of `WRITTEN` in place, but for `lengths`, which are the door's to check and to count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch

from dalle_kernels.backends import contract
from dalle_kernels.backends.contract import Call
from dalle_kernels.patterns.decode_table import DecodeTable, decode_table_for
from dalle_kernels.patterns.patterns import Pattern

WRITTEN = ("keys", "values", "hidden", "scales", "lengths")


class Inputs(NamedTuple):
    q: torch.Tensor  # [B, n H, G, D], the last dimension contiguous; each n heads in a row see one of k
    k: torch.Tensor  # [B, H, G, D], as v
    v: torch.Tensor
    keys: torch.Tensor  # [B, H, L, D], as values: what the rows see, into which k and v go
    values: torch.Tensor
    position: int | torch.Tensor  # of the first token; int64, 0-dim or [B]
    pattern: Pattern
    scale: float | None = None  # what the scores are multiplied by; D ** -0.5 where None
    softcap: float | None = None  # scaled scores s become softcap tanh(s / softcap)
    # What each B / P rows see of the prompt they share, [P, H, M, D]; None where the table has no part for one either.
    shared_keys: torch.Tensor | None = None
    shared_values: torch.Tensor | None = None
    hidden: torch.Tensor | None = None  # bool [B, L], True at slots whose key is padding; None where none is
    shared_hidden: torch.Tensor | None = None  # bool [P, M]
    scales: torch.Tensor | None = None  # float32 [B, H, L, 2]: what a slot's int8 key and int8 value are multiplied by
    shared_scales: torch.Tensor | None = None  # float32 [P, H, M, 2]
    lengths: torch.Tensor | None = None  # int64 [B] on the CPU, the tokens that each row holds
    prompt: int = 0  # tokens of the prompt, where it is shared
    rewind: int = 0  # by how many tokens more than one the cache can always go back

    @property
    def factor(self) -> float:
        """What the scores are multiplied by."""
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def copies(self) -> int:
        """Rows that go on from one prompt."""
        return 1 if self.shared_keys is None else self.keys.shape[0] // self.shared_keys.shape[0]

    def table(self, device: torch.device | str = "cpu") -> DecodeTable:
        """What lies where in the cache."""
        return decode_table_for(self.pattern, device, self.prompt, self.rewind)


class Outputs(NamedTuple):
    out: torch.Tensor  # like q


def one_by_one(step: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> Outputs:
    """The tokens in turn, each by `step`: a later one may take an earlier one's slot."""
    tokens = inputs.q.shape[2]
    if tokens == 1:
        return Outputs(step(inputs))
    steps = zip(*(tensor.split(1, 2) for tensor in inputs[:3]), strict=True)
    parts = (inputs._replace(q=q, k=k, v=v, position=inputs.position + token) for token, (q, k, v) in enumerate(steps))
    return Outputs(torch.cat([step(part) for part in parts], 2))


Backend: TypeAlias = contract.Backend[Inputs, Outputs]


def call_of(inputs: Inputs) -> Call:
    by_row = isinstance(inputs.position, torch.Tensor) and inputs.position.dim() > 0
    q = inputs.q
    return Call(q.device, q.dtype, q.shape[-1], extras(inputs, by_row))


def extras(inputs: Inputs, by_row: bool) -> tuple[str, ...]:
    """What of a call not every backend has."""
    asked = (
        (inputs.shared_keys is not None, "shared prompts"),
        (inputs.hidden is not None or inputs.shared_hidden is not None, "padding"),
        (by_row, "positions that differ by row"),
        (inputs.softcap is not None, "logit soft cap"),
        (inputs.scales is not None, "eight-bit caches"),
        (inputs.q.shape[1] != inputs.keys.shape[1], "grouped heads"),
    )
    return tuple([name for present, name in asked if present])
