"""Files appear whole or not at all: written under a temporary name beside the target, synced, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path in `path`'s folder, which replaces `path` when the block ends without an error.

    Example:
        >>> with replacing(Path("note.txt")) as draft:
        ...     draft.write_text("whole")
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    draft = Path(name)
    try:
        yield draft
        sync(draft)
        draft.chmod(0o644)
        draft.replace(path)
        sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Puts a file's (or folder's) bytes on the disk before anything relies on them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
