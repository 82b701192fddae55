"""Which instruction set the CPU kernels use: detected, lowered on request, never raised."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dalle_kernels import native


def test_the_best_that_the_processor_has_is_in_use() -> None:
    assert native.absence() is None
    assert native.NATIVE is not None
    supported = native.NATIVE.supported_isas()
    assert supported == [name for name in ("avx2", "avx512", "avx512_bf16") if name in supported]
    wanted = os.environ.get("DALLE_KERNELS_CPU_ISA", supported[-1])
    assert native.instruction_set() == wanted
    assert f"in use: {wanted}" in native.report()


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    assert native.NATIVE is not None
    before = native.instruction_set()
    with pytest.raises(ValueError, match="avx1024"):
        native.NATIVE.set_isa("avx1024")
    assert native.instruction_set() == before


@pytest.mark.parametrize(
    ("asked", "said"), [("avx2", "in use: avx2"), ("avx1024", "ValueError: DALLE_KERNELS_CPU_ISA")]
)
def test_the_environment_lowers_the_choice_or_is_an_error_at_import(asked: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dalle_kernels.native"],
        env=os.environ | {"DALLE_KERNELS_CPU_ISA": asked},
        capture_output=True,
        text=True,
    )
    assert said in done.stdout + done.stderr
    assert (done.returncode == 0) == (asked == "avx2")
