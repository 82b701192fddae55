"""One model's weights as one safetensors file whose header says what they are: what `dalle-reference convert` writes.

The header's metadata (strings, as safetensors has it):

    format    "dalle-reference 1"
    kind      what was converted, "openai-dvae" for one
    model     which model of this package runs it, "dvae", "transformer" or "clip"; empty where none does
    config    JSON: the configuration of that model, or what the other project calls its own
    sources   JSON: the SHA-256 of each file that was converted, and its name
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dalle_reference.errors import UserError
from dalle_reference.files import replacing, save_tensors

_FORMAT = "dalle-reference 1"


@dataclass(frozen=True)
class Weights:
    """What such a file holds; the attributes are the header's, and `tensors` by name."""

    kind: str
    model: str
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    sources: Mapping[str, str] = field(default_factory=dict)


def write(path: Path, weights: Weights) -> None:
    """Writes a file, whole or not at all."""
    metadata = {
        "format": _FORMAT,
        "kind": weights.kind,
        "model": weights.model,
        "config": json.dumps(weights.config, ensure_ascii=False),
        "sources": json.dumps(weights.sources, ensure_ascii=False),
    }
    taken: set[int] = set()
    tensors = {}
    for name, tensor in weights.tensors.items():
        whole = tensor.detach().contiguous()
        address = whole.untyped_storage().data_ptr()
        tensors[name] = whole.clone() if address in taken else whole  # safetensors refuses tensors that share memory
        taken.add(address)
    with replacing(path) as draft:
        save_tensors(tensors, draft, metadata)


def read(path: Path) -> Weights:
    """Reads what `write` wrote.

    Raises:
        UserError: if it cannot be read, or was written by something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise UserError(f"{path}: no weights of this package; `dalle-reference convert` makes some of others'")
            config, sources = json.loads(header["config"]), json.loads(header["sources"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            return Weights(header["kind"], header["model"], config, tensors, sources)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read as weights ({error})") from error
