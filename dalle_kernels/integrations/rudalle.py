"""ruDALL-E (PyPI `rudalle` 1.1.3): its models train and sample with our operations, in place.

Its attention multiplies the scores by a 0/1 mask, subtracts 10000 where the mask is 0, and under "PB-relax" (Ding et
al. 2021, CogView, section 2.4) divides them by 32, subtracts their maximum and multiplies by 32 again. All of that is a
softmax over the visible keys, which is what `sparse_attention` computes; its layer norms, residuals and MLPs run as
they are. Its cached sampling makes embeddings, norms and logits of every token so far anew at each step; ours runs the
new tokens alone.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from dalle_kernels.attention.op import sparse_attention
from dalle_kernels.decode.cache import KVCache
from dalle_kernels.decode.op import decode_attention
from dalle_kernels.patterns import Column, Convolution, MaskPattern, Pattern, Row, TokenLayout

__all__ = ["LayerCache", "accelerate"]


def accelerate(model: nn.Module) -> nn.Module:
    """Makes a ruDALL-E model use `sparse_attention` and `decode_attention`: same weights, state_dict and arguments.

    What each layer may see is read from the model's own masks (row, column, and the convolution of v2 or v3 weights)
    and read again after `load_state_dict`. Three things are served by ruDALL-E's own code, each with a warning that
    says so once: training with attention dropout, which our operations do not have; an `attention_mask` that is not
    causal with some keys hidden as padding; sampling with a cache where gradients are on or keys are padding.

    Where a call that begins a cache has the same tokens in every row, as in `generate_images`, one row is run for all,
    and its keys and values are kept once.

    With `use_cache`, the second and later calls return the logits of the new tokens, [b, new, vocabulary], where
    ruDALL-E returns a row for each token so far, all but the new ones of no use. Its `cache` stays a dict with a key a
    layer; the values are `LayerCache`. `gradient_checkpointing` works (that of ruDALL-E 1.1.3 fails). Under
    torch.compile a call is one graph, which raises where an `attention_mask` is not one that we serve. Save weights by
    `state_dict`: the classes are made on the spot, so pickle refuses the model as a whole.

    Args:
        model: a `rudalle.dalle.model.DalleModel`, or a module that holds one, such as `FP16Module`.

    Returns:
        `model` itself, changed in place.

    Raises:
        TypeError: if there is no DalleModel in `model`.

    Example:
        >>> from rudalle import get_rudalle_model                                        # doctest: +SKIP
        >>> from dalle_kernels.integrations.rudalle import accelerate
        >>> model = accelerate(get_rudalle_model("dummy", pretrained=False))             # doctest: +SKIP
    """
    found = [module for module in model.modules() if _is_dalle(module)]
    if not found:
        raise TypeError(f"model: got {type(model).__name__}, wanted a rudalle DalleModel or a module that holds one")
    for dalle in found:
        if not isinstance(dalle, _Model):
            _change(dalle)
    return model


def _is_dalle(module: nn.Module) -> bool:
    kinds = type(module).__mro__
    return any((kind.__module__, kind.__name__) == ("rudalle.dalle.model", "DalleModel") for kind in kinds)


def _change(dalle: Any) -> None:
    layout = TokenLayout(dalle.text_seq_length, (dalle.image_tokens_per_dim, dalle.image_tokens_per_dim))
    transformer = dalle.transformer
    _find_patterns(transformer, layout)
    attention = _over(_Attention, type(transformer.layers[0].attention))
    for layer in transformer.layers:
        layer.attention.__class__ = attention
    transformer.__class__ = _over(_Transformer, type(transformer))
    transformer.register_load_state_dict_post_hook(lambda module, _: _find_patterns(module, layout))
    dalle.__class__ = _over(_Model, type(dalle))


def _over(ours: type, theirs: type) -> type:
    """`theirs` with the forward of `ours` in front: a peer's module that stays one of its class."""
    return type(theirs.__name__, (ours, theirs), {"__module__": theirs.__module__})


def _find_patterns(transformer: Any, layout: TokenLayout) -> None:
    masks = [transformer._get_layer_mask(layer) for layer in range(len(transformer.layers))]
    found = {id(mask): _pattern_of(mask, layout) for mask in masks}
    transformer._patterns = [found[id(mask)] for mask in masks]


def _pattern_of(mask: Tensor, layout: TokenLayout) -> Pattern:
    """The pattern that this mask states, under a short name where it has one."""
    known = [Row(layout), Column(layout), Convolution(layout, 11, "clamp"), Convolution(layout, 11, "torus")]
    dense = mask.detach().cpu() != 0
    return next((pattern for pattern in known if torch.equal(pattern.mask(), dense)), MaskPattern(dense))


