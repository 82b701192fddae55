"""A set of captioned pictures in memory, its split by concept, and the file that caches it."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dalle_reference.errors import UserError
from dalle_reference.files import replacing


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

    def split(self, held_out: float) -> tuple[PictureSet, PictureSet]:
        """(training, held out): a concept, with all its variants, is on one side only.

        The side depends on the concept's name alone, so it stays the same when pictures are added.
        """
        sides: tuple[list[int], list[int]] = ([], [])
        for index, record in enumerate(self.records):
            digest = hashlib.blake2b(record.concept.encode(), digest_size=8).digest()
            sides[int.from_bytes(digest, "big") < held_out * 2.0**64].append(index)
        return self.take(sides[0]), self.take(sides[1])


def decode_picture(data: bytes, resolution: int, name: str) -> torch.Tensor:
    """A picture file's bytes as uint8 [3, resolution, resolution]: cropped to the middle square, on white.

    Raises:
        UserError: if the bytes are no picture, or stop before its end.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as opened:
                opened.load()
                picture = opened.convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{name}: cannot be read as a picture ({error}); repair it or take it out") from error
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.crop((left, top, left + side, top + side)).convert("RGB")
    if side != resolution:
        picture = picture.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def cached(path: Path, make: Callable[[], PictureSet]) -> PictureSet:
    """The set stored at `path`; made and stored there where that file is absent or damaged."""
    if path.exists():
        try:
            return _read(path)
        except (SafetensorError, OSError, KeyError, ValueError):
            path.unlink(missing_ok=True)  # a cache is never worth an error: it is made again
    pictures = make()
    document = [[record.key, record.concept, dict(record.captions)] for record in pictures.records]
    with replacing(path) as draft:
        metadata = {"records": json.dumps(document, ensure_ascii=False), "credit": pictures.credit}
        save_file({"images": pictures.images}, draft, metadata)
    return pictures


def _read(path: Path) -> PictureSet:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        records = tuple(Record(*fields) for fields in json.loads(metadata["records"]))
        return PictureSet(file.get_tensor("images"), records, metadata["credit"])


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
        raise UserError(f"{where}: no pictures found there (wanted .png, .jpg, .jpeg, .webp, .bmp or .gif)")
    return PictureSet(torch.stack(images), tuple(records), credit)
