"""Hugging Face transformers 5: a causal model there attends by our patterns, in training and in generation.

`register(layout)` gives the patterns over a layout their names; a model is then made with, or switched to,
`attn_implementation="dalle_row"`. Positions are places in the padded sequence: prompts that are shorter than the text
are padded, on either side, to the layout's text_length, and `attention_mask` says so as ever.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_kernels.attention.op import sparse_attention
from dalle_kernels.backends.library import define
from dalle_kernels.device import remembered, settled
from dalle_kernels.patterns import (
    AxialRow,
    Causal,
    Column,
    Convolution,
    Pattern,
    Row,
    TokenLayout,
)
from dalle_kernels.patterns.decode_table import DecodeTable, decode_table_for
from dalle_kernels.patterns.patterns import dalle_pattern_kind
from dalle_kernels.precision import widen

__all__ = ["register", "register_patterns"]


def register(
    layout: TokenLayout, prefix: str = "dalle", *, kernel_size: int = 11, backend: str = "auto"
) -> tuple[str, ...]:
    """Names the patterns over `layout` as attention implementations of transformers.

    The names are `prefix` itself, each layer's pattern by the paper's schedule (`dalle_pattern_schedule`), and
    `{prefix}_causal`, `{prefix}_row`, `{prefix}_column`, `{prefix}_axial_row` and `{prefix}_convolution`, that pattern
    in every layer. Another layout takes another prefix; other patterns and schedules go by `register_patterns`.

    A whole sequence, in training or as a prompt, and long chunks of a prompt are `sparse_attention`. Tokens after
    that, with a DynamicCache or StaticCache, gather the keys that they see from the cache and attend to these with
    scaled_dot_product_attention: the work is that of the visible keys, though the cache keeps all. The host waits
    for no device, so that both compile as one graph, and a static cache's tokens can be captured. Beams, samples,
    assisted decoding and prompt lookup work; what prompt lookup guesses beyond the layout gets logits of NaN, and a
    warning.

    Grouped-query heads, `attention_mask` [batch, tokens], multi-head latent attention and the model's own scaling
    are honoured, and so are soft caps of the scores (Gemma 2). Calls with attention dropout, 4D masks, packed
    sequences, sinks or position biases are refused, and so are layers with a sliding window narrower than the
    sequence, layers that are not causal, weights (`output_attentions`), and models that have attention of their own
    instead of looking it up by name, such as Bloom or Falcon: to refuse these too,
    `PreTrainedModel.get_correct_attn_implementation` is wrapped. While a graph is traced, nobody can say whether
    position_ids mean packed sequences: the graph then compares them as it runs, which an `attention_mask` makes
    unnecessary. A query whose keys are all hidden gives zeros.

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
        prefix: _Paper((Row(layout), Column(layout), Convolution(layout, kernel_size))),
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
    _refuse_models()


def _refuse_models() -> None:
    """Makes transformers ask, whenever a model is given one of our names, whether its attention goes by name at all."""
    from transformers import AttentionInterface, PreTrainedModel

    theirs = PreTrainedModel.get_correct_attn_implementation
    if hasattr(theirs, "before_dalle_kernels"):
        return

    @wraps(theirs)
    def ours(self: Any, requested_attention: str | None, *args: Any, **named: Any) -> str:
        if isinstance(AttentionInterface().get(requested_attention), _Attention) and not _goes_by_name(self):
            raise ValueError(
                f"attn_implementation: got {requested_attention!r}, but {type(self).__name__} has no attention that "
                "goes by name, so that the dalle_kernels patterns cannot take its place"
            )
        return theirs(self, requested_attention, *args, **named)

    ours.before_dalle_kernels = theirs  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = ours  # type: ignore[method-assign]


def _goes_by_name(model: Any) -> bool:
    """Whether a model's source looks attention up by name; True where there is no source, and for models of models."""
    from transformers import PreTrainedModel

    sources = [_source(kind.__module__) for kind in type(model).__mro__ if issubclass(kind, PreTrainedModel)]
    found = [source for source in sources[:-1] if source is not None]  # the last is PreTrainedModel's own
    if not found or any("ALL_ATTENTION_FUNCTIONS" in source for source in found):
        return True
    own = any(re.search(r"^class \w*Attention\w*\(nn\.Module\):", source, re.M) for source in found)
    return bool(model.config.sub_configs) and not own


@lru_cache(maxsize=256)
def _source(module: str) -> str | None:
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return None


# --- Masks ------------------------------------------------------------------------------------------------------------


