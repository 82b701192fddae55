"""The reference model with its attention exchanged: what its rest costs, and what dense attention would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_kernels import KVCache, Pattern
from dalle_kernels.nn import SparseSelfAttention


@lru_cache(maxsize=16)
def _mask(pattern: Pattern, length: int, device: torch.device) -> Tensor:
    return pattern.mask(length).to(device)


class _Dense(SparseSelfAttention):
    """What the reference model's layers become where another function attends in them."""

    attend: ClassVar[Callable[[Tensor, Tensor, Tensor, Pattern], Tensor]]

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        q, k, v = self._qkv(x)
        if cache is not None:
            cache.prefill(k, v, key_padding_mask)
        return self._join(type(self).attend(q, k, v, self.pattern))


def _sdpa_masked(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_mask(pattern, q.shape[2], q.device))


class SdpaMasked(_Dense):
    """The same answer by SDPA with the pattern's mask; step by step over full caches."""

    attend = staticmethod(_sdpa_masked)

    def step(self, x: Tensor, cache: KVCache, position: int | Tensor) -> Tensor:
        q, k, v = self._qkv(x)
        here = torch.as_tensor(position, device=x.device).reshape(1)
        cache.keys.index_copy_(2, here, k)
        cache.values.index_copy_(2, here, v)
        seen = _mask(cache.pattern, cache.pattern.length, q.device).index_select(0, here)
        return self._join(F.scaled_dot_product_attention(q, cache.keys, cache.values, attn_mask=seen))

    def new_cache(self, *arguments: Any, **named: Any) -> KVCache:
        return FullCache(super().new_cache(*arguments, **named))


class SdpaCausal(_Dense):
    """Dense causal attention in every layer: another model, and SDPA's fastest path."""

    attend = staticmethod(lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v, is_causal=True))


class NoAttention(_Dense):
    """No attention at all, but a use of each input: what is left of a step."""

    attend = staticmethod(lambda q, k, v, _: v + 0 * (q + k))


class FullCache(KVCache):
    """Keys and values of every position, as a model without decode tables keeps them."""

    def __init__(self, like: KVCache) -> None:
        self.pattern, self.copies = like.pattern, like.copies
        batch, heads, _, width = like.keys.shape
        self.keys = like.keys.new_zeros(batch, heads, like.pattern.length, width)
        self.values = torch.zeros_like(self.keys)

    def prefill(self, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> None:
        assert key_padding_mask is None
        self.keys[:, :, : k.shape[2]] = k.repeat_interleave(self.copies, 0)
        self.values[:, :, : v.shape[2]] = v.repeat_interleave(self.copies, 0)


@contextmanager
def attention_of(model: nn.Module, kind: type[SparseSelfAttention]) -> Iterator[None]:
    """The model's attention layers are of `kind` inside; the library's own is `SparseSelfAttention`."""
    layers = [module for module in model.modules() if isinstance(module, SparseSelfAttention)]
    before = [layer.__class__ for layer in layers]
    for layer in layers:
        layer.__class__ = kind
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.__class__ = own


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Under which a model of float32 weights computes in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
