"""OpenAI's dVAE, and FLAVA's image codebook, which is its encoder under other names (Singh et al. 2021).

A `DiscreteVAE` is the same network. Two things are said differently: the last convolution of the encoder is the matrix
`to_scores`, and the first one of the decoder is the codebook, whose rows are the columns of its weight.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from dalle_reference.convert import pickles
from dalle_reference.convert.source import Source, shapes
from dalle_reference.dvae import DiscreteVAE, DVAEConfig
from dalle_reference.errors import UserError
from dalle_reference.weights import Weights

KINDS = ("openai-dvae", "flava-codebook")

_RESOLUTION = 256  # of the pictures that both were trained on; the weights do not tell
_FLAVA = "image_codebook."  # what FlavaForPreTraining puts before each name
_BLOCK = re.compile(r"blocks\.group_(\d+)\.block_(\d+)\.(?:res_path\.conv_(\d+)|id_path)\.(weight|bias)")
_HALVES = {"encoder": ("encoder.", "to_scores."), "decoder": ("decoder.", "quantizer.codebook", "code_bias")}


def recognises(source: Source) -> bool:
    """Whether it is an encoder or a decoder of this family."""
    return {"blocks.input.weight", "blocks.output.conv.weight"} <= _renamed(source).tensors.keys()


def convert(sources: Sequence[Source]) -> Weights:
    """An encoder, or an encoder and a decoder in any order."""
    halves: dict[str, Source] = {}
    for source in map(_renamed, sources):
        half = "encoder" if source.size("blocks.input.weight", 3) == 7 else "decoder"
        if half in halves:
            raise UserError(f"{source.path}: is a second {half}, beside {halves[half].path}")
        halves[half] = source
    if "encoder" not in halves:
        raise UserError(f"{halves['decoder'].path}: is a decoder alone; give its encoder as well")
    config: dict[str, Any] = {"resolution": _RESOLUTION}
    for half, source in halves.items():
        for name, value in _config(source, half).items():
            if config.setdefault(name, value) != value:
                raise UserError(f"{source.path}: its {name} is {value}, that of the other file is {config[name]}")
    # Where there is no decoder, its sizes are the default's, and nobody looks at them.
    expected = shapes(DiscreteVAE, DVAEConfig(**config))
    tensors: dict[str, Tensor] = {}
    for half, source in halves.items():
        ours = dict(_ours(half, name, tensor) for name, tensor in source.tensors.items())
        wanted = {name: shape for name, shape in expected.items() if name.startswith(_HALVES[half])}
        source.check(f"the {half} of OpenAI's dVAE", ours, wanted)
        _check_gains(source, config["groups"] * config["blocks"])
        tensors |= ours
    kind = KINDS[any(".group.block_" in name for source in sources for name in source.tensors)]
    if "decoder" in halves:
        return Weights(kind, "dvae", asdict(DVAEConfig(**config)), tensors)
    return Weights(kind, "", config, tensors)


def _renamed(source: Source) -> Source:
    """The same, with OpenAI's names for modules and PyTorch's for parameters, whosever they were."""
    tensors = source.tensors
    if any(name.startswith(_FLAVA) for name in tensors):
        tensors = {name.removeprefix(_FLAVA): t for name, t in tensors.items() if name.startswith(_FLAVA)}
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace(".group.block_", ".block_").replace(".res_path.path.", ".res_path.")
        renamed[re.sub(r"\.w$", ".weight", re.sub(r"\.b$", ".bias", name))] = tensor
    return replace(source, tensors=renamed)


def _config(source: Source, half: str) -> dict[str, int]:
    first, last = "blocks.input.weight", "blocks.output.conv.weight"
    config = {"groups": source.count("blocks.group_{}.", 1), "blocks": source.count("blocks.group_1.block_{}.", 1)}
    if half == "encoder":
        return {**config, "width": source.size(first, 0), "vocab": source.size(last, 0)}
    sizes = {"width": source.size(last, 1), "vocab": source.size(first, 1), "code_width": source.size(first, 0)}
    return {**config, **sizes}


def _ours(half: str, name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """A tensor under the name, and in the shape, that it has in a `DiscreteVAE`; unknown ones stay as they are."""
    if match := _BLOCK.fullmatch(name):
        group, block, convolution, kind = match.groups()
        place = f"convolutions.{int(convolution) - 1}" if convolution else "skip"
        return f"{half}.groups.{int(group) - 1}.{int(block) - 1}.{place}.{kind}", tensor
    pointwise = tensor.flatten(1) if tensor.shape[2:] == (1, 1) else tensor
    match half, name:
        case "encoder", "blocks.input.weight" | "blocks.input.bias":
            return name.replace("blocks.input", "encoder.stem"), tensor
        case "encoder", "blocks.output.conv.weight" | "blocks.output.conv.bias":
            return name.replace("blocks.output.conv", "to_scores"), pointwise
        case "decoder", "blocks.input.weight":
            return "quantizer.codebook", pointwise.t()
        case "decoder", "blocks.input.bias":
            return "code_bias", tensor
        case "decoder", "blocks.output.conv.weight" | "blocks.output.conv.bias":
            return name.replace("blocks.output.conv", "decoder.head"), tensor
    return name, tensor


def _check_gains(source: Source, layers: int) -> None:
    """Pickled modules also say by what their blocks are multiplied, which a `DiscreteVAE` takes from their number."""
    if not isinstance(source.tree, pickles.Record):
        return
    for prefix, state in pickles.modules(source.tree, source.path):
        gain = state.get("post_gain", 1 / layers**2)
        if gain != 1 / layers**2:
            raise UserError(f"{source.path}: {prefix}post_gain is {gain}, wanted 1 / {layers}^2 as OpenAI's has")
