"""DALLE-pytorch (PyPI `dalle-pytorch` 1.6.6) on our operations.

`accelerate(model)` changes an existing `DALLE` in place: same weights, same `state_dict`, same outputs and gradients.
`Attention`, `SparseAxialCausalAttention`, `SparseConvCausalAttention` and `SparseAttention` stand for their classes of
the same names, constructor arguments and `state_dict` alike.

What their modules let a token see, and where ours part from them:

- `full` sees all tokens before it; a `static_mask` narrows that. `axial_row` is `AxialRow`, `axial_col` is `Column`,
  `conv_like` is `Convolution(boundary="corner")`, over seq_len + 1 tokens: <bos>, the text and a square image, the last
  token of which a model never feeds. The zeros that pad an image for a convolution take no part in its softmax.
- A padding mask hides keys from every query of `full`; in the axial and convolutional layers it hides text from the
  image alone. A query of `full` that is left with no key gets the mean of all values, later ones included, in theirs
  and so in ours.
- `sparse` needs DeepSpeed, and fails inside their `Transformer` on the argument `cache`; ours does neither. DeepSpeed
  adds their padding mask to the scores as 0 and 1 instead of hiding keys; ours hides them. It also keeps one set of
  block lists per length for all layers, those of the layer that ran first; ours heeds each layer's `master_layout`.
- Dropout follows `to_out`; none falls on the attention itself. It is drawn for the tokens that they pad with too, so
  that a training step under a seed is theirs.
- `generate_images` always keeps keys and values between tokens, in convolutional layers too, whatever `use_cache` says.
  It gives what theirs gives without a cache, drawing the same random numbers in the same order: under one seed the
  tokens are equal unless two candidates lie within rounding of each other. Their own cache mixes up layers that are not
  `full`, and shifts an image prefix twice.
- `model.transformer.compile()` makes two graphs for `generate_images`: one reads the prompt, one serves every token
  after it. `torch.compile(model.generate_images)` makes one, in which every token has its own nodes.
- With `cond_scale` other than 1, theirs overwrites the caption with zeros at the first token, in the caller's tensor
  too, so that guidance ends there. Ours guides every token and leaves the caption alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any, TypeVar

import torch
from torch import nn

from dalle_kernels.backends.choice import check_backend
from dalle_kernels.integrations.dalle_pytorch.attention import (
    AnyAttention,
    Attention,
    SparseAttention,
    SparseAxialCausalAttention,
    SparseConvCausalAttention,
    derive_again,
)
from dalle_kernels.integrations.dalle_pytorch.generation import Generation, Shift
from dalle_kernels.integrations.extension import extend
from dalle_kernels.patterns import AxialRow, Column, TokenLayout

__all__ = ["Attention", "SparseAttention", "SparseAxialCausalAttention", "SparseConvCausalAttention", "accelerate"]

Model = TypeVar("Model", bound=nn.Module)

_REPLACEMENTS = {
    kind.__name__: kind for kind in (Attention, SparseAxialCausalAttention, SparseConvCausalAttention, SparseAttention)
}
_WRAPPERS = ("LayerScale", "PreNorm", "CachedAs", "NonCached", "PreShiftToken")


def accelerate(model: Model, backend: str = "auto") -> Model:
    """Makes a DALLE-pytorch model use our operations, in place.

    Parameters, buffers, hooks and `state_dict` stay what they are; the classes of the attention modules, of the model
    and of a few wrappers change. The model can be copied, pickled and compiled as before.

    Args:
        model: a `dalle_pytorch.DALLE`, of version 1.6.6.
        backend: as in `sparse_attention` and `decode_attention`; another call may change it.

    Returns:
        `model` itself.

    Raises:
        TypeError: if `model` is something else, or a layer of it; nothing has been changed then.
        ValueError: for an unknown backend, or rotary angles that are not equal in pairs.

    Example:
        >>> from dalle_pytorch import DALLE, DiscreteVAE                             # doctest: +SKIP
        >>> from dalle_kernels.integrations.dalle_pytorch import accelerate
        >>> model = accelerate(DALLE(dim=512, vae=DiscreteVAE(), depth=4))           # doctest: +SKIP
        >>> images = model.generate_images(captions)                                 # doctest: +SKIP
    """
    check_backend(backend)
    if not _is_theirs(model, "dalle_pytorch", "DALLE"):
        raise TypeError(f"model: got {_described(model)}, wanted a dalle_pytorch.DALLE (of dalle-pytorch 1.6.6)")
    transformer: Any = model.transformer
    angles = transformer.pos_emb
    if angles is not None and not torch.equal(angles[..., ::2], angles[..., 1::2]):
        raise ValueError("model: got rotary angles pos_emb that differ within a pair of features, wanted equal ones")
    layers = [list(_unwrapped(layer)) for layer in _attention_layers(transformer)]
    for number, (*_, attention) in enumerate(layers):
        _check_attention(number, attention)
    side = transformer.image_fmap_size
    layout = TokenLayout(transformer.seq_len + 1 - side**2, (side, side))
    for number, (*wrappers, attention) in enumerate(layers):
        _replace(attention, layout, backend)
        for wrapper in wrappers:
            if type(wrapper).__name__ == "NonCached":
                wrapper.__class__ = _sibling(wrapper, "CachedAs")
                wrapper.cache_key = f"attn_{number}"
    for module in transformer.modules():
        if _is_theirs(module, "transformer", "PreShiftToken") and not isinstance(module, Shift):
            module.__class__ = extend(Shift, type(module))
    if not isinstance(model, Generation):
        model.__class__ = extend(Generation, type(model))
    return model


def _is_theirs(module: object, file: str, name: str) -> bool:
    return any((kind.__module__, kind.__name__) == (f"dalle_pytorch.{file}", name) for kind in type(module).__mro__)


def _described(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _sibling(module: nn.Module, name: str) -> type:
    """Their class `name` from the file that the class of `module` is from."""
    return getattr(sys.modules[type(module).__module__], name)


def _attention_layers(transformer: Any) -> list[nn.Module]:
    """The first of each pair of layers, reversible or not."""
    sequence = transformer.layers
    if _is_theirs(sequence, "reversible", "ReversibleSequence"):
        return [block.f.net for block in sequence.blocks]
    if _is_theirs(sequence, "reversible", "SequentialSequence"):
        return [attention for attention, _ in sequence.layers]
    raise TypeError(f"model: got layers in a {_described(sequence)}, wanted those of {_wanted()}")


def _unwrapped(module: Any) -> Iterator[Any]:
    """A layer's wrappers from the outside in, and what they wrap."""
    yield module
    while any(_is_theirs(module, "transformer", name) for name in _WRAPPERS):
        module = module.fn
        yield module


