"""Pairs of panels: a picture, and below it what its caption says became of it (Ramesh et al. 2021, section 3.3)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch

from dalle_reference.data.pictures import PictureSet, Record


def _grey(images: torch.Tensor) -> torch.Tensor:
    return images.float().mean(dim=-3, keepdim=True).round().to(images.dtype).expand_as(images)


CHANGES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "upside down": lambda images: images.flip(-2),
    "turned to the left": lambda images: images.rot90(1, (-2, -1)),
    "in grey": _grey,
    "in other colours": lambda images: images.roll(1, -3),  # red becomes green, green blue, blue red
}
"""Captions, and what they make of pictures uint8 [..., 3, S, S]."""


def pairs(pictures: PictureSet) -> tuple[PictureSet, PictureSet]:
    """(training, held out): every picture with each of `CHANGES`, but for one, which is held out.

    All pictures and all changes are trained on, but not all combinations. Which one of a picture is held out depends on
    its concept's name alone.

    Returns:
        Sets of images uint8 [N, 3, 2 S, S].
    """
    images = pictures.images
    changed = torch.stack([torch.cat([images, change(images)], dim=-2) for change in CHANGES.values()], dim=1)
    sides: tuple[list[int], list[int]] = ([], [])
    records = []
    for index, record in enumerate(pictures.records):
        name = record.concept.encode(errors="surrogateescape")
        digest = hashlib.blake2b(name, digest_size=8, person=b"panels").digest()
        held_out = int.from_bytes(digest, "big") % len(CHANGES)
        for number, caption in enumerate(CHANGES):
            sides[number == held_out].append(len(CHANGES) * index + number)
            records.append(Record(f"{record.key} {caption}", record.concept, {"en": caption}))
    together = PictureSet(changed.flatten(0, 1), tuple(records), pictures.credit)
    return together.take(sides[0]), together.take(sides[1])
