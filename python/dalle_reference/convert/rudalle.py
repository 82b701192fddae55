"""ruDALL-E's transformers (Malevich, Kandinsky and their relatives) as a `DalleTransformer`.

They are the same network up to what `TransformerConfig` states: norms after attention and MLP ("sandwich"), a second
norm before the heads, and the convolution's edges, at which the two generations differ ("v2" round the grid, "v3" cut
off). Some of theirs has no counterpart because it changes no number: the rescaled attention scores ("PB relax") have
the same softmax, and the clamp at 65504 only guards float16.

Captions. Their tokenizer begins each with the token 2, so that row of the embedding becomes our start of text. Version
3 has it in the first of its T text positions; version 2 puts one more before, and its masks take the last text position
for the grid's first cell. Where a caption has ended, both write 0, which stands for a row of the position's own, as our
`NO_TOKEN` does; `caption_tokens` translates. They also learn to predict those rows, which our text head leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dalle_kernels import Column, Row
from dalle_reference.config import to_json
from dalle_reference.convert.source import Source, shapes
from dalle_reference.errors import UserError
from dalle_reference.transformer import NO_TOKEN, DalleTransformer, TransformerConfig
from dalle_reference.weights import Weights

KINDS = ("rudalle-v3", "rudalle-v2")

_START = 2
_HEADS = {(24, 2048): 16, (64, 3840): 60, (12, 768): 12}
"""Heads of the published sizes, by layers and width: Malevich and its relatives, Kandinsky, and the dummy."""

_MASKS = tuple(f"transformer.{name}_mask" for name in ("row", "col", "conv"))
_LAYER = re.compile(r"transformer\.layers\.(\d+)\.(.+)\.(weight|bias)")
_IN_LAYER = {
    "input_layernorm": "attention_norm",
    "attention.query_key_value": "attention.project_qkv",
    "attention.dense": "attention.project_out",
    "before_first_addition_layernorm": "attention_out_norm",
    "post_attention_layernorm": "mlp_norm",
    "mlp.dense_h_to_4h": "expand",
    "mlp.dense_4h_to_h": "contract",
    "before_second_addition_layernorm": "mlp_out_norm",
}
_OUTSIDE = {
    "image_embeddings.weight": "image_embedding.weight",
    "transformer.final_layernorm.weight": "final_norm.weight",
    "transformer.final_layernorm.bias": "final_norm.bias",
    "to_logits.0.weight": "head_norm.weight",
    "to_logits.0.bias": "head_norm.bias",
}


def recognises(source: Source) -> bool:
    return "transformer.layers.0.attention.query_key_value.weight" in source.tensors


def convert(source: Source, kind: str | None, heads: int | None) -> Weights:
    """A state dict of rudalle's DalleModel.

    Args:
        source: the file.
        kind: "rudalle-v3" or "rudalle-v2"; where not given, the masks in the file tell, if it has them.
        heads: attention heads, for sizes other than the published ones.
    """
    width, layers = source.size("image_embeddings.weight", 1), source.count("transformer.layers.{}.")
    heads = heads or _HEADS.get((layers, width))
    if heads is None:
        raise UserError(f"{source.path}: heads: {layers} layers of width {width} are no published size; give --heads")
    if heads < 1 or width % heads:
        raise UserError(f"heads: got {heads}, wanted a divisor of the width {width} of {source.path}")
    if layers % 4 == 2:
        raise UserError(
            f"{source.path}: the last of its {layers} layers attends by columns, ours is always the convolution"
        )
    text = source.size("text_pos_embeddings.weight", 0) - 1
    vocab = source.size("text_embeddings.weight", 0) - text
    if vocab <= _START or text < 2:
        raise UserError(f"{source.path}: text_embeddings has {vocab + text} rows for {text} positions, too few")
    config = TransformerConfig(
        vocab_text=vocab,
        text_length=text,
        grid=(source.size("image_row_embeddings.weight", 0), source.size("image_col_embeddings.weight", 0)),
        vocab_image=source.size("image_embeddings.weight", 0),
        layers=layers,
        heads=heads,
        head_dim=width // heads,
        sandwich_norm="transformer.layers.0.before_first_addition_layernorm.weight" in source.tensors,
        head_norm=True,
    )
    variants = {
        "rudalle-v3": replace(config, convolution="clamp"),
        "rudalle-v2": replace(config, convolution="torus", text_length=text + 1, text_on_grid=True),
    }
    kind = _generation(source, kind, variants)
    config = variants[kind]
    tensors = dict(pair for name, tensor in source.tensors.items() for pair in _ours(name, tensor, config))
    source.check("a ruDALL-E transformer", tensors, shapes(DalleTransformer, config))
    return Weights(kind, "transformer", to_json(config), tensors)


def _generation(source: Source, kind: str | None, variants: Mapping[str, TransformerConfig]) -> str:
    """What was asked for, unless the masks in the file are the other generation's; or what they are.

    rudalle itself goes by the name of the model and never looks at masks in a file.
    """
    masks = [source.tensors[name].bool() for name in _MASKS if name in source.tensors]
    fitting = [name for name, config in variants.items() if _fit(masks, config)]
    if kind is not None:
        if fitting and kind not in fitting:
            raise UserError(f"{source.path}: its masks are those of {fitting[0]}, not of {kind}")
        return kind
    if len(fitting) != 1:
        raise UserError(
            f"{source.path}: does not tell its generation; give --kind rudalle-v3 (Malevich v3, Surrealist, Kandinsky)"
            " or --kind rudalle-v2 (Malevich v2, Emojich)"
        )
    return fitting[0]


def _fit(masks: list[Tensor], config: TransformerConfig) -> bool:
    layout = config.layout
    if [mask.shape for mask in masks] != [(layout.length, layout.length)] * len(_MASKS):
        return False
    patterns = (Row(layout), Column(layout), config.patterns[-1])
    return all(torch.equal(mask, pattern.mask()) for mask, pattern in zip(masks, patterns, strict=True))


def _ours(name: str, tensor: Tensor, config: TransformerConfig) -> list[tuple[str, Tensor]]:
    """A tensor under the names that it, or its parts, have in a `DalleTransformer`; unknown ones stay as they are."""
    if (match := _LAYER.fullmatch(name)) and match[2] in _IN_LAYER:
        return [(f"blocks.{match[1]}.{_IN_LAYER[match[2]]}.{match[3]}", tensor)]
    vocab = config.vocab_text
    match name:
        case "text_embeddings.weight":
            # The row of the first position's own is never read by theirs, whose captions begin with the start.
            own = tensor[vocab:] if config.text_on_grid else tensor[vocab + 1 :]
            return [("text_embedding.weight", torch.cat([tensor[:vocab], tensor[_START : _START + 1], own]))]
        case "text_pos_embeddings.weight":
            return [("text_position", tensor[: config.text_length])]
        case "image_row_embeddings.weight":
            return [("row_position", tensor[:, None])]
        case "image_col_embeddings.weight":
            return [("column_position", tensor[None])]
        case "to_logits.1.weight" | "to_logits.1.bias":
            kind, images = name.rpartition(".")[2], len(tensor) - config.vocab_image
            return [(f"text_head.{kind}", tensor[:vocab]), (f"image_head.{kind}", tensor[images:])]
        case _ if name in _MASKS:
            return []
    return [(_OUTSIDE.get(name, name), tensor)]


def caption_tokens(input_ids: Tensor, config: TransformerConfig) -> Tensor:
    """Captions as ruDALL-E's tokenizer gives them, as a converted model takes them.

    Args:
        input_ids: int64 [B, T]: the start, 2, then the caption's tokens, then 0 where it has ended.
        config: of the converted model.

    Returns:
        int64 [B, caption_length], `NO_TOKEN` where a caption has ended.

    Raises:
        ValueError: if there are not T positions, or the first is not the start.

    Example:
        >>> ids = torch.tensor([[2, 17, 5, 3, 0, 0]])
        >>> caption_tokens(ids, TransformerConfig(text_length=6))
        tensor([[17,  5,  3, -1, -1]])
    """
    length = config.layout.text_length
    if input_ids.dim() != 2 or input_ids.shape[1] != length:
        raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)}, wanted [B, {length}]")
    if not bool((input_ids[:, 0] == _START).all()):
        raise ValueError(f"input_ids: got {input_ids[:, 0].tolist()} at the first position, wanted {_START} everywhere")
    tokens = input_ids if config.text_on_grid else input_ids[:, 1:]
    return tokens.masked_fill(tokens == 0, NO_TOKEN)
