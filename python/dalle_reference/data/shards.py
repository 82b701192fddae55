"""Pictures that do not fit memory: WebDataset shards, of which an index is kept, decoded by processes of their own.

A shard is a tar file of samples: members beside one another that share a name up to its first dot, one of them a
picture. Where each lies is found once and kept. From then on a sample is read where it lies, so which one comes when is
a matter of arithmetic alone, the same for any number of processes and from any step on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import signal
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dalle_reference.data.pictures import Batch, concept_number, decode_picture, first_of_each, on_held_out_side
from dalle_reference.errors import UserError
from dalle_reference.files import replacing

MOST_PICTURE_BYTES = 1 << 29
"""What a picture's file may have."""
MOST_CAPTION_BYTES = 1 << 20
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")
_ENTRY = np.dtype([(name, np.int64) for name in ("shard", "picture", "picture_size", "text", "text_size", "concept")])
_GRACE = 1000
"""Pictures that a share of broken ones is taken of at the least, as the first few say little."""

Place = tuple[int, int, int, int, int]
"""Where a sample lies: its shard, and the first byte and the size of its picture and of its caption's file."""


@cache
def picture_suffixes() -> frozenset[str]:
    """The ends of files' names, such as ".png", that Pillow reads as pictures."""
    Image.init()
    kinds = {kind for kind, mime in Image.MIME.items() if mime.startswith("image/") and kind in Image.OPEN}
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in kinds)


def captions_of(data: bytes, field: str | None, name: str) -> list[str]:
    """What a caption's file says: its lines; where `field` is given, that of a JSON object: a text or a list of texts.

    Raises:
        UserError: if it says something else.
    """
    if len(data) > MOST_CAPTION_BYTES:
        raise UserError(f"{name}: has {len(data)} bytes, wanted at most {MOST_CAPTION_BYTES}")
    try:
        text = data.decode("utf-8-sig")
        said = text.splitlines() if field is None else json.loads(text).get(field) or []
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: the caption is not UTF-8 text ({error})") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{name}: wanted a JSON object with captions in it ({error})") from error
    texts = [said] if isinstance(said, str) else said
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{name}: {field} is {str(said)[:60]!r}, wanted a text or a list of texts")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:  # JSON can name half of a letter, as where a caption was cut
        raise UserError(f"{name}: the caption is not UTF-8 text ({error})") from error
    return [line.strip() for line in texts if line.strip()]


@dataclass(frozen=True)
class Sample:
    """One sample of a shard: its name, the picture's suffix, and its place but for the shard's number."""

    key: str
    suffix: str
    place: tuple[int, int, int, int]


def samples(shard: Path, field: str | None) -> Iterator[Sample]:
    """The samples of a shard that have a picture, in its order.

    Raises:
        UserError: if the file is no tar archive, or ends too early.
    """
    text_suffix = "txt" if field is None else "json"
    try:
        size = shard.stat().st_size
        with tarfile.open(shard, "r:") as archive:
            for key, members in itertools.groupby(_members(archive), key=lambda member: member[0]):
                found: dict[str, tuple[str, int, int]] = {}
                for _, suffix, member in members:
                    if member.offset_data + member.size > size:
                        raise UserError(f"{shard}: ends within {member.name}")
                    kind = "picture" if f".{suffix}" in picture_suffixes() else suffix
                    found.setdefault(kind, (suffix, member.offset_data, member.size))
                if "picture" in found:
                    _, *text = found.get(text_suffix, ("", 0, 0))
                    suffix, *picture = found["picture"]
                    yield Sample(key, suffix, (*picture, *text))  # type: ignore[arg-type]
            with shard.open("rb") as file:  # tarfile takes an end at any header for the end
                file.seek(archive.offset)  # type: ignore[attr-defined]
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise UserError(f"{shard}: cut off, has {size} bytes and no end")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{shard}: cannot be read as a WebDataset shard ({error})") from error


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # else it remembers all of them
        name = _NAME.fullmatch(member.name)
        if name is not None and member.isreg():
            yield name[1], name[2].lower(), member


