"""Checkpoints: a folder with the tensors (safetensors) and a small JSON that says what they are.

    checkpoints/step-00000200/tensors.safetensors
                              checkpoint.json       format, kind, step, configuration, size, digest of both

The folder is written under a hidden name, synced and renamed, so a checkpoint that can be seen is whole: a kill at any
moment leaves the one before. What is read is checked against the digest, and every fault is one `UserError`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dalle_reference import weights
from dalle_reference.errors import UserError
from dalle_reference.files import save_tensors, sync

_FORMAT = 2
_TENSORS, _DOCUMENT = "tensors.safetensors", "checkpoint.json"
_FIELDS = {"format": int, "kind": str, "step": int, "config": dict, "bytes": int, "blake2b": str}


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds.

    Attributes:
        path: the folder.
        kind: what it is of, "dvae" for one.
        step: steps that had been made.
        config: the configuration it was made with, as JSON has it.
        tensors: by name; "model.", "ema." and "optimizer." say whose they are.
    """

    path: Path
    kind: str
    step: int
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names start with `prefix` and a dot, without it."""
        start = prefix + "."
        return {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}


def save(
    run: Path, kind: str, step: int, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], keep: int = 2
) -> Path:
    """Writes `run/checkpoints/step-...` and takes away all but the newest `keep`. Returns its path."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    target = folder / f"step-{step:08d}"
    draft = folder / f".{target.name}"
    draft.mkdir()
    try:
        save_tensors({name: value.detach().contiguous() for name, value in tensors.items()}, draft / _TENSORS)
        document = {
            "format": _FORMAT,
            "kind": kind,
            "step": step,
            "config": config,
            "bytes": (draft / _TENSORS).stat().st_size,
        }
        document["blake2b"] = _digest(draft / _TENSORS, document)
        (draft / _DOCUMENT).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in (draft / _TENSORS, draft / _DOCUMENT, draft):
            sync(path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)  # which may be what fills the disk
        raise
    if target.exists():  # the same step again: the old one steps aside, so that there is always a whole one
        aside = folder / f".{target.name}.old"
        target.rename(aside)
        draft.rename(target)
        shutil.rmtree(aside)
    else:
        draft.rename(target)
    sync(folder)
    for old in _list(run)[:-keep]:
        shutil.rmtree(old)
    return target


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    found = _list(run)
    return found[-1] if found else None


def _list(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def load(path: Path, kind: str) -> Checkpoint:
    """Reads a checkpoint folder, the newest checkpoint of a run's folder, or a file of converted weights.

    Raises:
        UserError: if there is none, it is damaged, or it is of another kind.
    """
    if path.is_file():
        converted = weights.read(path)
        if converted.model != kind:
            can = f"runs as a {converted.model}" if converted.model else "can be run by no model of this package alone"
            raise UserError(f"{path}: {converted.kind}, which {can}; wanted a {kind}")
        tensors = {f"ema.{name}": tensor for name, tensor in converted.tensors.items()}
        return Checkpoint(path, kind, 0, {"model": dict(converted.config)}, tensors)
    if not (path / _DOCUMENT).exists():
        newest = latest(path)
        if newest is None:
            raise UserError(f"{path}: no checkpoint there")
        path = newest
    try:
        document = json.loads((path / _DOCUMENT).read_text(encoding="utf-8"))
        for name, kind_of in _FIELDS.items():
            if type(document[name]) is not kind_of:
                raise ValueError(f"{_DOCUMENT}: {name} is {document[name]!r}")
        if document["format"] != _FORMAT:
            raise ValueError(f"format {document['format']}, this version reads {_FORMAT}")
        size = (path / _TENSORS).stat().st_size
        if size != document["bytes"]:
            raise ValueError(f"{_TENSORS} has {size} bytes of {document['bytes']}")
        if _digest(path / _TENSORS, document) != document["blake2b"]:
            raise ValueError("it is not what was written: its digest differs")
        tensors = load_file(path / _TENSORS)
        found = Checkpoint(path, document["kind"], document["step"], document["config"], tensors)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        others = [other.name for other in path.parent.glob("step-*") if other != path]
        hint = f"; take it away to go on from {max(others)}" if others else ""
        raise UserError(f"{path}: damaged checkpoint ({error}){hint}") from error
    if found.kind != kind:
        raise UserError(f"{path}: a checkpoint of a {found.kind}, wanted one of a {kind}")
    return found


def _digest(path: Path, document: Mapping[str, Any]) -> str:
    """Of the tensors' file, and of all that the document says but the digest."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
    said = {name: value for name, value in document.items() if name != "blake2b"}
    digest.update(json.dumps(said, sort_keys=True).encode())
    return digest.hexdigest()


def require_same(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """The run that goes on has the configuration it began with.

    Raises:
        UserError: naming every entry that differs.
    """
    before, now = _flat(checkpoint.config), _flat(config)
    differing = [
        f"{name} was {before.get(name, 'absent')}, is {now.get(name, 'absent')}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if differing:
        raise UserError(f"{checkpoint.path}: made with another configuration: {'; '.join(differing)}")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def restore(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], where: Path) -> None:
    """Gives `module` the weights `tensors`.

    Raises:
        UserError: if they are not this module's.
    """
    try:
        module.load_state_dict(dict(tensors))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: the weights are of another configuration: {reason}") from error
