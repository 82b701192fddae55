"""The reference model with its attention exchanged: what its rest costs, and what dense attention would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_kernels import KVCache, Pattern


@lru_cache(maxsize=16)
def _mask(pattern: Pattern, length: int, device: torch.device) -> Tensor:
    return pattern.mask(length).to(device)


def sdpa_masked(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, **_: Any) -> Tensor:
    """The same answer as `sparse_attention`, by SDPA with the pattern's mask."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_mask(pattern, q.shape[2], q.device))


def sdpa_causal(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, **_: Any) -> Tensor:
    """Dense causal attention in every layer: another model, and SDPA's fastest path."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def nothing(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, **_: Any) -> Tensor:
    """No attention at all, but a use of each input: what is left of a step."""
    return v + 0 * (q + k)


@contextmanager
def attention_by(function: Callable[..., Tensor] | None) -> Iterator[None]:
    """Every `SparseSelfAttention` calls `function` instead of `sparse_attention`; None leaves it."""
    if function is None:
        yield
    else:
        with mock.patch("dalle_kernels.nn.sparse_attention", function):
            yield


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


def sdpa_decode(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, position: Tensor, **_: Any) -> Tensor:
    """One token by SDPA over a full cache and its row of the mask."""
    here = position.reshape(1)
    cache.keys.index_copy_(2, here, k)
    cache.values.index_copy_(2, here, v)
    seen = _mask(cache.pattern, cache.pattern.length, q.device).index_select(0, here)
    return F.scaled_dot_product_attention(q, cache.keys, cache.values, attn_mask=seen)


@contextmanager
def decoding_by_sdpa() -> Iterator[None]:
    """`SparseSelfAttention` keeps full caches and decodes by SDPA."""
    from dalle_kernels.nn import SparseSelfAttention

    new_cache = SparseSelfAttention.new_cache

    def full(self: Any, *arguments: Any, **named: Any) -> FullCache:
        return FullCache(new_cache(self, *arguments, **named))

    with (
        mock.patch("dalle_kernels.nn.decode_attention", sdpa_decode),
        mock.patch("dalle_kernels.nn.sparse_attention", sdpa_masked),
        mock.patch.object(SparseSelfAttention, "new_cache", full),
    ):
        yield
