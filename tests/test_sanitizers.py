"""The C++ test programs of the CPU kernels, compiled with the address and undefined-behaviour sanitizers, and run.

Where the processor lacks AVX-512 or its bf16 products, csrc/tests/avx512.h stands in for the instructions, so that the
kernels of every instruction set run everywhere.
"""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from benchmarks.kernels.cuda_build import build_cuda
from dalle_kernels.backends import native
from tests import cpu_programs


@pytest.mark.parametrize("name", list(cpu_programs.PROGRAMS))
def test_nothing_is_found(name: str, tmp_path: Path) -> None:
    assert native.NATIVE is not None
    flags = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    emulated = platform.machine() == "x86_64" and "avx512_bf16" not in native.NATIVE.supported_isas()
    if emulated:
        flags.append("-DDALLE_EMULATE_AVX512")
    program = cpu_programs.build(name, build_cuda.compiler(), flags, tmp_path)
    ran = cpu_programs.run([str(program)])
    assert ran == (["avx2", "avx512", "avx512_bf16"] if emulated else native.NATIVE.supported_isas())
