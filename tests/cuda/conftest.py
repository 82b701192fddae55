"""`backend="cuda"` for CPU tensors: the kernels' own sources run by the emulation and, where there is a GPU, the
library itself on copies of the tensors there (those tests carry the `gpu` marker)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dalle_kernels.backends import choice as backends
from dalle_kernels.backends import cuda_library
from tests.cuda.elsewhere import Elsewhere
from tests.emulation.build import build


@pytest.fixture(scope="session")
def emulated_operations() -> Any:
    torch.ops.load_library(str(build().operations))
    return torch.ops.dalle_kernels_emulated


MACHINES = ["emulation", *([pytest.param("gpu", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


@pytest.fixture(params=MACHINES)
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Serves `backend="cuda"` for CPU tensors, on memory that torch has filled with NaN."""
    if request.param == "gpu":
        operations = Elsewhere(cuda_library.operations(), torch.device("cuda"))
    else:
        operations = request.getfixturevalue("emulated_operations")
    monkeypatch.setattr(cuda_library, "operations", lambda: operations)
    monkeypatch.setattr(cuda_library, "multiprocessors", lambda device: 4)
    # The least with which every kernel of attention serves, so that slots of tiles are used again soon.
    monkeypatch.setattr(cuda_library, "shared_memory", lambda device, blocks: 104_448 // blocks)
    monkeypatch.setattr(cuda_library, "_refuse_device", lambda device: None)
    backends.forget_choices()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN and the largest integers
    yield operations
    torch.use_deterministic_algorithms(before)
    backends.forget_choices()