def _check_attention(number: int, attention: object) -> None:
    kind = type(attention)
    known = kind.__module__ == "dalle_pytorch.attention" and kind.__name__ in _REPLACEMENTS
    if not known and not isinstance(attention, AnyAttention):
        names = ", ".join(_REPLACEMENTS)
        raise TypeError(f"model: got {_described(attention)} in layer {number}, wanted one of {names} of {_wanted()}")


def _wanted() -> str:
    try:
        return f"dalle-pytorch 1.6.6; installed is {metadata.version('dalle-pytorch')}"
    except metadata.PackageNotFoundError:
        return "dalle-pytorch 1.6.6"


def _replace(attention: Any, layout: TokenLayout, backend: str) -> None:
    """Makes one of their attention modules one of ours, in place: it may stand in several layers."""
    attention.backend = backend
    if isinstance(attention, AnyAttention):
        return
    attention.__class__ = _REPLACEMENTS[type(attention).__name__]
    attention.pattern = attention.derive_pattern()
    if isinstance(attention, SparseAttention):
        attention.register_load_state_dict_post_hook(derive_again)
    elif isinstance(attention, Attention) and attention.causal and attention.static_mask is not None:
        # The masks of optimize_for_inference under their names, which know the text: the cache is read faster so.
        mask = attention.pattern.mask()
        known = (AxialRow(layout), Column(layout))
        same = (pattern for pattern in known if torch.equal(pattern.mask(len(mask)), mask))
        attention.pattern = next(same, attention.pattern)
