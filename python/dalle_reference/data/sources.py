"""Where pictures come from, by the name on the command line."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from dalle_reference.data import openmoji
from dalle_reference.data.pictures import PictureSet, Record, cached, collect, decode_picture
from dalle_reference.errors import UserError
from dalle_reference.files import read_bounded

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
MOST_PICTURE_BYTES = 1 << 29
"""What a picture's file may have."""
_MOST_CAPTION_BYTES = 1 << 20
_CACHE_VERSION = 2


def default_cache() -> Path:
    """`$DALLE_REFERENCE_CACHE`, or a folder under the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~")) / ".cache"
    return Path(os.environ.get("DALLE_REFERENCE_CACHE") or Path(base) / "dalle_reference")


def load_pictures(source: str, resolution: int, cache: Path | None = None) -> PictureSet:
    """The pictures of `source` at `resolution`, from the cache where they have been decoded before.

    Args:
        source: "openmoji"; a folder of pictures, each with its caption in a .txt of the same stem beside it (one
            caption a line; none is fine); or WebDataset shards: a .tar file or a pattern such as "shards/*.tar".
        resolution: the side in pixels.
        cache: where decoded pictures are kept; `default_cache()` where None.

    Raises:
        UserError: if there is no such source, it is empty, or a picture in it cannot be read.

    Example:
        >>> pictures = load_pictures("openmoji", resolution=32)
        >>> pictures.images.shape[1:]
        torch.Size([3, 32, 32])
    """
    if source == "openmoji":
        stamp = openmoji.version()
        make, credit = (lambda: openmoji.pictures(resolution)), openmoji.CREDIT
    elif source.endswith(".tar"):
        shards = [Path(name) for name in sorted(glob.glob(source))]
        if not shards:
            raise UserError(f"{source}: no such shards")
        stamp = _stamp(shards)
        make, credit = (lambda: _shards(shards, resolution)), ""
    else:
        folder = Path(source)
        if not folder.is_dir():
            raise UserError(f"{source}: no such folder (wanted a folder, .tar shards, or openmoji)")
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (*SUFFIXES, ".txt"))
        stamp = _stamp(files)
        make, credit = (lambda: _folder(files, resolution)), ""
    name = hashlib.blake2b(f"{_CACHE_VERSION}\n{source}\n{stamp}".encode(), digest_size=10).hexdigest()
    path = (cache or default_cache()) / f"{name}-{resolution}.safetensors"
    return cached(path, lambda: collect(make(), credit, source))


def _stamp(files: list[Path]) -> str:
    """Changes when a file is added, taken away or rewritten."""
    try:
        stats = [(path, path.stat()) for path in files]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    return "\n".join(f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)


def _folder(files: list[Path], resolution: int) -> Iterator[tuple[torch.Tensor, Record]]:
    texts = {path.with_suffix("") for path in files if path.suffix.lower() == ".txt"}
    for path in files:
        if path.suffix.lower() == ".txt":
            continue
        stem = path.with_suffix("")
        text = stem.with_suffix(".txt") if stem in texts else None
        image = decode_picture(read_bounded(path, MOST_PICTURE_BYTES), resolution, str(path))
        captions = _captions(read_bounded(text, _MOST_CAPTION_BYTES), str(text)) if text else {}
        yield image, Record(path.name, path.stem, captions)


def _shards(shards: list[Path], resolution: int) -> Iterator[tuple[torch.Tensor, Record]]:
    import webdataset

    for shard in shards:
        try:
            for sample in webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False):
                extension = next((suffix[1:] for suffix in SUFFIXES if suffix[1:] in sample), None)
                if extension is None:
                    continue
                key = sample["__key__"]
                name = f"{shard}: {key}.{extension}"
                captions = _captions(sample["txt"], f"{shard}: {key}.txt") if "txt" in sample else {}
                yield decode_picture(sample[extension], resolution, name), Record(key, key, captions)
        except UserError:
            raise
        except Exception as error:  # what a damaged archive raises depends on where it breaks
            raise UserError(f"{shard}: cannot be read as a WebDataset shard ({error})") from error


def _captions(text: bytes, name: str) -> dict[str, str]:
    """One caption a line; the language is not known, so they are numbered."""
    if len(text) > _MOST_CAPTION_BYTES:
        raise UserError(f"{name}: has {len(text)} bytes, wanted at most {_MOST_CAPTION_BYTES}")
    try:
        lines = text.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: the caption is not UTF-8 text ({error})") from error
    return {str(number): line.strip() for number, line in enumerate(lines) if line.strip()}