class LayerCache(KVCache):
    """One layer's keys and values, as a value of ruDALL-E's `cache` dict; `tokens` says how many went in."""

    tokens = 0


class _View(NamedTuple):
    """What a layer's queries see. It takes the place of `ltor_mask` on its way through ruDALL-E's layer."""

    pattern: Pattern
    padding: Tensor | None = None
    keep: bool = False  # begin a cache with these tokens
    copies: int = 1  # of each row, in that cache
    cache: LayerCache | None = None  # or go on from this one

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, LayerCache | None]:
        """q, k, v [b, heads, new tokens, width] -> the same, and the layer's cache."""
        cache = self.cache
        if cache is None:
            out = sparse_attention(q, k, v, self.pattern, key_padding_mask=self.padding)
            if not self.keep:
                return out, None
            batch, heads, new, width = k.shape
            cache = LayerCache(self.pattern, batch, heads, width, k.dtype, k.device, self.copies)
            cache.prefill(k, v)
        else:
            new = q.shape[2]
            out = decode_attention(q, k, v, cache, cache.tokens)
        cache.tokens += new
        return out, cache


class _Attention(nn.Module):
    """In front of DalleSelfAttention: its projections round our attention."""

    def forward(self: Any, hidden_states: Tensor, ltor_mask: Any, use_cache: bool = False, cache: Any = None) -> Any:
        if not isinstance(ltor_mask, _View):
            return super().forward(hidden_states, ltor_mask, use_cache, cache)  # type: ignore[misc]
        qkv = self.query_key_value(hidden_states).unflatten(-1, (3, self.num_attention_heads, -1))
        context, kept = ltor_mask.attend(*qkv.transpose(1, 3).unbind(2))
        output = self.dense(context.transpose(1, 2).flatten(2)).clamp(min=-65504, max=65504)
        return self.output_dropout(output), kept


class _Transformer(nn.Module):
    """In front of DalleTransformer: hands each layer its `_View` where ruDALL-E multiplies dense masks."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor,
        cache: dict[int, Any] | None = None,
        use_cache: bool = False,
        gradient_checkpointing: int | None = None,
    ) -> tuple[Tensor, dict[int, Any]]:
        """Going on from a cache of ours, `hidden_states` and the rows of `attention_mask` are the new tokens' alone."""
        cache = {} if cache is None else cache
        begun = cache.get(0) if use_cache else None
        if begun is None or isinstance(begun, LayerCache):
            causal, padding = _read_mask(attention_mask, len(hidden_states), use_cache)
            reason = self._why_dense(use_cache, causal, padding)
            if begun is not None and reason is not None:
                raise ValueError(f"cache: it was begun with our attention, which cannot go on: {reason}")
        else:  # a cache that ruDALL-E's own attention began
            reason = ""
        if reason is not None:
            if reason:
                warnings.warn(f"ruDALL-E's own dense attention serves this: {reason}", stacklevel=2)
            return super().forward(  # type: ignore[misc]
                hidden_states, attention_mask, cache, use_cache, gradient_checkpointing
            )
        if gradient_checkpointing and use_cache:
            raise ValueError("gradient_checkpointing: got it with use_cache, wanted one of them")
        if gradient_checkpointing:
            steps = [
                partial(_hidden, layer, _View(pattern, padding))
                for layer, pattern in zip(self.layers, self._patterns, strict=True)
            ]
            hidden_states = checkpoint_sequential(steps, gradient_checkpointing, hidden_states, use_reentrant=False)
            return self.final_layernorm(hidden_states), cache
        for number, (layer, pattern) in enumerate(zip(self.layers, self._patterns, strict=True)):
            kept = cache.get(number) if use_cache else None
            view = _View(pattern, padding, use_cache, getattr(cache, "copies", 1), kept)
            hidden_states, kept = layer(hidden_states, view)
            cache[number] = kept if use_cache else cache.get(number)
        return self.final_layernorm(hidden_states), cache

    def _why_dense(self: Any, use_cache: bool, causal: bool, padding: Tensor | None) -> str | None:
        """What keeps our operations from serving a call, or None."""
        if not causal:
            return "attention_mask is not a causal mask with some keys hidden from all queries"
        if use_cache and padding is not None:
            return "attention_mask hides keys, which decode_attention cannot"
        if use_cache and torch.is_grad_enabled():
            return "sampling with a cache has a gradient only there; call it under torch.no_grad()"
        dropouts = [layer.attention.attention_dropout for layer in self.layers]
        if rate := max((dropout.p for dropout in dropouts if dropout.training), default=0.0):
            return (
                f"it drops attention at random, with attention_dropout_prob={rate}; make the model with "
                "attention_dropout_prob=0.0 to train with ours"
            )
        return None


