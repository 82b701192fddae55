"""Captioned pictures: OpenMoji, a folder, or WebDataset shards; in memory, or decoded when their turn comes."""

from dalle_reference.data.openmoji import CREDIT as OPENMOJI_CREDIT
from dalle_reference.data.panels import CHANGES, pairs
from dalle_reference.data.pictures import PictureSet, decode_picture
from dalle_reference.data.shards import MOST_PICTURE_BYTES, ShardedPictures
from dalle_reference.data.sources import load_pictures, open_pictures, split_pictures

__all__ = [
    "CHANGES",
    "MOST_PICTURE_BYTES",
    "OPENMOJI_CREDIT",
    "PictureSet",
    "ShardedPictures",
    "decode_picture",
    "load_pictures",
    "open_pictures",
    "pairs",
    "split_pictures",
]
