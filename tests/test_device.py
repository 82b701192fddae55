"""Tables that are made under a mode serve the calls that come after it."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dalle_kernels import Convolution, KVCache, Row, TokenLayout, decode_attention, device, sparse_attention
from dalle_kernels.device import OnDevice
from dalle_kernels.patterns.decode_table import decode_table_for
from dalle_kernels.patterns.schedule import schedule_for


def under_fake_tensors(ask: Callable[[], object]) -> None:
    with FakeTensorMode():
        ask()


def under_inference_mode(ask: Callable[[], object]) -> None:
    with torch.inference_mode():
        ask()


def under_a_device(ask: Callable[[], object]) -> None:
    with torch.device("meta"):
        ask()


def under_a_transform(ask: Callable[[], object]) -> None:
    def asking(x: torch.Tensor) -> torch.Tensor:
        ask()
        return x + 1

    torch.func.functionalize(asking)(torch.ones(()))


MODES = [under_fake_tensors, under_inference_mode, under_a_device, under_a_transform]


@pytest.mark.parametrize("mode", MODES)
def test_tables_are_plain_tensors(mode: Callable[[Callable[[], object]], None]) -> None:
    pattern = Convolution(TokenLayout(3 + MODES.index(mode), (5, 7)), 3)  # one that no other test has asked for
    mode(lambda: (schedule_for(pattern, (32, 64)), decode_table_for(pattern)))
    schedule, table = schedule_for(pattern, (32, 64)), decode_table_for(pattern)
    made = [value for record in (schedule, table) for value in vars(record).values() if isinstance(value, torch.Tensor)]
    assert len(made) == 17
    for tensor in made:
        assert type(tensor) is torch.Tensor
        assert tensor.device.type == "cpu"
        assert not tensor.is_inference()
        tensor.numpy()


def test_decoding_after_a_cache_of_fake_tensors() -> None:
    pattern = Row(TokenLayout(4, (4, 9)))
    with FakeTensorMode():
        KVCache(pattern, 1, 1, 16)
    cache = KVCache(pattern, 1, 1, 16)
    q, k, v = torch.randn(3, 1, 1, pattern.length, 16)
    steps = [decode_attention(*(x[:, :, i : i + 1] for x in (q, k, v)), cache, i) for i in range(pattern.length)]
    torch.testing.assert_close(torch.cat(steps, 2), sparse_attention(q, k, v, pattern))


# --- CUDA graphs ------------------------------------------------------------------------------------------------------

GPU = torch.device("meta")  # stands for one
WHERE = Row(TokenLayout(6, (5, 11)))


def tables() -> dict[str, Callable[[], object]]:
    """Everything that backends keep on a device."""
    from dalle_kernels.attention import cuda_walk, reference, triton_backward, triton_forward
    from dalle_kernels.decode import op as decode
    from dalle_kernels.decode import triton as triton_decode

    half, length = torch.bfloat16, WHERE.length
    return {
        "schedule": lambda: schedule_for(WHERE, (32, 64), length, GPU),
        "decode table": lambda: decode_table_for(WHERE, GPU, 3),
        "places of a prefill": lambda: decode._places(WHERE, 9, 0, 0, GPU),
        "mask": lambda: reference._mask(WHERE, length, GPU),
        "Triton forward": lambda: triton_forward.launch_for("attention_forward", WHERE, length, GPU, half, 64),
        "Triton backward": lambda: triton_backward.work_for(WHERE, length, GPU, half, 64, 3),
        "Triton decode": lambda: triton_decode.launch_for(WHERE, GPU, half, 64, 3),
        "CUDA walk": lambda: cuda_walk.walk_for(WHERE, 128, 64, False, length, 4, 2, 2, GPU),
    }


def tensors_of(made: object) -> list[torch.Tensor]:
    if isinstance(made, torch.Tensor):
        return [made]
    parts = made if isinstance(made, tuple) else vars(made).values() if isinstance(made, OnDevice) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """`GPU` counts as a CUDA device; gives what switches capturing on and off."""
    state = {"capturing": False}
    monkeypatch.setattr(device, "has_graphs", lambda name: torch.device(name) == GPU)
    monkeypatch.setattr(device, "capturing", lambda: state["capturing"])
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    forget_tables()
    yield lambda on: state.update(capturing=on)
    forget_tables()
    device._captured.clear()


def forget_tables() -> None:
    for module in list(sys.modules.values()):
        if module.__name__.startswith("dalle_kernels."):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


@pytest.mark.parametrize("name", tables())
def test_kept_tables_are_made_outside_of_graph_pools(
    graphs: Callable[[bool], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool takes what one thread allocates: none of it may be kept."""
    made: dict[int, bool] = {}  # memory on the GPU -> whether another thread made it
    alive: list[torch.Tensor] = []
    here, move = threading.current_thread(), torch.Tensor.to

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        moved = move(tensor, *args, **kwargs)
        alive.append(moved)
        made[moved.untyped_storage()._cdata] = threading.current_thread() is not here
        return moved

    monkeypatch.setattr(torch.Tensor, "to", to)
    kept = [tensor for tensor in tensors_of(tables()[name]()) if tensor.device == GPU]
    assert kept
    assert all(made[tensor.untyped_storage()._cdata] for tensor in kept)
    assert torch.cuda.current_stream().synchronize.call_count  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", tables())
def test_what_a_graph_reads_stays(graphs: Callable[[bool], None], name: str) -> None:
    ask = tables()[name]
    graphs(True)
    with pytest.raises(RuntimeError, match="make the same call once before the capture"):
        ask()
    graphs(False)
    read = [weakref.ref(tensor) for tensor in tensors_of(ask())]
    forget_tables()
    gc.collect()
    assert not any(tensor() is not None and tensor().device == GPU for tensor in read)  # nobody needs them
    ask()
    graphs(True)
    read = [weakref.ref(tensor) for tensor in tensors_of(ask())]
    graphs(False)
    forget_tables()
    gc.collect()
    assert all(tensor() is not None for tensor in read)


def test_what_fails_in_the_other_thread_fails_here(graphs: Callable[[bool], None]) -> None:
    with pytest.raises(ZeroDivisionError):
        device.settled(GPU, lambda: 1 // 0)
