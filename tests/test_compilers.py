"""The CPU kernels by another compiler, and for another processor: the test programs of csrc/tests judge them.

They compare every kernel with sums in double precision. An emulator runs those for AArch64, which shows their answers
and nothing of their speed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dalle_kernels.backends import native
from tests import cpu_programs


@pytest.mark.parametrize("name", list(cpu_programs.PROGRAMS))
def test_clang(name: str, tmp_path: Path) -> None:
    assert native.NATIVE is not None
    program = cpu_programs.build(name, [cpu_programs.needed("clang++")], ["-O1"], tmp_path)
    assert cpu_programs.run([str(program)]) == native.NATIVE.supported_isas()


# A processor without products of bfloat16, and one with all that the emulator knows.
PROCESSORS = {"cortex-a72": ["neon"], "max": ["neon", "neon_bf16"]}


@pytest.mark.parametrize("name", list(cpu_programs.PROGRAMS))
def test_aarch64(name: str, tmp_path: Path) -> None:
    emulator = cpu_programs.needed("qemu-aarch64")
    compiler = [cpu_programs.needed("aarch64-linux-gnu-g++")]
    program = cpu_programs.build(name, compiler, ["-O1", "-static"], tmp_path)
    for processor, isas in PROCESSORS.items():
        assert cpu_programs.run([emulator, "-cpu", processor, str(program)]) == isas
