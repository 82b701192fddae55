"""Compiles the C++ test programs of the CPU kernels (csrc/tests), with any compiler for any processor."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
FLAGS = ("-std=c++20", f"-I{CSRC}", "-Wno-psabi", "-Wno-ignored-attributes")
# A program, the rooms whose kernels it runs, and what else it needs.
PROGRAMS = {
    "attention": (("attention", "decode"), ("isa.cpp", "attention/plan.cpp")),
    "codebook": (("codebook", "likelihood", "sampling"), ("isa.cpp",)),
}


def needed(tool: str) -> str:
    """The path of a tool that not every machine has: without it the test is skipped, in CI it fails."""
    if path := shutil.which(tool):
        return path
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI has to have {tool} (.ci/run installs it)")
    pytest.skip(f"{tool} is not installed here")


def build(name: str, compiler: Sequence[str], flags: Sequence[str], folder: Path) -> Path:
    """The program `name` of PROGRAMS. `flags` are given to the compiler and to the linker."""
    rooms, others = PROGRAMS[name]
    sources = [CSRC / "tests" / f"{name}.cpp", *(CSRC / other for other in others)]
    sources += [path for room in rooms for path in sorted((CSRC / room).glob("cpu_*.cpp"))]

    def compiled(item: tuple[int, Path]) -> Path:
        index, source = item
        out = folder / f"{index}.o"
        done = subprocess.run(
            [*compiler, *FLAGS, *flags, "-c", str(source), "-o", str(out)], capture_output=True, text=True
        )
        assert done.returncode == 0, f"{source}: {done.stderr}"
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, enumerate(sources)))
    program = folder / name
    subprocess.run([*compiler, *flags, *map(str, objects), "-o", str(program)], check=True)
    return program


def run(command: Sequence[str]) -> list[str]:
    """The instruction sets whose kernels the program ran and found right."""
    done = subprocess.run(list(command), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.removesuffix(" done") for line in done.stdout.splitlines() if line.endswith(" done")]
