"""Sheets that show what a model makes of pictures: completions and variations."""

from __future__ import annotations

from pathlib import Path

import torch

from dalle_reference import render
from dalle_reference.pixels import PixelTransformer
from dalle_reference.unclip import PixelDecoder, TokenDecoder


def completion_sheet(
    path: Path,
    model: PixelTransformer,
    pictures: torch.Tensor,
    rows: int,
    *,
    number: int,
    seed: int,
    temperature: float = 1.0,
    heading: str = "",
    footer: str = "",
) -> None:
    """Writes a sheet: in each row the top `rows` of a picture, `number` completions, and the whole picture.

    Args:
        pictures: uint8 [B, 3, S, S].
    """
    given = pictures.clone()
    given[:, :, rows:] = 128
    drawn = model.complete(pictures, rows, seed=seed, number=number, temperature=temperature)
    shown = torch.cat([given[:, None] / 255.0, drawn, pictures[:, None] / 255.0], dim=1)
    captions = ["given", *[""] * number, "the picture"] * len(pictures)
    render.sheet(path, shown.flatten(0, 1), captions, columns=number + 2, heading=heading, footer=footer)


def variation_sheet(
    path: Path,
    decoder: TokenDecoder | PixelDecoder,
    pictures: torch.Tensor,
    vectors: torch.Tensor,
    *,
    number: int,
    seed: int,
    guidance_scale: float = 1.0,
    heading: str = "",
    footer: str = "",
) -> None:
    """Writes a sheet: in each row a picture, and `number` others that are drawn of its vector.

    Args:
        pictures: uint8 [B, 3, S, S].
        vectors: [B, embedding], CLIP's of them.
    """
    drawn = decoder.draw(vectors.repeat_interleave(number, 0), seed=seed, guidance_scale=guidance_scale)
    rows = zip(pictures, drawn.cpu().unflatten(0, (len(pictures), number)), strict=True)
    shown = [image for picture, others in rows for image in (picture.cpu(), *others)]
    captions = ["the picture", *[""] * number] * len(pictures)
    render.sheet(path, shown, captions, columns=number + 1, heading=heading, footer=footer)
