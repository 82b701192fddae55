"""What the Python side of a CUDA call asks of torch: nothing that waits for the device, copies from the host, or
allocates anything but outputs and workspace. So every call can be captured in a CUDA graph once its walk is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dalle_kernels import KVCache, Row, TokenLayout
from dalle_kernels.attention import contract as attention_contract
from dalle_kernels.attention import cuda as attention
from dalle_kernels.decode import cuda as decode
from dalle_kernels.sampling import contract as sampling_contract
from dalle_kernels.sampling import cuda as sampling
from tests.cuda.elsewhere import Elsewhere

PATTERN = Row(TokenLayout(70, (9, 11)))
SEED = torch.tensor(7), torch.tensor(0)  # each call puts them into one tensor


class Recorder(TorchDispatchMode):
    """Names of the operations that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.name().split(".")[0])
        return function(*args, **(kwargs or {}))


def _attention() -> None:
    q = torch.ones(1, 2, PATTERN.length, 32, dtype=torch.bfloat16)
    out, lse = attention.forward(attention_contract.Inputs(q, q, q, None, 0.1, PATTERN))
    attention.backward(
        attention_contract.Grads(out, None),
        attention_contract.Kept(q, q, q, out, lse, None, 0.1, PATTERN),
        attention_contract.Needs(True, True, True),
    )


def _decode() -> None:
    q = torch.ones(1, 2, 1, 32)
    cache = KVCache(PATTERN, 1, 2, 32, dtype=q.dtype)
    decode.forward(cache.inputs(q, q, q, torch.tensor(5), 0.1))


def _sampling() -> None:
    sampling.forward(sampling_contract.Inputs(torch.ones(4, 64), None, 1.0, 1.0, 5, 0.9, *SEED))


@pytest.mark.parametrize(
    ("call", "module", "functions", "names"),
    [
        (_attention, attention, ("forward", "backward"), {"aten::empty", "aten::empty_like"}),
        (_decode, decode, ("forward",), {"aten::empty"}),
        (_sampling, sampling, ("forward",), {"aten::empty", "aten::stack"}),
    ],
    ids=["attention", "decode", "sampling"],
)
def test_the_host_only_allocates_and_launches(
    emulated: Any,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[[], None],
    module: Any,
    functions: tuple[str, ...],
    names: set[str],
) -> None:
    call()  # makes plans and tables, which are remembered
    recorder = Recorder()
    for name in functions:
        monkeypatch.setattr(module, name, _under(recorder, getattr(module, name)))
    call()
    asked = {name for name in recorder.names if name.startswith("aten::")}
    assert asked <= names
    if not isinstance(emulated, Elsewhere):
        assert any(name.startswith("dalle_kernels_emulated::") for name in recorder.names)


def _under(recorder: Recorder, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with recorder:
            return function(*args)

    return run


def test_operations_run_elsewhere_give_what_they_give_here(emulated_operations: Any) -> None:
    logits = torch.randn(6, 2, 100, generator=torch.Generator().manual_seed(1))[:, 1]  # strided, with an offset
    here, elsewhere = torch.zeros(2, 6, dtype=torch.int64)
    operations = Elsewhere(emulated_operations, torch.device("cpu"))
    for run, tokens in ((emulated_operations, here), (operations, elsewhere)):
        run.sample_tokens(logits, None, 1.0, 1.0, 40, 0.9, torch.stack(SEED), tokens)
    assert here.equal(elsewhere)
    assert here.any()
