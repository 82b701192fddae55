"""Objects kept between builds: one is made again when its command, its source or a header that it includes changed."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path


def compiler() -> list[str]:
    """$CXX, which may hold a wrapper and arguments, such as "ccache g++"."""
    return shlex.split(os.environ.get("CXX") or "c++")


def run(command: list[str]) -> str:
    """What `command` prints.

    Raises:
        RuntimeError: with the command and its words, when it fails.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def digest(paths: list[Path], salt: str) -> str:
    """A short name for the contents of `paths` and `salt`."""
    whole = hashlib.sha256(salt.encode())
    for path in paths:
        whole.update(path.read_bytes())
    return whole.hexdigest()[:16]


def compile_object(source: Path, command: list[str], folder: Path, name: str, salt: str = "") -> Path:
    """The object file of `source` in `folder`, compiled by `command` unless it is there already.

    The compiler lists the headers that it read, in `name`.d; the object's name carries a digest of their contents, of
    the command and of `salt` (what else matters: versions of compilers and of what lies in system headers). What the
    compiler printed lies beside the object, as .txt.
    """
    listed = folder / f"{name}.d"
    salt = " ".join([*command, salt])
    if listed.exists():
        read = [Path(line) for line in listed.read_text().splitlines()]
        if all(path.exists() for path in read):
            target = folder / f"{name}.{digest(read, salt)}.o"
            if target.exists():
                return target
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        made, rule, names = (Path(partial, kind) for kind in ("object", "rule", "names"))
        printed = run([*command, "-MMD", "-MF", str(rule), "-c", str(source), "-o", str(made)])
        read = _prerequisites(rule.read_text())
        names.write_text("\n".join(map(str, read)))
        target = folder / f"{name}.{digest(read, salt)}.o"
        for stale in folder.glob(f"{name}.*.o"):
            stale.unlink()
        target.with_suffix(".txt").write_text(printed)
        os.replace(made, target)
        os.replace(names, listed)
    return target


def _prerequisites(rule: str) -> list[Path]:
    """The files after the colon of a makefile's rule, as `-MF` writes it."""
    names = re.split(r"(?<!\\)\s+", rule.replace("\\\n", " ").split(":", 1)[1].strip())
    return sorted({Path(name.replace("\\ ", " ")).resolve() for name in names})