def open_shards(
    shards: Sequence[Path], resolution: int, cache: Path, *, field: str | None, workers: int, broken: float, stamp: str
) -> ShardedPictures:
    """The pictures of `shards` at `resolution`; the index is kept in `cache` under a name made of `stamp`.

    Raises:
        UserError: if a shard cannot be read, or none has a picture.
    """
    said = f"{_ENTRY}\n{field}\n{stamp}".encode(errors="surrogateescape")
    name = hashlib.blake2b(said, digest_size=10).hexdigest()
    path = cache / f"{name}-index.npy"
    # A cache is never worth an error.
    with suppress(OSError, ValueError, EOFError):
        index = np.load(path, mmap_mode="r", allow_pickle=False)
        if index.dtype == _ENTRY and index.ndim == 1:
            return ShardedPictures(tuple(shards), index, np.arange(len(index)), resolution, field, workers, broken)
    parts = [
        np.array([(number, *sample.place, concept_number(sample.key)) for sample in samples(shard, field)], _ENTRY)
        for number, shard in enumerate(shards)
    ]
    index = np.concatenate(parts)
    if not len(index):
        raise UserError(f"{shards[0]}: no pictures found there, nor in other shards")
    try:
        with replacing(path) as draft:
            np.save(draft, index)
    except UserError as error:
        print(f"the index of the shards is not kept: {error}", file=sys.stderr)
    return ShardedPictures(tuple(shards), index, np.arange(len(index)), resolution, field, workers, broken)


@dataclass(frozen=True)
class ShardedPictures:
    """Pictures in shards: where they lie.

    Attributes:
        shards: tar files.
        index: a row for each sample of theirs.
        chosen: int64 [N], the rows that this set has.
        resolution: the side in pixels that they are decoded to.
        field: of a sample's .json that has its captions; None: they are in its .txt.
        workers: processes that decode; 0: this one does.
        broken: the share of pictures that may be unreadable.
        credit: as a `PictureSet` has it.
    """

    shards: tuple[Path, ...]
    index: np.ndarray
    chosen: np.ndarray
    resolution: int
    field: str | None
    workers: int
    broken: float
    credit: str = ""

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, indices: list[int] | np.ndarray) -> ShardedPictures:
        """The pictures at `indices`, in that order."""
        return replace(self, chosen=self.chosen[indices])

    def one_per_concept(self) -> ShardedPictures:
        """The first picture of each sample's name."""
        return self.take(first_of_each(self.index["concept"][self.chosen]))

    def split(self, held_out: float) -> tuple[ShardedPictures, ShardedPictures]:
        """(training, held out), by the samples' names, as `PictureSet.split`."""
        out = on_held_out_side(self.index["concept"][self.chosen], held_out)
        return self.take(np.flatnonzero(~out)), self.take(np.flatnonzero(out))

    def pictures(self, indices: Sequence[int]) -> torch.Tensor:
        """uint8 [n, 3, S, S], decoded here and now; in an unreadable one's place its nearest readable successor."""
        return self._whole(Tally(self.broken), _Reader.of(self)[self.places(indices)], indices)

    def feed(self, order: Callable[[int], np.ndarray]) -> Feed:
        """A function from (step, ranges of places in its batch) to uint8 pictures [n, 3, S, S] for each range.

        Args:
            order: the pictures of a step's whole batch.
        """
        return Feed(self, order)

    def batches(self, groups: Sequence[range]) -> Iterator[Batch]:
        """The pictures of each group that can be read, in order."""
        tally = Tally(self.broken)
        for group, read in zip(groups, self.read(self.places(group) for group in groups), strict=True):
            tally.add(len(group), read.failures)
            kept = [index for number, index in enumerate(group) if number not in read.failures]
            yield Batch(read.images, read.captions, self.index["concept"][self.chosen[kept]])

    def digest(self) -> str:
        """Of where the pictures lie, how large they are, and what is read of them."""
        digest = hashlib.blake2b(f"{self.resolution} {self.field}".encode(), digest_size=16)
        digest.update(self.index[self.chosen].tobytes())
        return digest.hexdigest()

    def places(self, indices: Sequence[int]) -> list[Place]:
        """Where the pictures of `indices` lie."""
        return [row[:-1] for row in self.index[self.chosen[indices]].tolist()]

    def read(self, groups: Iterable[list[Place]]) -> Iterator[Read]:
        """What is read of each group of places, in order, some groups ahead."""
        loader = DataLoader(
            _Reader.of(self),
            batch_size=None,
            sampler=groups,  # type: ignore[arg-type]  # any iterable of what the data set takes serves
            num_workers=self.workers,
            # Not forked from here: what this process has open, such as its folder's lock, is to end with it.
            multiprocessing_context=_forkserver() if self.workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_interrupts_to_others,
        )
        try:
            yield from loader
        except UserError:
            raise
        # How a DataLoader says that a process of its own is no more: by what it notices first.
        except (RuntimeError, OSError, EOFError) as error:
            raise UserError(f"{self.shards[0].parent}: what decodes its pictures has failed ({error})") from error

    def _whole(self, tally: Tally, read: Read, indices: Sequence[int]) -> torch.Tensor:
        """All pictures that were wanted, others in the place of unreadable ones, the same on whatever process."""
        tally.add(len(indices), read.failures)
        if not read.failures:
            return read.images
        found = iter(read.images)
        return torch.stack(
            [
                self._next_readable(tally, indices[at]) if at in read.failures else next(found)
                for at in range(len(indices))
            ]
        )

    def _next_readable(self, tally: Tally, index: int) -> torch.Tensor:
        while True:
            index = (index + 1) % len(self)
            read = _Reader.of(self)[self.places([index])]
            tally.add(1, read.failures)
            if not read.failures:
                return read.images[0]


