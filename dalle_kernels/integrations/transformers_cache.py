"""A cache for transformers that keeps what patterns can still see, where its own keep every key."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import create_causal_mask

from dalle_kernels.attention.op import sparse_attention
from dalle_kernels.decode.cache import KVCache
from dalle_kernels.decode.op import decode_attention
from dalle_kernels.integrations.transformers import CachedLength
from dalle_kernels.patterns import Pattern

__all__ = ["ARGUMENT", "PatternCache"]

ARGUMENT = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What the installed transformers calls a cache among a model's arguments: `cache` in 5.24, where `past_key_values`
still goes, with a warning, until 5.40."""


class PatternCache(Cache):
    """A `Cache` whose layers are `KVCache`s: for models that attend by the names of `register`.

    Outputs are those of a DynamicCache, to rounding; a row pattern over 256 text tokens and 32 x 32 cells keeps 289
    keys in the place of 1,280. Models and `generate` take it as `cache` (`past_key_values` before
    transformers 5.24): greedy and sampled, with beams, several sequences, assisted decoding, padding on either side of
    the prompt, and a prompt in chunks. `reset()` empties it.

    Args:
        copies: so many rows in a row have one prompt, as `num_return_sequences` (or `num_beams`, whichever is more)
            makes them: their prompt's keys and values are kept once, and read once a step for all of them.
        rewind: by how many tokens more than one `crop` can always go back, as `KVCache` says; assisted decoding and
            prompt lookup want as many as they guess at once.
        dtype: torch.int8 keeps eight bits, with the error that `KVCache` states; None keeps what comes.

    Raises:
        ValueError: for numbers below 1 (copies) or 0 (rewind); in a call: from a model whose attention does not go by a
            name of ours, for new tokens that an attention_mask hides, values of another width than keys, rows that are
            not copies, and a crop of more than `rewind` says where what is seen from there is gone.
        RuntimeError: for tokens after the prompt where gradients are on.

    Example:
        >>> from transformers import AutoModelForCausalLM, GPT2Config                      # doctest: +SKIP
        >>> register(TokenLayout(256, (32, 32)))                                           # doctest: +SKIP
        >>> model = AutoModelForCausalLM.from_config(config, attn_implementation="dalle")  # doctest: +SKIP
        >>> cache = PatternCache(copies=4)                                                 # doctest: +SKIP
        >>> model.generate(ids, do_sample=True, num_return_sequences=4, cache=cache)  # doctest: +SKIP
    """

    def __init__(self, *, copies: int = 1, rewind: int = 0, dtype: torch.dtype | None = None) -> None:
        for name, value, least in (("copies", copies, 1), ("rewind", rewind, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: got {value!r}, wanted an int >= {least}")
        self.copies, self.rewind, self.dtype = copies, rewind, dtype
        # Layers come as a model asks for them. What transformers wants is something to call.
        super().__init__(layer_class_to_replicate=lambda: _Layer(copies, rewind, dtype))  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.held.nbytes for layer in self._own if layer.held is not None)

    @property
    def _own(self) -> list[_Layer]:
        return cast("list[_Layer]", self.layers)

    def get_mask_sizes(self, *arguments: Any, **named: Any) -> tuple[int, int]:
        """What transformers makes masks of; on this way our attention learns which cache it serves."""
        length, offset = super().get_mask_sizes(*arguments, **named)
        return CachedLength(length, self), offset

    def crop(self, tokens: int) -> None:
        """Forgets the last -tokens tokens; with a positive number, as older versions have it, all but the first."""
        for layer in self._own:
            layer.check_crop(tokens)
        super().crop(tokens)

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Pattern,
        position: int,
        hidden: Tensor | None,
        scale: float,
        softcap: float | None,
        backend: str,
    ) -> Tensor:
        """For a layer that has just called `update`: q [B, H n, new, D], k and v [B, H, new, D], from `position` on.

        hidden, bool [B, keys], says which of all keys are padding. Returns what is like q.
        """
        layer = self._own[cast(int, module.layer_idx)]
        layer.updated = False
        if v.shape[3] != k.shape[3]:
            raise ValueError(
                f"{ARGUMENT}: got values of width {v.shape[3]} and keys of {k.shape[3]}, wanted equal ones in a "
                "PatternCache; a DynamicCache takes any"
            )
        if position == 0:
            layer.prefill(k, v, pattern, hidden, check=layer is self._own[0])
            return sparse_attention(q, k, v, pattern, scale, hidden, backend=backend, softcap=softcap)
        if hidden is not None and layer is self._own[0] and bool(hidden[:, position:].any()):
            raise ValueError(
                "attention_mask: hides tokens after the first call's, wanted a PatternCache's padding in the prompt; a "
                "DynamicCache takes any"
            )
        assert layer.held is not None
        return decode_attention(q, k, v, layer.held, position, scale, backend, softcap=softcap)


class _Layer(CacheLayerMixin):
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, copies: int, rewind: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.copies, self.rewind, self.dtype = copies, rewind, dtype
        self.reset()

    def reset(self) -> None:
        self.held: KVCache | None = None
        self.tokens = 0
        self.updated = self.is_initialized = False

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Counts the new tokens, and hands their keys and values back for `attend` to keep."""
        if self.updated:
            raise ValueError(
                f"{ARGUMENT}: got a PatternCache in a model whose attention does not go by a name of "
                "dalle_kernels, and that alone reads it"
            )
        self.updated = self.is_initialized = True
        self.tokens += key_states.shape[2]
        return key_states, value_states

    def prefill(self, k: Tensor, v: Tensor, pattern: Pattern, hidden: Tensor | None, check: bool) -> None:
        rows, heads, _, width = k.shape
        if rows % self.copies:
            raise ValueError(f"copies: got {self.copies} for {rows} rows, wanted a divisor of them")
        one, hidden = k[:: self.copies], None if hidden is None else hidden[:: self.copies]
        if check and self.copies > 1:  # rows of one product may differ by its rounding
            near = 1e-2 * one.abs().amax()
            if bool(((k.unflatten(0, (-1, self.copies)) - one[:, None]).abs() > near).any()):
                raise ValueError(f"copies: got {self.copies} rows in a row that are not copies of one prompt")
        self.held = KVCache(
            pattern, len(one), heads, width, self.dtype or k.dtype, k.device, copies=self.copies, rewind=self.rewind
        )
        self.held.prefill(one, v[:: self.copies], hidden)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.held is not None:
            self.held.reorder(beam_idx.long())

    def crop(self, tokens: int) -> None:
        kept = self.check_crop(tokens)
        if not kept:
            self.reset()
        elif self.held is not None and kept < self.held.pattern.length:
            self.held.truncate(kept)
        self.tokens = kept

    def check_crop(self, tokens: int) -> int:
        """How many tokens `crop` would leave; an error where it cannot."""
        kept = min(tokens, self.tokens) if tokens > 0 else max(self.tokens + tokens, 0)
        if kept and self.held is not None and kept < self.held.pattern.length:
            self.held.check_truncate(kept)
        return kept

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length  # positions, in older ones
        return self.tokens + new, 0

    def get_seq_length(self, *_: Any) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its older name
