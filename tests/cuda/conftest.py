"""The CUDA kernels' own sources on the CPU: `backend="cuda"` served by the emulation for CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dalle_kernels import backends, cuda_library
from tests.emulation.build import build


@pytest.fixture(scope="session")
def emulated_operations() -> Any:
    torch.ops.load_library(str(build().operations))
    return torch.ops.dalle_kernels_emulated


@pytest.fixture
def emulated(emulated_operations: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Serves `backend="cuda"` by the emulation, on memory that torch has filled with NaN."""
    monkeypatch.setattr(cuda_library, "operations", lambda: emulated_operations)
    monkeypatch.setattr(cuda_library, "multiprocessors", lambda device: 4)
    monkeypatch.setattr(cuda_library, "shared_memory", lambda device, blocks: 100_000 // blocks)
    monkeypatch.setattr(cuda_library, "_refuse_device", lambda device: None)
    backends.forget_choices()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN and the largest integers
    yield emulated_operations
    torch.use_deterministic_algorithms(before)
    backends.forget_choices()
