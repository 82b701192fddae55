"""Compiles the emulation: the CUDA kernels' own sources as C++ against a small emulation of the machine.

`build()` returns two libraries: the emulator's own test kernels as a Python module, and the project's CUDA operations
registered with torch for CPU tensors as `torch.ops.dalle_kernels_emulated`. Objects are kept under build/emulation
and made again when a source, a header that it includes or a flag changed.
"""

from __future__ import annotations

import fcntl
import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pybind11
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "emulation"
OUTPUT = ROOT / "build" / "emulation"
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))

import object_cache  # noqa: E402  (csrc/cuda/object_cache.py)

FLAGS = ["-O2", "-std=c++20", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
INCLUDES = [HERE / "include", ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
SYSTEM_INCLUDES = cpp_extension.include_paths()


class Emulation(NamedTuple):
    """Paths of the two libraries that `build` makes."""

    machine: Path
    operations: Path


def _compile(source: Path, torch_headers: bool) -> Path:
    includes = [f"-I{path}" for path in INCLUDES]
    if torch_headers:
        includes += [f"-isystem{path}" for path in SYSTEM_INCLUDES]
    command = [*object_cache.compiler(), *FLAGS, *includes, "-x", "c++"]
    name = str(source.relative_to(ROOT)).replace("/", "_")
    return object_cache.compile_object(source, command, OUTPUT, name, f"torch {torch.__version__}")


def _link(objects: list[Path], name: str, extra: list[str]) -> Path:
    target = OUTPUT / f"{name}.{object_cache.digest(objects, ' '.join(extra))}.so"
    if not target.exists():
        for stale in OUTPUT.glob(f"{name}.*.so"):
            stale.unlink()
        object_cache.run(
            [*object_cache.compiler(), "-shared", *map(str, objects), *extra, "-o", f"{target}.{os.getpid()}"]
        )
        os.replace(f"{target}.{os.getpid()}", target)
    return target


def build(jobs: int = 2) -> Emulation:
    """Compiles what changed and links both libraries; processes that build at the same time take turns.

    Raises:
        RuntimeError: the compiler's words, when it fails.
    """
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with (OUTPUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(jobs)


def _build(jobs: int) -> Emulation:
    kernels = sorted((ROOT / "csrc").rglob("*.cu"))
    glue = sorted((ROOT / "csrc").rglob("cuda_op.cpp"))
    sources = [(path, False) for path in (HERE / "emulator.cpp", HERE / "machine_tests.cpp", *kernels)]
    sources += [(path, True) for path in glue]
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(lambda item: _compile(*item), sources))
    library = str(Path(torch.__file__).parent / "lib")
    emulator, machine_tests, *kernel_objects = objects
    machine = _link([emulator, machine_tests], "emulation_machine", [])
    torch_libraries = [f"-L{library}", "-ltorch", "-ltorch_cpu", "-lc10"]
    operations = _link([emulator, *kernel_objects], "emulation_operations", torch_libraries)
    return Emulation(machine, operations)