class Tally:
    """Counts pictures that cannot be read, names each once, and raises UserError when they are too many."""

    def __init__(self, share: float) -> None:
        self._share, self._read, self._failed = share, 0, 0
        self._named: set[str] = set()

    def add(self, read: int, failures: dict[int, str]) -> None:
        """`failures`: what was wrong, by place among those that were read."""
        self._read += read
        for reason in failures.values():
            self._failed += 1
            if self._failed > self._share * max(self._read, _GRACE):
                raise UserError(f"broken: {self._failed} of {self._read} pictures, wanted {self._share:.2%}; {reason}")
            if reason not in self._named:
                self._named.add(reason)
                print(f"left out: {reason}", file=sys.stderr)


class Feed:
    """See `ShardedPictures.feed`. It reads ahead as long as it is asked for steps one after the other."""

    def __init__(self, pictures: ShardedPictures, order: Callable[[int], np.ndarray]) -> None:
        self._pictures, self._order, self._tally = pictures, order, Tally(pictures.broken)
        self._coming: Iterator[Read] = iter(())
        self._next: tuple[int, list[range]] | None = None

    def __call__(self, step: int, parts: list[range]) -> list[torch.Tensor]:
        if self._next != (step, parts):
            self._coming = self._pictures.read(self._groups(step, parts))
        self._next = (step + 1, parts)
        chosen = [self._order(step)[part.start : part.stop].tolist() for part in parts]
        return [self._pictures._whole(self._tally, next(self._coming), some) for some in chosen]

    def _groups(self, first: int, parts: list[range]) -> Iterator[list[Place]]:
        for step in itertools.count(first):
            order = self._order(step).tolist()
            yield from (self._pictures.places(order[part.start : part.stop]) for part in parts)


@dataclass(frozen=True)
class Read:
    """What came of a group of places.

    Attributes:
        images: uint8 [n, 3, S, S], of those that could be read.
        captions: theirs.
        failures: what was wrong with the others, by their number in the group.
    """

    images: torch.Tensor
    captions: list[list[str]]
    failures: dict[int, str]


@dataclass(frozen=True)
class _Reader(Dataset[Read]):
    """All that a decoding process needs to know: what is small. Places come to it by and by."""

    shards: tuple[Path, ...]
    resolution: int
    field: str | None

    @classmethod
    def of(cls, pictures: ShardedPictures) -> _Reader:
        return cls(pictures.shards, pictures.resolution, pictures.field)

    def __getitem__(self, places: list[Place]) -> Read:
        images, captions, failures = [], [], {}
        for number, (shard, picture, picture_size, text, text_size) in enumerate(places):
            path = self.shards[shard]
            try:
                name = f"{path}: {_member_name(path, picture)}"
                said = captions_of(_bytes(path, text, text_size, MOST_CAPTION_BYTES), self.field, name) if text else []
                image = decode_picture(_bytes(path, picture, picture_size, MOST_PICTURE_BYTES), self.resolution, name)
            except (UserError, OSError) as error:
                failures[number] = str(error)
                continue
            images.append(image)
            captions.append(said)
        empty = torch.empty(0, 3, self.resolution, self.resolution, dtype=torch.uint8)
        return Read(torch.stack(images) if images else empty, captions, failures)


@lru_cache(maxsize=256)  # a run's order reads in some 64 places at a time, each perhaps in several shards
def _opened(path: Path) -> BinaryIO:
    return path.open("rb", buffering=0)


def _bytes(path: Path, first: int, size: int, most: int) -> bytes:
    if size > most:
        raise UserError(f"{path}: has {size} bytes at {first}, wanted at most {most}")
    return os.pread(_opened(path).fileno(), size, first)


def _member_name(path: Path, first: int) -> str:
    """Of the member whose bytes begin at `first`; its header stands before them."""
    header = os.pread(_opened(path).fileno(), tarfile.BLOCKSIZE, first - tarfile.BLOCKSIZE)
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "replace").name
    except tarfile.TarError as error:
        raise UserError(f"{path}: has no sample at {first}, where one was when its index was made") from error


def _as_it_is(read: Any) -> Any:
    return read


def _leave_interrupts_to_others(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _forkserver() -> Any:
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context
