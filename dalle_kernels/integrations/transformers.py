"""Hugging Face transformers 5: a causal model there attends by our patterns, in training and in generation.

`register(layout)` gives the patterns over a layout their names; a model is then made with, or switched to,
`attn_implementation="dalle_row"`. Positions are places in the padded sequence: prompts that are shorter than the text
are padded, on either side, to the layout's text_length, and `attention_mask` says so as ever.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_kernels.attention.op import sparse_attention
from dalle_kernels.patterns import (
    AxialRow,
    Causal,
    Column,
    Convolution,
    Pattern,
    Row,
    TokenLayout,
    dalle_pattern_schedule,
)

__all__ = ["register", "register_patterns"]


def register(
    layout: TokenLayout, prefix: str = "dalle", *, kernel_size: int = 11, backend: str = "auto"
) -> tuple[str, ...]:
    """Names the patterns over `layout` as attention implementations of transformers.

    The names are `prefix` itself, each layer's pattern by the paper's schedule (`dalle_pattern_schedule`), and
    `{prefix}_causal`, `{prefix}_row`, `{prefix}_column`, `{prefix}_axial_row` and `{prefix}_convolution`, that pattern
    in every layer. Another layout takes another prefix; other patterns and schedules go by `register_patterns`.

    A whole sequence, in training or as a prompt, is `sparse_attention`. Tokens after that, with a DynamicCache or
    StaticCache, gather the keys that they see from the cache and attend to these with scaled_dot_product_attention:
    the work is that of the visible keys, though the cache keeps all. A StaticCache on a GPU makes the host wait once a
    layer to learn the position.

    Grouped-query heads, `attention_mask` [batch, tokens] and the model's own scaling are honoured. Calls with attention
    dropout, 4D masks, packed sequences, sliding windows, soft caps, sinks or position biases are refused, and so are
    `output_attentions=True` and layers that are not causal. A query whose keys are all hidden gives zeros.

    Args:
        layout: where text and image stand; no sequence may be longer.
        prefix: lower-case letters, digits and underscores.
        kernel_size: of the convolution.
        backend: as in `sparse_attention`.

    Returns:
        The names.

    Raises:
        ImportError: where transformers is missing or older than 5.
        TypeError, ValueError: for a bad argument, or a name that already stands for something else.

    Example:
        >>> register(TokenLayout(text_length=4, grid=(3, 3)), prefix="tiny")
        ('tiny', 'tiny_causal', 'tiny_row', 'tiny_column', 'tiny_axial_row', 'tiny_convolution')
    """
    if not isinstance(layout, TokenLayout):
        raise TypeError(f"layout: got {type(layout).__name__}, wanted a TokenLayout")
    choices: dict[str, _Layers] = {
        prefix: _Paper(layout, kernel_size),
        f"{prefix}_causal": (Causal(layout),),
        f"{prefix}_row": (Row(layout),),
        f"{prefix}_column": (Column(layout),),
        f"{prefix}_axial_row": (AxialRow(layout),),
        f"{prefix}_convolution": (Convolution(layout, kernel_size),),
    }
    _register([_Attention(name, layers, backend) for name, layers in choices.items()])
    return tuple(choices)


def register_patterns(name: str, patterns: Pattern | Sequence[Pattern], *, backend: str = "auto") -> None:
    """Names one pattern for every layer, or one pattern a layer, as an attention implementation of transformers.

    Args:
        name: what `attn_implementation` will say; lower-case letters, digits and underscores.
        patterns: a Pattern, or as many as the models that will use the name have layers.
        backend: as in `sparse_attention`.

    Raises:
        ImportError, TypeError, ValueError: as `register`.

    Example:
        >>> layout = TokenLayout(text_length=4, grid=(3, 3))
        >>> register_patterns("clamped", Convolution(layout, 3, "clamp"))
    """
    layers = tuple(patterns) if isinstance(patterns, Sequence) else (patterns,)
    if not layers or not all(isinstance(pattern, Pattern) for pattern in layers):
        raise TypeError(f"patterns: got {patterns!r}, wanted a Pattern or a sequence of them")
    _register([_Attention(name, layers, backend)])


def _register(attentions: Sequence[_Attention]) -> None:
    """All of them, or, after an error, none."""
    from transformers import AttentionInterface, AttentionMaskInterface, __version__, masking_utils

    if "q_offset" not in inspect.signature(masking_utils.sdpa_mask).parameters:
        raise ImportError(f"transformers: got {__version__}, wanted 5 or later, whose masks are made from q_offset")
    known = AttentionInterface()
    for attention in attentions:
        name = attention.name
        # transformers treats names with these words in them as its own attentions.
        if not re.fullmatch("[a-z][a-z0-9_]*", name) or re.search("flash|sdpa|flex|eager|paged", name):
            raise ValueError(f"name: got {name!r}, wanted lower-case letters, digits and underscores, none of theirs")
        if name in known and known[name] != attention:
            raise ValueError(f"name: {name!r} already stands for {known[name]}; choose another")
    for attention in attentions:
        AttentionInterface.register(attention.name, attention)
        AttentionMaskInterface.register(attention.name, _mask)


# --- Masks ------------------------------------------------------------------------------------------------------------


def _mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
    device: torch.device,
    **_: Any,
) -> Tensor | None:
    """What transformers hands to each layer of a call as `attention_mask`: None, or int32 [batch, 1, 1, keys].

    The sign says whether a key may be seen, by padding and by whether it has been written; the magnitude, less two, is
    the position of the first query, which the length of a static cache does not tell. None: the queries come last, and
    no key is hidden. It has four dimensions because transformers passes on only such masks untouched, and no entry
    from -1 to 1, so that nobody's own mask is taken for it.
    """
    from transformers.masking_utils import causal_mask_function

    if mask_function is not causal_mask_function or kv_offset != 0:
        raise ValueError(
            "attention_mask: this call asks for more than a causal mask (a sliding window, chunks, packed sequences or "
            "a mask function of its own), which the dalle_kernels patterns do not combine with"
        )
    hidden = None if attention_mask is None or bool(attention_mask.all()) else ~attention_mask[:, :kv_length]
    if hidden is None and isinstance(q_offset, int) and kv_length == q_offset + q_length:
        return None
    seen = (torch.arange(kv_length, device=device) < q_offset + q_length).expand(batch_size, -1)
    if hidden is not None:
        seen = seen & ~F.pad(hidden, (0, kv_length - hidden.shape[1]), value=True)
    return (torch.where(seen, 1, -1) * (q_offset + 2)).to(torch.int32)[:, None, None]


def _read(mask: Tensor | None, queries: int, keys: int) -> tuple[int, Tensor | None]:
    """Undoes `_mask`: the first query's position, and the hidden keys, bool [batch, keys] or None."""
    if mask is None:
        return keys - queries, None
    if isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.shape[1:] == (1, 1, keys):
        position = int(mask[0, 0, 0, 0].abs()) - 2
        if position >= 0:
            return position, mask[:, 0, 0] < 0
    came = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(f"attention_mask: got {came}, wanted 0 and 1 of shape (batch, tokens): the pattern says the rest")


