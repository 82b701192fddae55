"""OpenAI's and open_clip's CLIP as our `CLIP`, from safetensors with their own names or with those of transformers.

They are one network but for the activation, which no weight tells: OpenAI's were trained with an approximation of GELU,
most of open_clip's with GELU itself. So the kind is asked for. Their tokenizer does not come along.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dalle_reference.clip import CLIP, CLIPConfig
from dalle_reference.config import to_json
from dalle_reference.convert.source import Source, shapes
from dalle_reference.errors import UserError
from dalle_reference.weights import Weights

KINDS = ("openai-clip", "open-clip")

_OPENAI, _TRANSFORMERS = "visual.class_embedding", "vision_model.embeddings.class_embedding"

_HEADS = {1280: 16, 1408: 16, 1664: 16}
"""Heads of the picture's transformer at widths where a head is not 64 wide (open_clip's H, g and G)."""

_UNUSED = re.compile(r".*\.position_ids|input_resolution|context_length|vocab_size")

_OUTSIDE = {
    _OPENAI: "class_token",
    "visual.positional_embedding": "position",
    "visual.conv1.weight": "patch_embedding.weight",
    "visual.ln_pre": "pre_norm",
    "visual.ln_post": "post_norm",
    "token_embedding.weight": "text_embedding.weight",
    "positional_embedding": "text_position",
    "ln_final": "text_norm",
    "logit_scale": "log_scale",
    _TRANSFORMERS: "class_token",
    "vision_model.embeddings.position_embedding.weight": "position",
    "vision_model.embeddings.patch_embedding.weight": "patch_embedding.weight",
    "vision_model.pre_layrnorm": "pre_norm",
    "vision_model.post_layernorm": "post_norm",
    "visual_projection": "project",
    "text_model.embeddings.token_embedding.weight": "text_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "text_position",
    "text_model.final_layer_norm": "text_norm",
    "text_projection": "text_project",
}
_TRANSPOSED = {"visual.proj": "project.weight", "text_projection": "text_project.weight"}
"""OpenAI's projections are matrices by which rows are multiplied."""

_BLOCKS = {
    "visual.transformer.resblocks": "blocks",
    "vision_model.encoder.layers": "blocks",
    "transformer.resblocks": "text_blocks",
    "text_model.encoder.layers": "text_blocks",
}
_IN_BLOCK = {
    "ln_1": "attention_norm",
    "layer_norm1": "attention_norm",
    "attn.in_proj": "attention.project_qkv",
    "attn.out_proj": "attention.project_out",
    "self_attn.out_proj": "attention.project_out",
    "ln_2": "mlp_norm",
    "layer_norm2": "mlp_norm",
    "mlp.c_fc": "expand",
    "mlp.fc1": "expand",
    "mlp.c_proj": "contract",
    "mlp.fc2": "contract",
}
_BLOCK = re.compile(rf"({'|'.join(map(re.escape, _BLOCKS))})\.(\d+)\.(.+)[._](weight|bias)")
_PART = re.compile(r"(.+\.self_attn)\.([qkv])_proj\.(weight|bias)")


def recognises(source: Source) -> bool:
    return not source.tensors.keys().isdisjoint((_OPENAI, _TRANSFORMERS))


def convert(source: Source, kind: str | None) -> Weights:
    """A state dict of OpenAI's or open_clip's CLIP, or of transformers' CLIPModel."""
    if kind is None:
        raise UserError(f"{source.path}: a CLIP; give --kind openai-clip, or open-clip for one trained with GELU")
    joined = _with_joined_projections(source.tensors)
    tensors = dict(_ours(name, tensor) for name, tensor in joined.items() if not _UNUSED.fullmatch(name))
    ours = Source(source.path, tensors, tensors)
    width, patch, text_width = (
        ours.size(name, side) for name, side in (("position", 1), ("patch_embedding.weight", 3), ("text_position", 1))
    )
    config = CLIPConfig(
        resolution=math.isqrt(max(1, ours.size("position", 0) - 1)) * patch,
        patch=patch,
        width=width,
        layers=ours.count("blocks.{}."),
        heads=_HEADS.get(width, max(1, width // 64)),
        vocab_text=ours.size("text_embedding.weight", 0),
        text_length=ours.size("text_position", 0),
        text_width=text_width,
        text_layers=ours.count("text_blocks.{}."),
        text_heads=max(1, text_width // 64),
        embedding=ours.size("project.weight", 0),
        activation="quick_gelu" if kind == "openai-clip" else "gelu",
    )
    source.check("a CLIP", tensors, shapes(CLIP, config))
    return Weights(kind, "clip", to_json(config), tensors)


def _with_joined_projections(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values, which transformers has apart, as the one product that OpenAI has."""
    joined = {name: tensor for name, tensor in tensors.items() if not _PART.fullmatch(name)}
    for name in tensors:
        if (match := _PART.fullmatch(name)) and match[2] == "q":
            parts = [tensors.get(f"{match[1]}.{part}_proj.{match[3]}") for part in "qkv"]
            if all(part is not None for part in parts):
                place = match[1].removesuffix("self_attn")
                joined[f"{place}attn.in_proj.{match[3]}"] = torch.cat([part for part in parts if part is not None])
    return joined


def _ours(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """A tensor under the name, and in the shape, that it has in a `CLIP`; unknown ones stay as they are."""
    if (match := _BLOCK.fullmatch(name)) and match[3] in _IN_BLOCK:
        return f"{_BLOCKS[match[1]]}.{match[2]}.{_IN_BLOCK[match[3]]}.{match[4]}", tensor
    if name in _TRANSPOSED:
        return _TRANSPOSED[name], tensor.t()
    stem, _, kind = name.rpartition(".")
    if name in _OUTSIDE:
        return _OUTSIDE[name], tensor
    return (f"{_OUTSIDE[stem]}.{kind}" if stem in _OUTSIDE else name), tensor
