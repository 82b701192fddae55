"""What backends see of a cache: its tensors, and which decode table says what lies where in them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dalle_kernels.patterns.decode_table import DecodeTable, decode_table_for
from dalle_kernels.patterns.patterns import Pattern


class Store(NamedTuple):
    """The tensors of B rows, of which each `copies` in a row go on from one prompt."""

    keys: torch.Tensor
    """[B, H, L, D], as values."""
    values: torch.Tensor
    shared_keys: torch.Tensor | None = None
    """[B / copies, H, M, D], as shared_values: what the rows of a prompt see of it; None where nothing is shared."""
    shared_values: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    """bool [B, L], True at slots whose key is padding; None where none is."""
    shared_hidden: torch.Tensor | None = None
    """bool [B / copies, M]."""
    scales: torch.Tensor | None = None
    """float32 [B, H, L, 2]: what a slot's int8 key and its int8 value are multiplied by; None where they are floats."""
    shared_scales: torch.Tensor | None = None
    """float32 [B / copies, H, M, 2]."""
    prompt: int = 0
    """Tokens of the prompt, where it is shared."""
    rewind: int = 0

    @property
    def copies(self) -> int:
        return 1 if self.shared_keys is None else self.keys.shape[0] // self.shared_keys.shape[0]

    def table(self, pattern: Pattern, device: torch.device | str = "cpu") -> DecodeTable:
        return decode_table_for(pattern, device, self.prompt, self.rewind)
