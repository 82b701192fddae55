"""How an operation is added to the namespace: what lies around every kernel."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch.library import opcheck

from dalle_kernels.backends.choice import Operation
from dalle_kernels.backends.contract import Call
from dalle_kernels.backends.library import Derivative, Entry, _where_the_tensors_are
from dalle_kernels.backends.sharding import Axis


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


class Inputs(NamedTuple):
    x: torch.Tensor


class Outputs(NamedTuple):
    square: torch.Tensor


class Kept(NamedTuple):
    x: torch.Tensor


class Grads(NamedTuple):
    square: torch.Tensor


class Needs(NamedTuple):
    x: bool


def test_one_input_alone_has_a_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operation for its gradient then returns one tensor, not a tuple."""
    module = SimpleNamespace(
        refuse=lambda call: None,
        forward=lambda inputs: Outputs(inputs.x * inputs.x),
        backward=lambda grads, kept, needs: (2 * kept.x * grads.square if needs.x else None,),
    )
    monkeypatch.setitem(sys.modules, "one_input", module)
    square = Entry(
        "square_for_a_test",
        Operation("square", {"reference": "one_input"}, lambda x: Call(x.device, x.dtype, 1)),
        Inputs,
        Outputs,
        lambda values: Call(values.x.device, values.x.dtype, 1),
        lambda backend, inputs: backend.forward(inputs),
        lambda inputs, _: Outputs(torch.empty_like(inputs.x)),
        (Axis({"x": 0}, {"square": 0}),),
        Derivative(
            "square_for_a_test_backward",
            Grads,
            Kept,
            Needs,
            lambda backend, grads, kept, needs: backend.backward(grads, kept, needs),
            lambda tangents, kept: (2 * kept.x * tangents[0],),
        ),
    )
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    opcheck(torch.ops.dalle_kernels.square_for_a_test.default, (x, "reference"))
    gradients = torch.func.vmap(torch.func.grad(lambda row: square(Inputs(row), "reference").square.sum()))(x.detach())
    torch.testing.assert_close(gradients, 2 * x.detach())
