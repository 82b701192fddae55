"""Checkpoints: a folder of tensors (safetensors, a file from each process) and a small JSON that says what they are.

    checkpoints/step-00000200/shard-00001-....safetensors
                              checkpoint.json       format, kind, step, configuration, each file's size and digest

torch.distributed.checkpoint writes and reads the tensors, so what several processes saved, each its part, any other
number of them can load. The folder is written under a hidden name, synced and renamed, so a checkpoint that can be seen
is whole: a kill at any moment leaves the one before. `begin` copies the tensors and leaves the writing to a thread,
while training goes on. What is read is checked against the digests, and every fault is one `UserError`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dalle_reference import weights
from dalle_reference.errors import UserError
from dalle_reference.files import sync
from dalle_reference.parallel import ALONE, Elsewhere, World

# torch warns so of a process that has no group, from whatever thread; a thread cannot silence it for itself alone.
warnings.filterwarnings("ignore", message=".*assuming the intent is to (save|load) in a single process")
_FORMAT = 3
_DOCUMENT = "checkpoint.json"
_FIELDS = {"format": int, "kind": str, "step": int, "config": dict, "files": dict, "blake2b": str}


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds, or a file of converted weights.

    Attributes:
        path: the folder, or the file.
        kind: "dvae", "transformer" or the like.
        step: steps that had been made.
        config: the configuration it was made with, as JSON has it.
        tensors: of converted weights, which are in memory already; a folder's stay there until they are asked for.
    """

    path: Path
    kind: str
    step: int
    config: dict[str, Any]
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names start with `prefix` and a dot, without it: "model", "ema" or "optimizer"."""
        start = prefix + "."
        if not self.path.is_dir():
            return {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}
        stated = _stated(self.path).items()
        found = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in stated
            if name.startswith(start)
        }
        self._load(found, ALONE)
        return {name.removeprefix(start): value for name, value in found.items()}

    def names(self) -> set[str]:
        """Of all tensors, whole."""
        return set(_stated(self.path) if self.path.is_dir() else self.tensors)

    def read(self, tensors: Mapping[str, torch.Tensor], world: World = ALONE) -> None:
        """Fills `tensors`, by their whole names, in place; of a sharded tensor each process reads its part.

        Raises:
            UserError: if the checkpoint has no such tensors, or others beside them under the same prefixes.
        """
        world.first(lambda: self._require({name: tuple(tensor.shape) for name, tensor in tensors.items()}))
        if self.path.is_dir():
            self._load(tensors, world)
            return
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(self.tensors[name])

    def _load(self, tensors: Mapping[str, torch.Tensor], world: World) -> None:
        with _torch_errors(world):
            dcp.load(dict(tensors), storage_reader=_reader(self.path), no_dist=world.size == 1)

    def _require(self, wanted: dict[str, tuple[int, ...]]) -> None:
        if self.path.is_dir():
            shapes = {name: tuple(entry.size) for name, entry in _stated(self.path).items()}
        else:
            shapes = {name: tuple(value.shape) for name, value in self.tensors.items()}
        prefixes = {name.partition(".")[0] for name in wanted}
        stray = sorted(name for name in shapes.keys() - wanted.keys() if name.partition(".")[0] in prefixes)
        for name, shape in wanted.items():
            if shapes.get(name) != shape:
                reason = f"{name} is {list(shapes[name])}" if name in shapes else f"{name} is absent"
                raise UserError(
                    f"{self.path}: the weights are of another configuration: {reason}, wanted {list(shape)}"
                )
        if stray:
            raise UserError(f"{self.path}: the weights are of another configuration: {stray[0]} is not this model's")


def save(
    run: Path,
    kind: str,
    step: int,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    keep: int = 2,
    world: World = ALONE,
) -> Path:
    """Writes `run/checkpoints/step-...` and takes away all but the newest `keep`. Returns its path.

    Every process calls it, with the same names; of a sharded tensor each writes its part, of others one does.
    """
    return begin(run, kind, step, config, tensors, keep, world).result()


def begin(
    run: Path,
    kind: str,
    step: int,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    keep: int = 2,
    world: World = ALONE,
) -> Future[Path]:
    """As `save`, but returns when the tensors are copied; what failed later is the future's.

    Args:
        world: until the future is done its group is the writer's: no other question may be asked in it.
    """
    folder = run / "checkpoints"
    target = folder / f"step-{step:08d}"
    draft = folder / f".{target.name}"

    def make_draft() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step-*"):
            shutil.rmtree(leftover)
        draft.mkdir()

    def publish(written: list[dict[str, list[Any]]]) -> Path:
        files = {name: entry for some in written for name, entry in some.items()}
        document = {"format": _FORMAT, "kind": kind, "step": step, "config": config, "files": files}
        document["blake2b"] = _digest(document)
        (draft / _DOCUMENT).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in (draft / _DOCUMENT, draft):
            sync(path)
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

    def finish(tensors_written: Future[Any]) -> Path:
        with _clean(draft, world):
            with _torch_errors(world):
                tensors_written.result()
            mine: dict[str, list[Any]] = {}
            with world.together():
                for path in sorted(draft.iterdir())[world.rank :: world.size]:
                    sync(path)
                    mine[path.name] = [path.stat().st_size, _file_digest(path)]
            written = world.collect(mine)
            return world.first(lambda: publish(written))

    world.first(make_draft)
    with _clean(draft, world), _torch_errors(world):
        tensors_written = dcp.async_save(
            {name: value.detach().contiguous() for name, value in tensors.items()},
            # which copies the tensors before it returns
            storage_writer=dcp.HuggingFaceStorageWriter(str(draft), save_distributed=True),
            process_group=world.group,
            no_dist=world.size == 1,
        )
    thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    finished = thread.submit(finish, cast(Future[Any], tensors_written))
    thread.shutdown(wait=False)
    return finished


@contextmanager
def _clean(draft: Path, world: World) -> Iterator[None]:
    """Takes the draft away where writing fails: it may be what fills the disk."""
    try:
        yield
    except BaseException:
        if world.main:
            shutil.rmtree(draft, ignore_errors=True)
        raise


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    found = _list(run)
    return found[-1] if found else None


def _list(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def load(path: Path, kind: str, world: World = ALONE) -> Checkpoint:
    """Opens a checkpoint folder, the newest checkpoint of a run's folder, or a file of converted weights.

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
    found, files = world.first(lambda: _open(path, kind))
    with world.together(), _damages(found.path):
        for name in sorted(files)[world.rank :: world.size]:
            size, digest = files[name]
            has = (found.path / name).stat().st_size
            if has != size:
                raise ValueError(f"{name} has {has} bytes of {size}")
            if _file_digest(found.path / name) != digest:
                raise ValueError(f"{name} is not what was written: its digest differs")
    return found