# --- Attention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Paper:
    """The paper's schedule, for as many layers as a model has."""

    layout: TokenLayout
    kernel_size: int

    def __post_init__(self) -> None:
        Convolution(self.layout, self.kernel_size)  # checks it


_Layers = _Paper | tuple[Pattern, ...]
_REFUSED = (
    "softcap",
    "s_aux",
    "position_bias",
    "cache",
    "cu_seq_lens_q",
)  # what other models pass that changes attention


@dataclass(frozen=True)
class _Attention:
    """One name: called by every attention layer of a model that bears it, as transformers' attention functions are."""

    name: str
    layers: _Layers
    backend: str

    def pattern(self, module: nn.Module) -> Pattern:
        """The pattern of this layer."""
        if isinstance(self.layers, tuple) and len(self.layers) == 1:
            return self.layers[0]
        config: Any = getattr(module, "config", None)
        count, layer = getattr(config, "num_hidden_layers", None), getattr(module, "layer_idx", None)
        if not isinstance(count, int) or not isinstance(layer, int):
            raise ValueError(f"{self.name}: {type(module).__name__} does not say which layer it is, of how many")
        if isinstance(self.layers, _Paper):
            return dalle_pattern_schedule(count, self.layers.layout, self.layers.kernel_size)[layer]
        if len(self.layers) != count:
            raise ValueError(f"{self.name}: got {len(self.layers)} patterns, wanted {count}, one for each layer")
        return self.layers[layer]

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """query [B, H, new, D], key and value [B, H / groups, all, D] -> [B, new, H, D], and no weights."""
        self._refuse(module, dropout, others)
        pattern, new = self.pattern(module), query.shape[2]
        position, hidden = _read(attention_mask, new, key.shape[2])
        stop = position + new
        if stop > pattern.length:
            raise ValueError(
                f"{self.name}: got {stop} tokens, wanted at most {pattern.length}, the length of {pattern}"
            )
        key, value = key[:, :, :stop], value[:, :, :stop]
        hidden = None if hidden is None else hidden[:, :stop]
        if position:
            out = _go_on(query, key, value, pattern, position, hidden, scaling)
        else:
            groups = query.shape[1] // key.shape[1]
            if groups > 1:
                key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
            out = sparse_attention(query, key, value, pattern, scaling, hidden, backend=self.backend)
        return out.transpose(1, 2).contiguous(), None

    def _refuse(self, module: nn.Module, dropout: float, others: dict[str, Any]) -> None:
        if dropout:
            raise ValueError(
                f"dropout: got {dropout}, wanted 0.0: {self.name} drops no attention; set attention_dropout "
                "(attn_pdrop in GPT-2) to 0.0 in the config"
            )
        if not others.get("is_causal", True) or not getattr(module, "is_causal", True):
            raise ValueError(f"{self.name}: {type(module).__name__} is not causal; its pattern says who sees whom")
        if others.get("output_attentions"):
            raise ValueError(f'output_attentions: got True, but {self.name} never makes the weights; "eager" does')
        for argument in _REFUSED:
            if others.get(argument) is not None:
                raise ValueError(f"{argument}: {type(module).__name__} passes one, which {self.name} does not take")


