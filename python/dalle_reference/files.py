"""Files appear whole or not at all, are read within bounds, and a run's folder has one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dalle_reference.errors import UserError

_LOCK = ".lock"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path in `path`'s folder, which replaces `path` when the block ends without an error.

    It is synced, then renamed. Where `path` is a link, what it leads to is replaced.

    Raises:
        UserError: if `path` is something other than a file, or cannot be written.

    Example:
        >>> with replacing(Path("note.txt")) as draft:
        ...     draft.write_text("whole")
    """
    path = require_output(path)
    draft = path.parent / f".{path.stem[:64]}-{secrets.token_hex(6)}{path.suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield draft
        sync(draft)
        draft.replace(path)
        sync(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        draft.unlink(missing_ok=True)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file; what fails is an OSError, as it is for other files."""
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def require_output(path: Path, suffix: str = "") -> Path:
    """The file that writing to `path` would make, behind links; asked before any work is done for it.

    Raises:
        UserError: if a file cannot come to be there, or its name does not end in `suffix`.
    """
    if suffix and path.suffix.lower() != suffix:
        raise UserError(f"{path}: got a name that ends in {path.suffix or 'nothing'}, wanted {suffix}")
    target = Path(os.path.realpath(path))
    with suppress(FileNotFoundError, NotADirectoryError):
        if not stat.S_ISREG(target.stat().st_mode):
            what = "a folder" if target.is_dir() else "no ordinary file"
            raise UserError(f"{path}: is {what}; wanted the name of a file to write")
    folder = next(parent for parent in target.parents if parent.exists())
    if not folder.is_dir():
        raise UserError(f"{path}: {folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{path}: {folder} cannot be written to")
    return target


def read_bounded(path: Path, most: int) -> bytes:
    """The bytes of an ordinary file.

    Raises:
        UserError: if there is none that can be read, or it has more than `most` bytes.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: no ordinary file")
        if status.st_size > most:
            raise UserError(f"{path}: has {status.st_size} bytes, wanted at most {most}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Makes `folder` this process's own for the block; a folder that stays empty is taken away again.

    The lock ends with the process, however it ends. File systems without locks are written to without one.

    Raises:
        UserError: if another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _LOCK
    descriptor = _lock(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):
            folder.rmdir()


def _lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 20).decode(errors="replace").strip()
            os.close(descriptor)
            raise UserError(f"{path.parent}: another process ({owner}) is at work there") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                os.close(descriptor)
                raise
        # The one who had it before may have taken the file away since it was opened here.
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            return descriptor
        os.close(descriptor)


def sync(path: Path) -> None:
    """Puts a file's (or folder's) bytes on the disk before anything relies on them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