class CachedLength(int):
    """How many keys there are, from a cache that keeps only some: `transformers_cache.PatternCache`. It is what such a
    cache answers when transformers makes a mask, and so tells the attention under that mask which cache it serves."""

    cache: Any

    def __new__(cls, length: int, cache: Any) -> CachedLength:
        made = super().__new__(cls, length)
        made.cache = cache
        return made


class _Mask:
    """What transformers hands to each layer of a call as `attention_mask`, for our attention alone to read.

    It is no tensor, and whatever else a model does with it is an error: a model that computes its attention itself
    would otherwise take it for a mask, or its absence for "no mask", and see later tokens.

    Attributes:
        position: of the first query: an int, or for a static cache an int64 tensor that the host does not wait for.
        hidden: bool [batch, keys], True where padding hides a key from every query; None where it hides none.
        refused: why no layer may attend under it; None where one may.
        cache: a PatternCache, which then has the keys; None where they come whole.
    """

    ndim = 4  # transformers takes it for a mask that is ready

    def __init__(
        self,
        model: str,
        position: int | Tensor,
        hidden: Tensor | None,
        refused: str | None = None,
        cache: Any = None,
    ) -> None:
        self.model = model
        self.position = position
        self.hidden = hidden
        self.refused = refused
        self.cache = cache

    def _own(self, *_: Any, **__: Any) -> Any:
        raise ValueError(
            f"attn_implementation: {self.model} computes attention itself, not by the name that it was given, so that "
            "the dalle_kernels patterns cannot take its place"
        )

    @classmethod
    def __torch_function__(cls, _: Any, __: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, cls)]
        (found[0] if found else cls("this model", 0, None))._own()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._own()

    __getitem__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __bool__ = __invert__ = __and__ = _own
    __rand__ = __or__ = __ror__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __len__ = __iter__ = _own
    __hash__ = None  # type: ignore[assignment]


def _mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable[..., Any],
    attention_mask: Any,
    device: torch.device,
    config: Any = None,
    use_vmap: bool = False,
    **_: Any,
) -> _Mask:
    """What stands in `AttentionMaskInterface` under our names."""
    from transformers.masking_utils import causal_mask_function

    model = getattr(config, "model_type", None) or type(config).__name__
    plain = mask_function is causal_mask_function and kv_offset == 0
    if not plain and not use_vmap and kv_offset == 0:
        # A window that is wider than the sequence, or what might be packed: while a graph is traced, nobody can tell.
        plain = _is_causal(mask_function, batch_size, q_length, kv_length, q_offset, device)
    refused = None
    if not plain:
        refused = (
            "attention_mask: this call asks for more than a causal mask (a sliding window, chunks, packed sequences or "
            "a mask function of its own), which the dalle_kernels patterns do not combine with"
        )
    if isinstance(attention_mask, _Mask):  # made before, by `generate`
        return attention_mask if plain else _Mask(model, q_offset, None, refused)
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.clone()  # a static cache's own count, which each layer moves on before it attends
    hidden = None
    if attention_mask is not None and not _shows_all(attention_mask):
        hidden = ~attention_mask[:, :kv_length]
        hidden = F.pad(hidden, (0, kv_length - hidden.shape[1]), value=True)
    cache = kv_length.cache if isinstance(kv_length, CachedLength) else None
    return _Mask(model, q_offset, hidden, refused, cache)


def _shows_all(attention_mask: Tensor) -> bool:
    """Whether no key is hidden, as far as can be said without waiting for a device."""
    from transformers.utils.import_utils import is_tracing

    return attention_mask.device.type == "cpu" and not is_tracing(attention_mask) and bool(attention_mask.all())


def _is_causal(
    mask_function: Callable[..., Any],
    batch: int,
    queries: int,
    keys: int,
    offset: int | Tensor,
    device: torch.device,
) -> bool:
    """Whether a query sees just the keys up to itself; in a traced graph True, and the graph raises where it is not."""
    from transformers.utils.import_utils import is_tracing

    query = (torch.arange(queries, device=device) + offset)[None, None, :, None]
    key = torch.arange(keys, device=device)[None, None, None]
    row = torch.arange(batch, device=device)[:, None, None, None]
    same = (mask_function(row, torch.zeros_like(row[:1]), query, key) == (key <= query)).all()
    if not is_tracing(same):
        return bool(same)
    torch._assert_async(
        same,
        "attention_mask: packed sequences or a sliding window, which the dalle_kernels patterns do not combine with",
    )
    return True


