"""What the Python side of the CUDA library says of machines that it cannot serve, and what it hands to kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dalle_kernels import Row, TokenLayout, sparse_attention
from dalle_kernels.backends import cuda_library

GPU = torch.device("cuda:0")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A GPU of compute capability 9.0, with nothing remembered of the machine that the test runs on."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for cached in (cuda_library._load, cuda_library._refuse_device):
        cached.cache_clear()
    yield monkeypatch
    for cached in (cuda_library._load, cuda_library._refuse_device):
        cached.cache_clear()


@pytest.mark.parametrize("offset", [1, 3, 8])
def test_aligned_copies_a_contiguous_tensor_that_starts_anywhere(offset: int) -> None:
    flat = torch.arange(100.0).bfloat16()
    tensor = flat[offset : offset + 64].view(2, 32)
    got = cuda_library.aligned(tensor)
    assert got.equal(tensor)
    assert got.data_ptr() % 16 == 0
    assert (got.data_ptr() == tensor.data_ptr()) == (offset == 8)


def test_tensors_that_start_anywhere_serve(emulated: Any) -> None:
    torch.manual_seed(0)
    flat, pattern = torch.randn(1 + 30 * 32).half(), Row(TokenLayout(0, (5, 6)))
    q = flat[1:].view(1, 1, 30, 32).requires_grad_()  # two bytes past a multiple of 16
    outputs = [sparse_attention(q, q, q, pattern, backend=backend) for backend in ("cuda", "reference")]
    torch.testing.assert_close(*outputs, atol=2e-3, rtol=2e-3)
    gradients = [torch.autograd.grad(out.square().sum(), q)[0] for out in outputs]
    torch.testing.assert_close(*gradients, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ((13000, 12090), "holds the runtime of CUDA 13, the driver here supports CUDA 12.9: update the driver"),
        ((13000, 13000), None),
        ((13010, 13000), None),
        ((12080, 13000), None),
    ],
)
def test_a_driver_older_than_the_runtime_is_told(
    fresh: pytest.MonkeyPatch, tmp_path: Any, versions: tuple[int, int], said: str | None
) -> None:
    fresh.setattr(cuda_library, "LIBRARY", tmp_path / "_cuda.so")
    cuda_library.LIBRARY.touch()
    fresh.setattr(cuda_library, "_versions", lambda: versions)
    fresh.setattr(torch.ops, "load_library", lambda path: None)
    reason = cuda_library.refuse(GPU, torch.float32, (torch.float32,))
    assert reason is None if said is None else said in (reason or "")


def test_amd_gpus_are_refused_by_name(fresh: pytest.MonkeyPatch) -> None:
    triton_common = pytest.importorskip("dalle_kernels.backends.triton_common")
    fresh.setattr(torch.version, "hip", "6.4.1")
    fresh.setattr(triton_common, "INTERPRETED", False)
    said = "made for NVIDIA GPUs, this torch for AMD's (ROCm 6.4.1)"
    assert said in (cuda_library.refuse(GPU, torch.float32, (torch.float32,)) or "")
    assert said in (triton_common.obstacle(GPU, torch.float32) or "")