def _hidden(layer: nn.Module, view: _View, hidden_states: Tensor) -> Tensor:
    return layer(hidden_states, view)[0]


def _read_mask(mask: Tensor, batch: int, use_cache: bool) -> tuple[bool, Tensor | None]:
    """Whether `mask` [b, 1, queries, keys], the queries being the last of the keys, is causal with some keys hidden
    from every query but none left without a key; and the hidden keys, bool [batch, keys], None where there are none.
    """
    if mask.dim() != 4 or mask.shape[1] != 1:
        return False, None
    queries, keys = mask.shape[2:]
    causal = torch.ones(queries, keys, dtype=mask.dtype, device=mask.device).tril(keys - queries)
    if torch.compiler.is_compiling():  # nobody can look while a graph is traced: it checks as it runs
        last = mask[:, 0, -1]
        kept = torch.ones_like(last) if use_cache else last
        zero_one = ((kept == 0) | (kept == 1)).all() & (kept[:, 0] == 1).all()
        torch._assert_async(
            zero_one & (mask[:, 0] == causal * kept[:, None]).all(),
            "attention_mask: a compiled model wants a causal one; without a cache, some of its keys may be hidden",
        )
        return True, None if use_cache else (last == 0).expand(batch, keys)
    if torch.equal(mask, causal.expand_as(mask)):
        return True, None
    last = mask[:, 0, -1]
    # The first key is in every query's sight unless it is hidden; a pure image has none such.
    plain = bool(((last == 0) | (last == 1)).all() and last[:, 0].all())
    if not plain or not torch.equal(mask[:, 0], causal * last[:, None]):
        return False, None
    return True, (last == 0).expand(batch, keys)


class _Candidates(dict[int, Any]):
    """A cache whose rows go on from one row `copies` times."""

    copies = 1


class _Model(nn.Module):
    """In front of DalleModel: going on from a cache, only the new tokens are embedded, run and turned into logits."""

    def forward(
        self: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        return_loss: bool = False,
        use_cache: bool = False,
        cache: dict[int, Any] | None = None,
        gradient_checkpointing: int | None = None,
    ) -> Any:
        begun = cache.get(0) if use_cache and cache else None
        if use_cache and cache is None and not return_loss and self._repeats(input_ids, attention_mask):
            cache = _Candidates()
            cache.copies = len(input_ids)
            logits, cache = super().forward(  # type: ignore[misc]
                input_ids[:1], attention_mask[:1], use_cache=True, cache=cache
            )
            return logits.repeat(len(input_ids), 1, 1), cache
        if not isinstance(begun, LayerCache):
            return super().forward(  # type: ignore[misc]
                input_ids, attention_mask, return_loss, use_cache, cache, gradient_checkpointing
            )
        if return_loss:
            raise ValueError(
                "return_loss: got True with a cache of tokens before these, wanted the loss of a whole call"
            )
        before = self.text_seq_length + (self.hf_version == "v2")  # v2 puts a token before the text
        start, stop = begun.tokens, min(before - self.text_seq_length + input_ids.shape[1], self.total_seq_length)
        if not before <= start < stop:
            raise ValueError(f"input_ids: got {stop} tokens, wanted more than the {start} that the cache holds")
        ids = input_ids[:, self.text_seq_length :][:, start - before : stop - before]
        embeddings = self.image_embeddings(ids) + self.get_image_pos_embeddings(ids, past_length=start - before)
        embeddings = embeddings * 0.1 + embeddings.detach() * 0.9  # DalleModel scales the gradient so; to the same bits
        rows = attention_mask[:, :, start:stop, :stop]
        hidden, cache = self.transformer(embeddings, rows, cache=cache, use_cache=True)
        return self.to_logits(hidden), cache

    def _repeats(self: Any, input_ids: Tensor, attention_mask: Tensor) -> bool:
        """Whether a call that begins a cache may run one row for all: nobody can tell while a graph is traced."""
        if torch.compiler.is_compiling() or self.training or len(input_ids) < 2:
            return False
        tokens = min(input_ids.shape[1] + (self.hf_version == "v2"), self.total_seq_length)
        mask = attention_mask[:, :, :tokens, :tokens]
        causal = torch.ones(tokens, tokens, dtype=mask.dtype, device=mask.device).tril()
        plain = torch.equal(mask, causal.expand_as(mask)) and bool((input_ids == input_ids[:1]).all())
        return plain and self.transformer._why_dense(True, True, None) is None
