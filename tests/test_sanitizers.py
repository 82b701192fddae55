"""The C++ test programs of the CPU kernels, compiled with the address and undefined-behaviour sanitizers, and run.

Where the processor lacks AVX-512 or its bf16 products, csrc/tests/avx512.h stands in for the instructions, so that the
kernels of every instruction set run everywhere.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from dalle_kernels.backends import native

CSRC = Path(__file__).resolve().parents[1] / "csrc"
# The program, the rooms whose kernels it runs, and what else it needs.
PROGRAMS = [
    ("attention.cpp", ("attention", "decode"), ("isa.cpp", "attention/plan.cpp")),
    ("codebook.cpp", ("codebook", "likelihood", "sampling"), ("isa.cpp",)),
]


@pytest.mark.parametrize(("name", "rooms", "others"), PROGRAMS, ids=["attention", "codebook"])
def test_nothing_is_found(name: str, rooms: tuple[str, ...], others: tuple[str, ...], tmp_path: Path) -> None:
    assert native.NATIVE is not None
    compiler = os.environ.get("CXX", "c++")
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    flags = ["-std=c++20", "-O0", "-fopenmp", f"-I{CSRC}", "-Wno-psabi", "-Wno-ignored-attributes", *sanitizers]
    if "avx512_bf16" not in native.NATIVE.supported_isas():
        flags.append("-DDALLE_EMULATE_AVX512")
    sources = [CSRC / "tests" / name, *(CSRC / other for other in others)]
    sources += [path for room in rooms for path in sorted((CSRC / room).glob("cpu_*.cpp"))]
    objects = [tmp_path / f"{index}.o" for index in range(len(sources))]
    compilers = [
        subprocess.Popen([compiler, *flags, "-c", str(source), "-o", str(out)], stderr=subprocess.PIPE, text=True)
        for source, out in zip(sources, objects, strict=True)
    ]
    for process, source in zip(compilers, sources, strict=True):
        _, said = process.communicate()
        assert process.returncode == 0, f"{source}: {said}"
    program = tmp_path / "program"
    subprocess.run([compiler, *sanitizers, *map(str, objects), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "avx512_bf16" in result.stdout