def _go_on(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    position: int,
    hidden: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Queries from `position` on, over a cache of all tokens: the keys that one of them sees, gathered; then SDPA."""
    rows = [_visible(pattern, place, key.device) for place in range(position, position + query.shape[2])]
    seen = rows[0] if len(rows) == 1 else torch.cat(rows).unique()
    mask = None
    if len(rows) > 1:
        mask = torch.zeros(len(rows), len(seen), dtype=torch.bool, device=key.device)
        for turn, row in enumerate(rows):
            mask[turn, torch.searchsorted(seen, row)] = True
    if hidden is not None:
        shown = ~hidden[:, seen][:, None, None]
        mask = shown if mask is None else mask & shown
    if len(seen) < key.shape[2]:
        key, value = key.index_select(2, seen), value.index_select(2, seen)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)


@lru_cache(maxsize=8192)
def _visible(pattern: Pattern, position: int, device: torch.device) -> Tensor:
    """int64 [n]: the keys that the query at `position` sees, ascending."""
    leading, offsets, keys = _by_query(pattern)
    own = keys[offsets[position] : offsets[position + 1]]
    return torch.from_numpy(np.concatenate([np.arange(leading[position]), own]).astype(np.int64)).to(device)


@lru_cache(maxsize=32)
def _by_query(pattern: Pattern) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """leading, offsets, keys: query i sees keys 0 .. leading[i] - 1, and keys[offsets[i] : offsets[i + 1]]."""
    length = pattern.length
    pairs = [(np.zeros(0, np.int32), np.zeros(0, np.int32)), *pattern.pairs(length)]
    query, key = (np.concatenate(axis) for axis in zip(*pairs, strict=True))
    if (key > query).any() or (pattern.leading(length) > np.arange(1, length + 1)).any():
        raise ValueError(f"pattern: {pattern} lets a query see later keys, so it cannot generate")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(query, minlength=length))])
    return pattern.leading(length), offsets, key[np.lexsort((key, query))]
