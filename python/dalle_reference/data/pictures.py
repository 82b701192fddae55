"""A set of captioned pictures in memory, its split by concept, and the file that caches it."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open

from dalle_reference.errors import UserError
from dalle_reference.files import replacing, save_tensors

_BAND = 1 << 20
"""Pixels that are turned into colours at a time."""


@dataclass(frozen=True)
class Record:
    """What is known of one picture: where it came from, what it shows, and its captions by language."""

    key: str
    concept: str
    captions: Mapping[str, str]


@dataclass(frozen=True)
class PictureSet:
    """Pictures of one size and their records.

    Attributes:
        images: uint8 [N, 3, S, S].
        records: N of them, in the same order.
        credit: the line that whoever shows these pictures must show too; empty where there is none.
    """

    images: torch.Tensor
    records: tuple[Record, ...]
    credit: str = ""

    def __len__(self) -> int:
        return len(self.records)

    def take(self, indices: list[int]) -> PictureSet:
        """The pictures at `indices`, in that order."""
        return PictureSet(self.images[indices], tuple(self.records[i] for i in indices), self.credit)

    def captioned(self) -> PictureSet:
        """The pictures that have at least one caption."""
        return self.take([i for i, record in enumerate(self.records) if record.captions])

    def one_per_concept(self) -> PictureSet:
        """The first picture of each concept: without its variants, such as those by skin tone."""
        first = {record.concept: index for index, record in reversed(list(enumerate(self.records)))}
        return self.take(sorted(first.values()))

    def split(self, held_out: float) -> tuple[PictureSet, PictureSet]:
        """(training, held out): a concept, with all its variants, is on one side only.

        The side depends on the concept's name alone, so it stays the same when pictures are added.
        """
        out = on_held_out_side(
            np.array([concept_number(record.concept) for record in self.records], np.int64), held_out
        )
        return self.take(np.flatnonzero(~out).tolist()), self.take(np.flatnonzero(out).tolist())

    def pictures(self, indices: Sequence[int]) -> torch.Tensor:
        """uint8 [n, 3, S, S]."""
        return self.images[list(indices)]

    def feed(self, order: Callable[[int], np.ndarray]) -> Callable[[int, list[range]], list[torch.Tensor]]:
        """A function from (step, ranges of places in its batch) to uint8 pictures [n, 3, S, S] for each range.

        Args:
            order: the pictures of a step's whole batch.
        """
        return lambda step, parts: [self.images[order(step)[part.start : part.stop]] for part in parts]

    def batches(self, groups: Sequence[range]) -> Iterator[Batch]:
        """The pictures of each group, in order."""
        for group in groups:
            captions = [list(self.records[index].captions.values()) for index in group]
            yield Batch(self.pictures(group), captions, self._concepts(group))

    def digest(self) -> str:
        """Of the pictures and what is known of them."""
        digest = hashlib.blake2b(repr(self.records).encode(), digest_size=16)
        digest.update(self.images.numpy().data)
        return digest.hexdigest()

    def _concepts(self, indices: Sequence[int]) -> np.ndarray:
        return np.array([concept_number(self.records[index].concept) for index in indices], np.int64)


@dataclass(frozen=True)
class Batch:
    """Pictures beside one another in a set.

    Attributes:
        images: uint8 [n, 3, S, S].
        captions: of each; none is fine.
        concepts: int64 [n], a number for what each shows.
    """

    images: torch.Tensor
    captions: list[list[str]]
    concepts: np.ndarray


def concept_number(concept: str) -> int:
    """63 bits that stand for a concept's name, which as a file's name may be no text."""
    name = concept.encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1


def first_of_each(concepts: np.ndarray) -> np.ndarray:
    """The places, in order, at which concepts stand for the first time."""
    return np.sort(np.unique(concepts, return_index=True)[1])


def on_held_out_side(concepts: np.ndarray, share: float) -> np.ndarray:
    """Which of `concepts`, int64 [N], are kept out of training."""
    return concepts < int(share * 2.0**63)


def decode_picture(data: bytes, resolution: int, name: str) -> torch.Tensor:
    """A picture file's bytes as uint8 [3, resolution, resolution]: upright, its middle square, on white.

    Raises:
        UserError: if the bytes are no picture, stop before its end, or say no colours (32-bit greys have no white).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as opened:
                opened.load()
                _turn_upright(opened)
                picture = _middle_square(opened, resolution)
    except Exception as error:  # what a damaged file raises depends on its format
        reason = "its bytes begin like no picture's" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{name}: cannot be read as a picture ({reason}); repair it or take it out") from error
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def _turn_upright(picture: Image.Image) -> None:
    """As the camera's EXIF says that it is looked at. What EXIF says amiss is not worth a picture."""
    with suppress(Exception):  # damaged EXIF raises as many things as a damaged file
        ImageOps.exif_transpose(picture, in_place=True)


