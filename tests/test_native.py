"""Which instruction set the CPU kernels use: detected, lowered on request, never raised. And the memory they keep."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from dalle_kernels import TokenLayout, sparse_attention
from dalle_kernels.backends import native
from dalle_kernels.patterns.patterns import Row


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
        [sys.executable, "-m", "dalle_kernels.backends.native"],
        env=os.environ | {"DALLE_KERNELS_CPU_ISA": asked},
        capture_output=True,
        text=True,
    )
    assert said in done.stdout + done.stderr
    assert (done.returncode == 0) == (asked == "avx2")


PATTERN = Row(TokenLayout(64, (16, 16)))
SHAPE = (1, 8, PATTERN.length, 64)  # 655 KB each in float32: large enough to be kept


def keep(megabytes: str, program: str) -> subprocess.CompletedProcess[str]:
    """What `program` prints with DALLE_KERNELS_CPU_KEEP_MB set."""
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"DALLE_KERNELS_CPU_KEEP_MB": megabytes},
        capture_output=True,
        text=True,
    )


def test_a_freed_result_serves_the_next_call() -> None:
    assert native.NATIVE is not None
    q = torch.randn(SHAPE)
    first = sparse_attention(q, q, q, PATTERN)
    address, values, before = first.data_ptr(), first.clone(), native.NATIVE.kept_bytes()
    del first
    assert native.NATIVE.kept_bytes() >= before + values.nbytes
    again = sparse_attention(q, q, q, PATTERN)
    assert again.data_ptr() == address
    other = sparse_attention(q, q, q, PATTERN)
    assert other.data_ptr() != address
    assert torch.equal(again, values)
    assert torch.equal(other, values)


def test_what_is_kept_can_be_given_back() -> None:
    assert native.NATIVE is not None
    q = torch.randn(SHAPE)
    sparse_attention(q, q, q, PATTERN)
    assert native.NATIVE.kept_bytes() > 0
    native.NATIVE.release_kept()
    assert native.NATIVE.kept_bytes() == 0


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.cat([x, x], -1)[..., :64],
        lambda x: torch.stack([x, x], 3).transpose(1, 2)[:, :, :, 1].transpose(1, 2),
        lambda x: x.expand(3, *SHAPE[1:]),
    ],
    ids=["tokens first", "half of each row", "packed", "expanded"],
)
def test_large_results_have_the_strides_that_tracing_expects(view) -> None:
    q = view(torch.randn(SHAPE))
    assert sparse_attention(q, q, q, PATTERN).stride() == torch.empty_like(q).stride()


PROGRAM = f"""
import torch
from dalle_kernels import TokenLayout, sparse_attention
from dalle_kernels.backends import native
from dalle_kernels.patterns.patterns import Row
q = torch.randn({SHAPE})
results = [sparse_attention(q, q, q, Row(TokenLayout(64, (16, 16)))) for _ in range(6)]
del results
print(native.NATIVE.kept_bytes())
"""


@pytest.mark.parametrize(
    ("megabytes", "least", "most"), [("0", 0, 0), ("2", 1 << 20, 2 << 20), ("", 3 << 20, 256 << 20)]
)
def test_what_is_kept_has_a_limit(megabytes: str, least: int, most: int) -> None:
    done = keep(megabytes, PROGRAM)
    assert done.returncode == 0, done.stderr
    assert least <= int(done.stdout) <= most


@pytest.mark.parametrize("megabytes", ["much", "-1", "nan"])
def test_a_limit_that_is_no_number_is_an_error_at_import(megabytes: str) -> None:
    done = keep(megabytes, "import dalle_kernels.backends.native")
    assert done.returncode != 0
    assert f"ValueError: DALLE_KERNELS_CPU_KEEP_MB: got '{megabytes}', wanted a number of megabytes" in done.stderr
