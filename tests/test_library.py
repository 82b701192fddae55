"""How an operation is added to the namespace: what lies around every kernel."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from dalle_kernels.backends.library import _where_the_tensors_are


@pytest.mark.parametrize(("index", "entered"), [(0, []), (1, [1])])
def test_a_kernel_runs_on_the_device_of_its_tensors(index: int, entered: list[int]) -> None:
    """Without two GPUs: the tensor says that it lies on one, and what is asked of torch.cuda is written down."""
    seen: list[int] = []

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda", index)  # type: ignore[assignment]

    @contextmanager
    def device(where: torch.device):  # type: ignore[no-untyped-def]
        assert where.index is not None
        seen.append(where.index)
        yield

    tensor = torch.zeros(1).as_subclass(Elsewhere)
    with mock.patch.object(torch, "cuda", SimpleNamespace(current_device=lambda: 0, device=device)):
        assert _where_the_tensors_are(lambda x, y: (x, y))(None, tensor)[1] is tensor
    assert seen == entered
