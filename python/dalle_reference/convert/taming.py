"""taming-transformers' Gumbel VQGAN (Esser et al. 2021), ruDALL-E's f8 among them, under taming's own names.

    encoder.*  quant_conv.*  quantize.proj.*  quantize.embed.weight  post_quant_conv.*  decoder.*

What trained it (`loss.*`, the discriminator among it) is left out. The configuration that taming reads from a YAML
file beside the weights is told from their shapes, under the same names: ddconfig, n_embed, embed_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dalle_reference.convert.source import Source
from dalle_reference.errors import UserError
from dalle_reference.weights import Weights

KINDS = ("taming-gumbel",)

_RESOLUTION = 256  # only the ratio of attn_resolutions to it has a meaning
_PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
_IN_RUDALLE = "model."  # what ruDALL-E's VQGanGumbelVAE puts before each name

Shape = tuple[str, tuple[int, ...]]


def recognises(source: Source) -> bool:
    names = source.tensors.keys()
    return any(
        {f"{start}quantize.proj.weight", f"{start}encoder.conv_in.weight"} <= names for start in ("", _IN_RUDALLE)
    )


def convert(source: Source) -> Weights:
    """A state dict or Lightning's checkpoint of a GumbelVQ, or a state dict of ruDALL-E's VQGanGumbelVAE."""
    names = {name: name.removeprefix(_IN_RUDALLE) for name in source.tensors}
    kept = {ours: source.tensors[name] for name, ours in names.items() if ours.startswith(_PARTS)}
    source = replace(source, tensors=kept)
    if any(name.startswith("decoder.decoder.") for name in kept):
        raise UserError(f"{source.path}: ruDALL-E's variant with a wavelet decoder, which is not converted")
    config = _config(source)
    source.check("a Gumbel VQGAN", kept, dict(_expected(config)))
    return Weights(KINDS[0], "", config, kept)


def _config(source: Source) -> dict[str, Any]:
    levels = source.count("encoder.down.{}.")
    width = source.size("encoder.conv_in.weight", 0)
    channels = [source.size(f"encoder.down.{level}.block.0.conv1.weight", 0) for level in range(levels)]
    z_channels = source.size("decoder.conv_in.weight", 1)
    attending = [level for level in range(levels) if source.count(f"encoder.down.{level}.attn.{{}}.")]
    ddconfig = {
        "double_z": source.size("encoder.conv_out.weight", 0) == 2 * z_channels,
        "z_channels": z_channels,
        "resolution": _RESOLUTION,
        "in_channels": source.size("encoder.conv_in.weight", 1),
        "out_ch": source.size("decoder.conv_out.weight", 0),
        "ch": width,
        "ch_mult": [count // width for count in channels],
        "num_res_blocks": source.count("encoder.down.0.block.{}."),
        "attn_resolutions": [_RESOLUTION >> level for level in attending],
        "dropout": 0.0,
    }
    codes, code_width = (source.size("quantize.embed.weight", dimension) for dimension in (0, 1))
    return {"embed_dim": code_width, "n_embed": codes, "ddconfig": ddconfig}


def _expected(config: dict[str, Any]) -> Iterator[Shape]:
    """Every tensor of a GumbelVQ of this configuration."""
    dd, codes, code_width = config["ddconfig"], config["n_embed"], config["embed_dim"]
    z, blocks, levels = dd["z_channels"], dd["num_res_blocks"], len(dd["ch_mult"])
    widths = [dd["ch"] * factor for factor in dd["ch_mult"]]
    attending = [_RESOLUTION >> level in dd["attn_resolutions"] for level in range(levels)]
    yield from _convolution("quant_conv", z, code_width, 1)
    yield from _convolution("quantize.proj", z, codes, 1)
    yield "quantize.embed.weight", (codes, code_width)
    yield from _convolution("post_quant_conv", code_width, z, 1)

    yield from _convolution("encoder.conv_in", dd["in_channels"], dd["ch"], 3)
    inputs = dd["ch"]
    for level in range(levels):
        for block in range(blocks):
            yield from _residual(f"encoder.down.{level}.block.{block}", inputs, widths[level])
            inputs = widths[level]
            if attending[level]:
                yield from _attention(f"encoder.down.{level}.attn.{block}", inputs)
        if level + 1 < levels:
            yield from _convolution(f"encoder.down.{level}.downsample.conv", inputs, inputs, 3)
    yield from _ends("encoder", inputs, 2 * z if dd["double_z"] else z, inputs)

    yield from _convolution("decoder.conv_in", z, inputs, 3)
    middle = inputs
    for level in reversed(range(levels)):
        for block in range(blocks + 1):
            yield from _residual(f"decoder.up.{level}.block.{block}", inputs, widths[level])
            inputs = widths[level]
            if attending[level]:
                yield from _attention(f"decoder.up.{level}.attn.{block}", inputs)
        if level:
            yield from _convolution(f"decoder.up.{level}.upsample.conv", inputs, inputs, 3)
    yield from _ends("decoder", middle, dd["out_ch"], inputs)


def _ends(half: str, middle: int, outputs: int, last: int) -> Iterator[Shape]:
    """The middle of a half, `middle` wide, and its last convolution, from `last` channels."""
    yield from _residual(f"{half}.mid.block_1", middle, middle)
    yield from _attention(f"{half}.mid.attn_1", middle)
    yield from _residual(f"{half}.mid.block_2", middle, middle)
    yield from _norm(f"{half}.norm_out", last)
    yield from _convolution(f"{half}.conv_out", last, outputs, 3)


def _residual(name: str, inputs: int, outputs: int) -> Iterator[Shape]:
    yield from _norm(f"{name}.norm1", inputs)
    yield from _convolution(f"{name}.conv1", inputs, outputs, 3)
    yield from _norm(f"{name}.norm2", outputs)
    yield from _convolution(f"{name}.conv2", outputs, outputs, 3)
    if inputs != outputs:
        yield from _convolution(f"{name}.nin_shortcut", inputs, outputs, 1)


def _attention(name: str, width: int) -> Iterator[Shape]:
    yield from _norm(f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        yield from _convolution(f"{name}.{part}", width, width, 1)


def _norm(name: str, width: int) -> Iterator[Shape]:
    yield from ((f"{name}.weight", (width,)), (f"{name}.bias", (width,)))


def _convolution(name: str, inputs: int, outputs: int, kernel: int) -> Iterator[Shape]:
    yield from ((f"{name}.weight", (outputs, inputs, kernel, kernel)), (f"{name}.bias", (outputs,)))