# --- Attention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Paper:
    """The paper's schedule, for as many layers as a model has: its row, its column and its convolution."""

    kinds: tuple[Pattern, Pattern, Pattern]


_Layers = _Paper | tuple[Pattern, ...]
_CHUNK = 64  # tokens after the first that make a schedule of their own worth its while
_REFUSED = (  # what other models pass that changes attention
    "s_aux",
    "sinks",
    "position_bias",
    "indices",
    "block_indices",
    "cache",
    "cu_seq_lens_q",
)


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
            return self.layers.kinds[dalle_pattern_kind(layer, count)]
        if len(self.layers) != count:
            raise ValueError(f"{self.name}: got {len(self.layers)} patterns, wanted {count}, one for each layer")
        return self.layers[layer]

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """query [B, H, new, D], key and value [B, H / groups, all, D] -> [B, new, H, D], and no weights.

        Values may be wider or narrower than keys, as in multi-head latent attention.
        """
        self._refuse(module, dropout, others)
        if not isinstance(attention_mask, _Mask):
            came = type(attention_mask).__name__
            if isinstance(attention_mask, Tensor):
                came = f"{attention_mask.dtype} of shape {tuple(attention_mask.shape)}"
            raise ValueError(
                f"attention_mask: got {came}, wanted 0 and 1 of shape (batch, tokens): the pattern says the rest"
            )
        if attention_mask.refused is not None:
            raise ValueError(attention_mask.refused)
        pattern, scale = self.pattern(module), query.shape[-1] ** -0.5 if scaling is None else scaling
        position, hidden = attention_mask.position, attention_mask.hidden
        if hidden is not None and hidden.device != key.device:
            hidden = hidden.to(key.device)
        traced = torch.compiler.is_compiling()
        if isinstance(position, Tensor) and position.device.type == "cpu" and not traced:
            position = int(position)  # nobody waits for that
        if isinstance(position, Tensor):
            out = self._at(query, key, value, pattern, position.to(key.device), hidden, scale, softcap)
            return out.transpose(1, 2).contiguous(), None
        stop = position + query.shape[2]
        beyond = stop - pattern.length
        if beyond > 0 and not 0 < position < pattern.length:
            raise ValueError(
                f"{self.name}: got {stop} tokens, wanted at most {pattern.length}, the length of {pattern}"
            )
        if beyond > 0:  # prompt lookup may guess further than it is to generate, and drops what it guessed
            warnings.warn(
                f"{self.name}: {stop} tokens, where {pattern} has {pattern.length}: the others' logits are NaN",
                stacklevel=2,
            )
            stop, query = pattern.length, query[:, :, :-beyond]
        cache = attention_mask.cache
        first = 0 if cache is None else position  # a PatternCache hands on the new tokens' keys and values alone
        key, value = key[:, :, : stop - first], value[:, :, : stop - first]
        hidden = None if hidden is None else hidden[:, :stop]
        if cache is not None:
            out = cache.attend(module, query, key, value, pattern, position, hidden, scale, softcap, self.backend)
        elif position and traced:
            here = torch.full((), position, dtype=torch.int64, device=key.device)
            out = self._at(query, key, value, pattern, here, hidden, scale, softcap)
        elif position and query.shape[2] < _CHUNK:
            out = _go_on(query, key, value, pattern, position, hidden, scale, softcap)
        else:
            out = sparse_attention(query, key, value, pattern, scale, hidden, backend=self.backend, softcap=softcap)
        out = out.transpose(1, 2).contiguous()
        return F.pad(out, (0, 0, 0, 0, 0, beyond), value=torch.nan) if beyond > 0 else out, None

    def _at(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pattern: Pattern,
        position: Tensor,
        hidden: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Tokens of a static cache from a position on that the host does not know."""
        new, length = query.shape[2], min(key.shape[2], pattern.length)
        if new == 1:
            seen, counts = torch.ops.dalle_kernels.visible_keys(position, pattern.spec)
            return _gathered(query, key, value, seen, counts[None, None, None], hidden, scale, softcap)
        places = position + torch.arange(new, device=key.device)
        whole = query.new_zeros(*query.shape[:2], length, query.shape[3]).index_copy(2, places, query)
        hidden = None if hidden is None else hidden[:, :length]
        key, value = key[:, :, :length], value[:, :, :length]
        out = sparse_attention(whole, key, value, pattern, scale, hidden, backend=self.backend, softcap=softcap)
        return out.index_select(2, places)

    def _refuse(self, module: nn.Module, dropout: float, others: dict[str, Any]) -> None:
        if dropout:
            raise ValueError(
                f"dropout: got {dropout}, wanted 0.0: {self.name} drops no attention; set attention_dropout "
                "(attn_pdrop in GPT-2) to 0.0 in the config"
            )
        if not others.get("is_causal", True) or not getattr(module, "is_causal", True):
            raise ValueError(f"{self.name}: {type(module).__name__} is not causal; its pattern says who sees whom")
        if others.get("output_attentions") or _wants_weights():
            raise ValueError(f'output_attentions: got True, but {self.name} never makes the weights; "eager" does')
        for argument in _REFUSED:
            if others.get(argument) is not None:
                raise ValueError(f"{argument}: {type(module).__name__} passes one, which {self.name} does not take")


def _wants_weights() -> bool:
    """Whether the call that this layer is part of shall return attention's weights, which layers need not be told."""
    from transformers.utils import output_capturing

    collected = output_capturing._active_collector.get()
    return collected is not None and any(name.endswith("attentions") for name in collected)


def _go_on(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    position: int,
    hidden: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Queries from `position` on, over a cache of all tokens: the keys that one of them sees, gathered; then SDPA."""
    rows = [_visible(pattern, place, key.device) for place in range(position, position + query.shape[2])]
    seen = rows[0] if len(rows) == 1 else torch.cat(rows).unique()
    mask = None
    if len(rows) > 1:
        mask = torch.zeros(len(rows), len(seen), dtype=torch.bool, device=key.device)
        for turn, row in enumerate(rows):
            mask[turn, torch.searchsorted(seen, row)] = True
    return _gathered(query, key, value, seen, mask, hidden, scale, softcap)


def _gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    mask: Tensor | None,
    hidden: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention to the keys `seen`, int64 [n]; `mask`, broadcast to [B, H, new, n], says which of them a query sees."""
    if hidden is not None:
        shown = ~hidden[:, seen][:, None, None]
        mask = shown if mask is None else mask & shown
    key, value = key.index_select(2, seen), value.index_select(2, seen)
    grouped = query.shape[1] != key.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    if grouped:
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    scores = softcap * (widen(query @ key.mT) * (scale / softcap)).tanh()
    if mask is None:
        return scores.softmax(-1).to(value.dtype) @ value
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return weights.masked_fill(~mask, 0).to(value.dtype) @ value  # zeros where all keys are hidden


# --- Which keys a token sees ------------------------------------------------------------------------------------------


def _seen(pattern: Pattern, device: str = "cpu") -> DecodeTable:
    """The table of a cache that keeps every key, so that a slot's number is its key's position."""
    return decode_table_for(pattern, device, rewind=pattern.length)


@remembered(maxsize=8192)
def _visible(pattern: Pattern, position: int, device: torch.device | str) -> Tensor:
    """int64 [n]: the keys that the query at `position` sees, ascending."""
    table = _seen(pattern)
    own = table.slots[table.offsets[position] : table.offsets[position + 1]]
    return settled(device, lambda: torch.cat([torch.arange(int(table.prefix[position])), own.long()]).to(device))


@remembered(maxsize=64)
def _longest(pattern: Pattern) -> int:
    table = _seen(pattern)
    return int((table.prefix + table.offsets.diff()).max())


def _visible_keys(position: Tensor, pattern: str) -> tuple[Tensor, Tensor]:
    """`_visible` for a position that is read where it lies: int64 [n], n the most that a query sees, and bool [n],
    which of them count.
    """
    parsed, place = Pattern.parse(pattern), position.reshape(1)
    table, turn = _seen(parsed, str(position.device)), torch.arange(_longest(parsed), device=position.device)
    prefix, first, stop = table.prefix[place], table.offsets[place], table.offsets[place + 1]
    counts = turn < prefix + stop - first
    if not len(table.slots):
        return torch.where(counts, turn, 0), counts
    listed = table.slots[(first + turn - prefix).clamp(0, len(table.slots) - 1)]
    return torch.where(counts, torch.where(turn < prefix, turn, listed), 0), counts


def _visible_keys_fake(position: Tensor, pattern: str) -> tuple[Tensor, Tensor]:
    longest = _longest(Pattern.parse(pattern))
    return position.new_empty(longest, dtype=torch.int64), position.new_empty(longest, dtype=torch.bool)


define("visible_keys(Tensor position, str pattern) -> (Tensor, Tensor)", _visible_keys, _visible_keys_fake)