def _open(path: Path, kind: str) -> tuple[Checkpoint, dict[str, list[Any]]]:
    """A checkpoint by its document, and the files that it names."""
    if not (path / _DOCUMENT).exists():
        newest = latest(path)
        if newest is None:
            raise UserError(f"{path}: no checkpoint there")
        path = newest
    with _damages(path):
        document = json.loads((path / _DOCUMENT).read_text(encoding="utf-8"))
        for name, kind_of in _FIELDS.items():
            if type(document[name]) is not kind_of:
                raise ValueError(f"{_DOCUMENT}: {name} is {document[name]!r}")
        if document["format"] != _FORMAT:
            raise ValueError(f"format {document['format']}, this version reads {_FORMAT}")
        if _digest(document) != document["blake2b"]:
            raise ValueError(f"{_DOCUMENT} is not what was written: its digest differs")
    if document["kind"] != kind:
        raise UserError(f"{path}: a checkpoint of a {document['kind']}, wanted one of a {kind}")
    return Checkpoint(path, kind, document["step"], document["config"]), document["files"]


@contextmanager
def _damages(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        others = [other.name for other in path.parent.glob("step-*") if other != path]
        hint = f"; take it away to go on from {max(others)}" if others else ""
        raise UserError(f"{path}: damaged checkpoint ({error}){hint}") from error


@contextmanager
def _torch_errors(world: World) -> Iterator[None]:
    """torch.distributed.checkpoint collects what failed on any process; here each has its own error again."""
    try:
        yield
    except CheckpointException as failed:
        if world.rank not in failed.failures:
            raise Elsewhere from failed
        error = failed.failures[world.rank][0]
        if isinstance(error, SafetensorError):
            raise OSError(str(error)) from failed
        raise error from failed


def _reader(path: Path) -> dcp.HuggingFaceStorageReader:
    return dcp.HuggingFaceStorageReader(str(path))


def _stated(path: Path) -> dict[str, TensorStorageMetadata]:
    """The tensors of a folder, by name."""
    return cast(dict[str, TensorStorageMetadata], _reader(path).read_metadata().state_dict_metadata)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _digest(document: Mapping[str, Any]) -> str:
    """Of all that the document says but the digest."""
    said = {name: value for name, value in document.items() if name != "blake2b"}
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).hexdigest()


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
