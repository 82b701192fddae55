"""Where pictures come from, by the name on the command line."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

import torch
from braceexpand import braceexpand

from dalle_reference.data import openmoji
from dalle_reference.data.pictures import PictureSet, Record, cached, collect, decode_picture
from dalle_reference.data.shards import (
    MOST_CAPTION_BYTES,
    MOST_PICTURE_BYTES,
    ShardedPictures,
    captions_of,
    open_shards,
    picture_suffixes,
    samples,
)
from dalle_reference.errors import UserError
from dalle_reference.files import read_bounded

if TYPE_CHECKING:
    from dalle_reference.config import DataConfig, StreamedSourceConfig

_CACHE_VERSION = 3


class _Pictures(Protocol):
    """What all sets of pictures can be asked, those in memory, in shards, and as tokens."""

    def __len__(self) -> int: ...
    def take(self, indices: list[int]) -> Self: ...
    def one_per_concept(self) -> Self: ...
    def split(self, held_out: float) -> tuple[Self, Self]: ...


P = TypeVar("P", bound=_Pictures)


def default_cache() -> Path:
    """`$DALLE_REFERENCE_CACHE`, or a folder under the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~")) / ".cache"
    return Path(os.environ.get("DALLE_REFERENCE_CACHE") or Path(base) / "dalle_reference")


def load_pictures(
    source: str, resolution: int, cache: Path | None = None, caption_field: str | None = None
) -> PictureSet:
    """The pictures of `source` at `resolution`, from the cache where they have been decoded before.

    Args:
        source: "openmoji"; a folder of pictures, each with its caption in a .txt of the same stem beside it (one
            caption a line; none is fine); or WebDataset shards, as `find_shards` takes them.
        resolution: the side in pixels.
        cache: where decoded pictures are kept; `default_cache()` where None.
        caption_field: of a .json beside a picture, in place of the .txt, that has a caption or a list of them.

    Raises:
        UserError: if there is no such source, it is empty, or a picture in it cannot be read.

    Example:
        >>> pictures = load_pictures("openmoji", resolution=32)
        >>> pictures.images.shape[1:]
        torch.Size([3, 32, 32])
    """
    if source == "openmoji":
        if caption_field is not None:
            raise UserError(f"caption_field: got {caption_field} with openmoji, which has captions of its own")
        stamp = openmoji.version()
        make, credit = (lambda: openmoji.pictures(resolution)), openmoji.CREDIT
    elif shards := find_shards(source):
        stamp = _stamp(shards)
        make, credit = (lambda: _sharded(shards, resolution, caption_field)), ""
    else:
        folder = Path(source)
        if not folder.is_dir():
            raise UserError(f"{source}: no such folder (wanted a folder, .tar shards, or openmoji)")
        text = ".txt" if caption_field is None else ".json"
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (*picture_suffixes(), text))
        stamp = _stamp(files)
        make, credit = (lambda: _folder(files, resolution, caption_field)), ""
    said = f"{_CACHE_VERSION}\n{source}\n{caption_field}\n{stamp}".encode(errors="surrogateescape")
    digest = hashlib.blake2b(said, digest_size=10)
    path = (cache or default_cache()) / f"{digest.hexdigest()}-{resolution}.safetensors"
    return cached(path, lambda: collect(make(), credit, source))


def open_pictures(
    data: StreamedSourceConfig, resolution: int, cache: Path | None = None
) -> PictureSet | ShardedPictures:
    """As `load_pictures`; but shards stay where they are, and are decoded when their turn comes.

    Raises:
        UserError: if there is no such source, it is empty, or a picture of a folder cannot be read.
    """
    shards = find_shards(data.source)
    if not shards:
        return load_pictures(data.source, resolution, cache, data.caption_field)
    return open_shards(
        shards,
        resolution,
        cache or default_cache(),
        field=data.caption_field,
        workers=data.workers,
        broken=data.broken,
        stamp=_stamp(shards),
    )


def split_pictures(pictures: P, data: DataConfig, what: str = "pictures") -> tuple[P, P]:
    """(training, held out), as a configuration says; it may leave out some of those to train on.

    Args:
        what: they are, for the error.

    Raises:
        UserError: if there is nothing to train on.
    """
    training, held_out = pictures.split(data.held_out)
    if not len(training):
        raise UserError(f"{data.source}: no {what} to train on")
    if data.one_per_concept:
        training = training.one_per_concept()
    if data.pictures is not None and data.pictures < len(training):
        training = training.take([number * len(training) // data.pictures for number in range(data.pictures)])
    return training, held_out


def find_shards(source: str) -> list[Path]:
    """The tar files that `source` names, sorted; none if it is the name of something else.

    Args:
        source: patterns such as "shards/*.tar" or "shards/{000..127}.tar", with :: between them.

    Raises:
        UserError: for a pattern that no file has.
    """
    if ".tar" not in source:
        return []
    try:
        patterns = [pattern for part in source.split("::") for pattern in braceexpand(part)]
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    if not all(pattern.endswith(".tar") for pattern in patterns):
        return []
    found = {pattern: glob.glob(pattern) for pattern in patterns}
    missing = [pattern for pattern, names in found.items() if not names]
    if missing:
        raise UserError(f"{missing[0]}: no such shards")
    return sorted({Path(name) for names in found.values() for name in names})


def _stamp(files: list[Path]) -> str:
    """Changes when a file is added, taken away or rewritten."""
    try:
        stats = [(path, path.stat()) for path in files]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    return "\n".join(f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)


def _folder(files: list[Path], resolution: int, caption_field: str | None) -> Iterator[tuple[torch.Tensor, Record]]:
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() not in picture_suffixes()}
    for path in files:
        if path.suffix.lower() not in picture_suffixes():
            continue
        text = texts.get(path.with_suffix(""))
        image = decode_picture(read_bounded(path, MOST_PICTURE_BYTES), resolution, str(path))
        said = captions_of(read_bounded(text, MOST_CAPTION_BYTES), caption_field, str(text)) if text else []
        yield image, Record(path.name, path.stem, _numbered(said))


def _sharded(shards: list[Path], resolution: int, caption_field: str | None) -> Iterator[tuple[torch.Tensor, Record]]:
    for shard in shards:
        with shard.open("rb") as file:
            for sample in samples(shard, caption_field):
                first, size, text, text_size = sample.place
                name = f"{shard}: {sample.key}"
                file.seek(text)
                said = captions_of(file.read(text_size), caption_field, name) if text else []
                file.seek(first)
                image = decode_picture(file.read(size), resolution, f"{name}.{sample.suffix}")
                yield image, Record(sample.key, sample.key, _numbered(said))


def _numbered(captions: list[str]) -> dict[str, str]:
    """Captions by language; which it is is not known, so they are numbered."""
    return {str(number): caption for number, caption in enumerate(captions)}
