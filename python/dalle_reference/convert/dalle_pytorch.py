"""What DALLE-pytorch's train_vae.py and train_dalle.py save, under DALLE-pytorch's own names.

The settings that it saves beside the weights become the file's configuration: `hparams` for a VAE; for a DALLE also
`vae_params` (null where the VAE is a pretrained one, whose weights are in the file too, under "vae."), `vae_class_name`
and `version`, where the file has them. The state of the optimizer is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from dalle_reference.convert.source import Source
from dalle_reference.errors import UserError
from dalle_reference.weights import Weights

KINDS = ("dalle-pytorch-vae", "dalle-pytorch")

_BESIDE = ("vae_params", "vae_class_name", "version")
_OTHERS = ("vae.", "text_emb.", "image_emb.", "text_pos_emb.", "image_pos_emb.", "transformer.pos_emb", "logits_mask")
_MOST = 1000
"""Layers at most; a settings entry decides how many names are made up."""

Shape = tuple[str, tuple[int, ...]]


def recognises(source: Source) -> bool:
    return isinstance(source.tree, dict) and {"hparams", "weights"} <= source.tree.keys()


def convert(source: Source, kind: str | None) -> Weights:
    """Either file; one with `vae_params` is a DALLE's."""
    tree: Mapping[str, Any] = source.tree if isinstance(source.tree, dict) else {}
    hparams = tree.get("hparams")
    if not isinstance(hparams, dict):
        raise UserError(f"{source.path}: has no hparams beside its weights, as DALLE-pytorch saves them")
    config: dict[str, Any] = {"hparams": _plain(hparams)}
    if kind == "dalle-pytorch-vae" or (kind is None and "vae_params" not in tree):
        source.check("DALLE-pytorch's DiscreteVAE", source.tensors, dict(_vae(source, config["hparams"])))
        return Weights("dalle-pytorch-vae", "", config, source.tensors)
    config |= {name: _plain(tree[name]) for name in _BESIDE if name in tree}
    _check_dalle(source, config["hparams"])
    return Weights("dalle-pytorch", "", config, source.tensors)


def _plain(value: Any, depth: int = 8) -> Any:
    """A setting as JSON has it; what is no plain data is named, and what is nested beyond reason left out."""
    if depth == 0:
        return "..."
    if isinstance(value, dict):
        return {str(key): _plain(inner, depth - 1) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return [_plain(inner, depth - 1) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


class _Settings:
    """Whole numbers of `hparams`, with DALLE-pytorch's defaults."""

    def __init__(self, source: Source, hparams: dict[str, Any]) -> None:
        self._source, self._hparams = source, hparams

    def __call__(self, name: str, default: int | None = None, most: int = 1 << 24) -> int:
        value = self._hparams.get(name, default)
        if type(value) is not int or not 0 <= value <= most:
            raise UserError(f"{self._source.path}: hparams: {name} is {value!r}, wanted an int in 0 .. {most}")
        return value


def _vae(source: Source, hparams: dict[str, Any]) -> Iterator[Shape]:
    """Every tensor of a DiscreteVAE with these settings."""
    get = _Settings(source, hparams)
    tokens, code, width = get("num_tokens", 512), get("codebook_dim", 512), get("hidden_dim", 64)
    channels, layers, blocks = get("channels", 3), get("num_layers", 3, _MOST), get("num_resnet_blocks", 0, _MOST)
    yield "codebook.weight", (tokens, code)
    for layer in range(layers):
        yield from _convolution(f"encoder.{layer}.0", width if layer else channels, width, 4)
    for block in range(blocks):
        yield from _residual(f"encoder.{layers + block}", width)
    yield from _convolution(f"encoder.{layers + blocks}", width, tokens, 1)
    at = 0
    if blocks:
        yield from _convolution("decoder.0", code, width, 1)
        for block in range(blocks):
            yield from _residual(f"decoder.{1 + block}", width)
        at = 1 + blocks
    for layer in range(layers):
        inputs = width if layer or blocks else code
        yield f"decoder.{at + layer}.0.weight", (inputs, width, 4, 4)  # transposed: its inputs come first
        yield f"decoder.{at + layer}.0.bias", (width,)
    yield from _convolution(f"decoder.{at + layers}", width, channels, 1)


def _residual(name: str, width: int) -> Iterator[Shape]:
    for at, kernel in ((0, 3), (2, 3), (4, 1)):
        yield from _convolution(f"{name}.net.{at}", width, width, kernel)


def _convolution(name: str, inputs: int, outputs: int, kernel: int) -> Iterator[Shape]:
    yield from ((f"{name}.weight", (outputs, inputs, kernel, kernel)), (f"{name}.bias", (outputs,)))


def _check_dalle(source: Source, hparams: dict[str, Any]) -> None:
    """Raises UserError unless all that every DALLE has is there, and nothing outside it.

    Layers are wrapped more or less deep, for shifted tokens and caches ("fn.fn.fn."); that depth is not looked at.
    """
    get = _Settings(source, hparams)
    dim, inner = get("dim"), get("heads", 8) * get("dim_head", 64)
    text = get("num_text_tokens", 10000) + get("text_seq_len", 256)
    reversible, shared = bool(hparams.get("reversible")), bool(hparams.get("share_input_output_emb"))
    total = source.size("to_logits.1.weight", 0)
    expected: dict[str, tuple[int, ...]] = {
        "to_logits.0.weight": (dim,),
        "to_logits.0.bias": (dim,),
        "to_logits.1.weight": (total, dim),
        "to_logits.1.bias": (total,),
    }
    for name, rows in (("text_emb", text), ("image_emb", total - text)):
        expected |= {f"{name}.linear.weight": (total, dim)} if shared else {f"{name}.weight": (rows, dim)}
    layers = []
    for layer in range(get("depth", None, _MOST)):
        attention, feed = (
            f"transformer.layers.blocks.{layer}.{half}.net."
            if reversible
            else f"transformer.layers.layers.{layer}.{at}."
            for at, half in enumerate("fg")
        )
        layers += [attention, feed]
        for start in (attention, feed):
            expected |= {f"{start}scale": (1, 1, dim), f"{start}fn.norm.weight": (dim,), f"{start}fn.norm.bias": (dim,)}
        expected |= {
            f"{attention}fn.to_qkv.weight": (3 * inner, dim),
            f"{attention}fn.to_out.0.weight": (dim, inner),
            f"{attention}fn.to_out.0.bias": (dim,),
            f"{feed}fn.net.0.weight": (8 * dim, dim),
            f"{feed}fn.net.0.bias": (8 * dim,),
            f"{feed}fn.net.3.weight": (dim, 4 * dim),
            f"{feed}fn.net.3.bias": (dim,),
        }
    known = (*_OTHERS, *layers)
    found = {re.sub(r"(?<=\.)(?:fn\.)+", "fn.", name): tensor for name, tensor in source.tensors.items()}
    found = {name: tensor for name, tensor in found.items() if name in expected or not name.startswith(known)}
    source.check("DALLE-pytorch's DALLE", found, expected)
