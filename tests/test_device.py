"""Tables that are made under a mode serve the calls that come after it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dalle_kernels import Convolution, KVCache, Row, TokenLayout, decode_attention, sparse_attention
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
    assert len(made) == 16
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
