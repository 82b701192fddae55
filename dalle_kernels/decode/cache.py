"""The rolling cache of keys and values that decoding reads."""

from __future__ import annotations

import torch

from dalle_kernels.checks import FLOATS, check_alike, check_tensor
from dalle_kernels.patterns.decode_table import decode_table_for
from dalle_kernels.patterns.patterns import Pattern


class KVCache:
    """Keys and values of the tokens so far, no more of them than `pattern` can still see.

    A row pattern keeps text_length + columns + 1 entries, an 11 x 11 convolution text_length + 5 columns + 6; a
    column pattern keeps its columns. `decode_attention` writes into it; `prefill` takes a prompt at once.

    Args:
        pattern: the layer's pattern; no query of it may see a later key.
        batch, heads, head_dim: B, H and D of the layer.
        dtype, device: of the tensors to come; torch's defaults where None.

    Attributes:
        keys, values: [B, H, L, D], L slots. Others of that L may take their place, as for a new order of the batch.

    Raises:
        ValueError: for sizes below 1, a dtype that is not floating point, or a pattern that is not causal.

    Example:
        >>> KVCache(Row(TokenLayout(256, (32, 32))), batch=1, heads=2, head_dim=64).keys.shape
        torch.Size([1, 2, 289, 64])
    """

    def __init__(
        self,
        pattern: Pattern,
        batch: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(pattern, Pattern):
            raise TypeError(f"pattern: got {type(pattern).__name__}, wanted a Pattern")
        for name, value in (("batch", batch), ("heads", heads), ("head_dim", head_dim)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, wanted an int >= 1")
        if dtype is not None and dtype not in FLOATS:
            raise ValueError(f"dtype: got {dtype}, wanted a floating-point dtype")
        self.pattern = pattern
        self._slots = decode_table_for(pattern).cache_length
        self.keys = torch.zeros((batch, heads, self._slots, head_dim), dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)

    def check(self) -> None:
        """Keys and values are still a pair that `pattern` can use.

        Raises:
            TypeError, ValueError: if tensors in their place differ in shape, dtype or device, or lack slots.
        """
        keys, values = self.keys, self.values
        if keys.dim() != 4 or keys.shape[2] != self._slots:
            raise ValueError(f"cache.keys: got shape {tuple(keys.shape)}, wanted [B, H, {self._slots}, D]")
        if values.shape != keys.shape:
            raise ValueError(f"cache.values: got shape {tuple(values.shape)}, wanted {tuple(keys.shape)} as keys has")
        check_alike("cache.values", values, "cache.keys", keys)

    def prefill(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Takes the keys and values of positions 0 to n - 1: what decoding those tokens one by one would leave.

        Args:
            k, v: [B, H, n, D], dtype and device of the cache.
        """
        self.check()
        for name, tensor in (("k", k), ("v", v)):
            check_tensor(name, tensor, rank=4)
            check_alike(name, tensor, "the cache", self.keys)
            batch, heads, _, width = self.keys.shape
            if tensor.shape[:2] != (batch, heads) or tensor.shape[3] != width or tensor.shape[2] != k.shape[2]:
                wanted = f"({batch}, {heads}, n, {width}), n alike for k and v"
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted {wanted}")
        if k.shape[2] > self.pattern.length:
            raise ValueError(f"k: got {k.shape[2]} tokens, wanted at most {self.pattern.length}")
        slots = decode_table_for(self.pattern).slot[: k.shape[2]].tolist()
        last = {slot: position for position, slot in enumerate(slots)}  # a later token takes over the slot
        to = torch.tensor(list(last), dtype=torch.int64, device=self.keys.device)
        token = torch.tensor(list(last.values()), dtype=torch.int64, device=self.keys.device)
        self.keys[:, :, to] = k.detach()[:, :, token]
        self.values[:, :, to] = v.detach()[:, :, token]
