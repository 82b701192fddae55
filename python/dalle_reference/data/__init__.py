"""Captioned pictures: OpenMoji, a folder, or WebDataset shards; decoded once and cached."""

from dalle_reference.data.openmoji import CREDIT as OPENMOJI_CREDIT
from dalle_reference.data.panels import CHANGES, pairs
from dalle_reference.data.pictures import PictureSet, decode_picture
from dalle_reference.data.sources import MOST_PICTURE_BYTES, load_pictures

__all__ = [
    "CHANGES",
    "MOST_PICTURE_BYTES",
    "OPENMOJI_CREDIT",
    "PictureSet",
    "decode_picture",
    "load_pictures",
    "pairs",
]
