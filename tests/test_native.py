"""Which instruction set the CPU kernels use: detected, lowered on request, never raised. And the memory they keep."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch

from dalle_kernels import TokenLayout, logit_laplace_nll, sparse_attention
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


def test_the_layout_of_a_result_is_that_of_empty_like() -> None:
    """Permuted, cut, expanded and stretched tensors of up to five dimensions, against torch itself."""
    generator = random.Random(0)
    for _ in range(400):
        dimensions = generator.randint(1, 5)
        x = torch.rand([generator.choice([1, 2, 3, 5]) for _ in range(dimensions)]) / 2 + 0.25
        x = x.permute(generator.sample(range(dimensions), dimensions))
        for d in range(dimensions):
            choice = generator.randrange(4)
            if choice == 0:
                x = x.narrow(d, 0, generator.randint(1, x.shape[d]))
            elif choice == 1:
                x = x[(slice(None),) * d + (slice(None, None, 2),)]
            elif choice == 2 and x.shape[d] == 1:
                x = x.expand(*x.shape[:d], 3, *x.shape[d + 1 :])
        result = logit_laplace_nll(x, x, x, backend="cpu")
        assert result.stride() == torch.empty_like(x).stride(), (x.shape, x.stride())
        torch.testing.assert_close(result, logit_laplace_nll(x, x, x, backend="reference"))


def test_an_error_in_a_kernel_says_what_was_wrong() -> None:
    """The doors refuse what users get wrong; this is what remains, and the stable interface hands it through."""
    with pytest.raises(RuntimeError, match=r"sample: wanted logits \[B, V\]"):
        torch.ops.dalle_kernels_cpu.sample(torch.rand(8), None, 1.0, 1.0, 0, 1.0, 1, 0)
    with pytest.raises(RuntimeError, match=r"indices: row 1 holds 9, wanted 0 \.\. 3"):
        torch.ops.dalle_kernels_cpu.vq_backward(
            torch.rand(1, 2, 1), torch.rand(1, 2, 8), torch.rand(1, 2, 1, 8), torch.tensor([[[0], [9]]]), 4, True, True
        )


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