def _middle_square(picture: ImageFile.ImageFile, resolution: int) -> Image.Image:
    """The middle square as RGB on white, [resolution, resolution].

    Across first, a band of rows at a time, then down, as Pillow does it too: so a large picture is never whole in
    memory as colours, which for one bit a pixel are 32 times the file.
    """
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    across = Image.new("RGB", (resolution, side))
    rows = max(1, _BAND // side)
    for start in range(0, side, rows):
        end = min(start + rows, side)
        band = _on_white(picture.crop((left, top + start, left + side, top + end)), picture.format)
        across.paste(band.resize((resolution, end - start), Image.Resampling.LANCZOS), (0, start))
    return across.resize((resolution, resolution), Image.Resampling.LANCZOS)


def _on_white(band: Image.Image, kind: str | None) -> Image.Image:
    if band.mode.startswith("I;16") or (band.mode == "I" and kind == "PPM"):
        # Pillow's own conversion cuts off what is above 255.
        grey = np.asarray(band).astype(np.uint32)
        clear = grey == band.info.get("transparency", -1)
        band = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
        band.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    elif band.mode in ("I", "F"):
        raise ValueError(f"32-bit greys (mode {band.mode}) do not say what is white")
    colours = band.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")


def cached(path: Path, make: Callable[[], PictureSet]) -> PictureSet:
    """The set stored at `path`; made and stored there where that file is absent or damaged."""
    # A cache is never worth an error: what cannot be read is made again, what cannot be kept is used once.
    with suppress(SafetensorError, OSError, LookupError, TypeError, ValueError):
        return _read(path)
    pictures = make()
    document = [[record.key, record.concept, dict(record.captions)] for record in pictures.records]
    metadata = {"records": json.dumps(document), "credit": pictures.credit}
    try:
        with replacing(path) as draft:
            save_tensors({"images": pictures.images}, draft, metadata)
    except UserError as error:
        print(f"the decoded pictures are not kept: {error}", file=sys.stderr)
    return pictures


def _read(path: Path) -> PictureSet:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        records = tuple(Record(*fields) for fields in json.loads(metadata["records"]))
        images = file.get_tensor("images")
        if images.dtype != torch.uint8 or images.dim() != 4 or len(images) != len(records):
            raise ValueError(f"images: got {images.dtype} {tuple(images.shape)} for {len(records)} records")
        return PictureSet(images, records, metadata["credit"])


def collect(pictures: Iterator[tuple[torch.Tensor, Record]], credit: str, where: str) -> PictureSet:
    """Stacks what a source yields.

    Raises:
        UserError: if it yields nothing.
    """
    images: list[torch.Tensor] = []
    records: list[Record] = []
    for image, record in pictures:
        images.append(image)
        records.append(record)
    if not images:
        raise UserError(f"{where}: no pictures found there (wanted .png, .jpg, .webp or what else Pillow reads)")
    return PictureSet(torch.stack(images), tuple(records), credit)
