"""Neighbourhoods against the published rule, written out cell by cell, and through the kernels against float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_kernels import KVCache, Neighborhood, Pattern, Schedule, TokenLayout, sparse_attention


def seen(cell: int, length: int, window: int, stride: int, dilation: int, causal: bool) -> set[int]:
    """The keys of one cell along one axis, by the definition (Hassani et al. 2025)."""
    mates = [other for other in range(length) if other % dilation == cell % dilation]
    place = mates.index(cell)
    group = [other for other in range(len(mates)) if other // stride == place // stride]
    if causal:
        # The window of the group's last query (it may stand beyond the end), cut off behind the query itself.
        leader = min(place // stride * stride + stride - 1, len(mates) - 1)
        return {mates[other] for other in range(max(0, leader - window + 1), place + 1)}
    leader = group[min(stride // 2, len(group) - 1)]
    # The `window` places nearest to the leader: shifted inward, never cut.
    start = min(max(leader - window // 2, 0), len(mates) - window)
    return {mates[other] for other in range(start, start + window)}


def dense(pattern: Neighborhood) -> torch.Tensor:
    """The mask, by loops over cells."""
    axes = list(zip(pattern.shape, pattern.window, pattern.stride, pattern.dilation, pattern.causal, strict=True))
    sees = [[seen(cell, *axis) for cell in range(axis[0])] for axis in axes]
    cells = list(itertools.product(*(range(length) for length in pattern.shape)))
    text = pattern.text_length
    mask = torch.zeros(pattern.length, pattern.length, dtype=torch.bool)
    mask[:text, :text] = torch.ones(text, text, dtype=torch.bool).tril()
    mask[text:, :text] = True
    for i, query in enumerate(cells):
        for j, key in enumerate(cells):
            mask[text + i, text + j] = all(
                k in sees[axis][q] for axis, (q, k) in enumerate(zip(query, key, strict=True))
            )
    return mask


@st.composite
def neighborhoods(draw: st.DrawFn) -> Neighborhood:
    shape, window, stride, dilation, causal = [], [], [], [], []
    axes = draw(st.integers(1, 3))
    for _ in range(axes):
        length = draw(st.integers(1, {1: 40, 2: 9, 3: 5}[axes]))
        spread = draw(st.integers(1, length))
        wide = draw(st.integers(1, length // spread))
        shape.append(length)
        window.append(wide)
        dilation.append(spread)
        stride.append(draw(st.integers(1, wide)))
        causal.append(draw(st.booleans()))
    place: Any = shape
    if axes == 2 and draw(st.booleans()):
        place = TokenLayout(draw(st.integers(0, 5)), tuple(shape))
    return Neighborhood(place, window, stride, dilation, causal)


@settings(max_examples=150, deadline=None)
@given(neighborhoods())
def test_the_mask_is_the_definition(pattern: Neighborhood) -> None:
    mask = pattern.mask()
    assert torch.equal(mask, dense(pattern))
    assert pattern.visible_pairs == int(mask.sum())
    assert Pattern.parse(pattern.spec) == pattern
    length = max(1, pattern.length - 3)
    assert torch.equal(pattern.mask(length), mask[:length, :length])


@settings(max_examples=30, deadline=None)
@given(neighborhoods())
def test_schedules_hold_the_same_pairs(pattern: Neighborhood) -> None:
    schedule = Schedule.build(pattern, (32, 32))
    assert schedule.visible_pairs == int(pattern.mask().sum())
    assert sorted(schedule.order.tolist()) == list(range(pattern.length))


def test_windows_as_large_as_the_shape_see_everything() -> None:
    assert Neighborhood((4, 6), (4, 6)).mask().all()
    assert Neighborhood((3, 2, 4), (3, 2, 4)).mask().all()
    assert torch.equal(Neighborhood((7,), 7, causal=True).mask(), torch.ones(7, 7).tril().bool())


def test_a_stride_as_large_as_the_window_is_blocked_attention() -> None:
    block = torch.arange(12) // 4
    assert torch.equal(Neighborhood((12,), 4, stride=4).mask(), block[:, None] == block)


CASES = [
    Neighborhood((50,), 7),
    Neighborhood((9, 11), (3, 5), stride=(1, 2)),
    Neighborhood((12, 10), 3, dilation=(2, 3)),
    Neighborhood((8, 9), (5, 4), causal=(True, False)),
    Neighborhood((4, 5, 6), (3, 2, 5), causal=(True, False, False)),
    Neighborhood(TokenLayout(7, (6, 8)), 5),
]


@pytest.mark.parametrize("pattern", CASES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_attention_and_its_gradients(pattern: Neighborhood, backend: str) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, pattern.length, 16, dtype=torch.float64) for _ in range(3)]
    grad = torch.randn_like(inputs[0])

    def results(dtype: torch.dtype, attend: Any) -> list[torch.Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        out = attend(*leaves)
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = (q @ k.mT / math.sqrt(16)).masked_fill(~dense(pattern), -torch.inf)
        return scores.softmax(-1) @ v

    truth = results(torch.float64, exact)
    ours = results(torch.float32, lambda q, k, v: sparse_attention(q, k, v, pattern, backend=backend))
    for got, wanted in zip(ours, truth, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=2e-6)


def test_large_ones_are_made_from_their_pairs_alone() -> None:
    pattern = Neighborhood((256, 256), 3)  # a mask would take 4 GB
    assert Schedule.build(pattern).visible_pairs == pattern.visible_pairs == 256 * 256 * 9


def test_those_that_look_ahead_cannot_be_decoded() -> None:
    with pytest.raises(ValueError, match="later keys"):
        KVCache(Neighborhood((4, 4), 3), 1, 1, 8)
    KVCache(Neighborhood((4, 4), 3, causal=True), 1, 1, 8)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (((), 3), "shape"),
        (((4, 4, 4, 4), 3), "shape"),
        ((5, 3), "shape"),
        ((None, 3), "shape: got None"),
        (((4, 0), 1), "shape"),
        (((4, 4), 5), "window: got 5"),
        (((4, 4), 0), "window"),
        (((4, 4), (3,)), "window"),
        (((4, 4), 2.5), "window"),
        (((9, 9), 3, 4), "stride: got 4"),
        (((9, 9), 3, 0), "stride"),
        (((9, 9), 3, 1, 4), "window: got 3 x dilation 4"),
        (((9, 9), 3, 1, 1, 1), "causal"),
        (((9, 9), 3, 1, 1, (True,)), "causal"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Neighborhood(*arguments)


def test_it_prints_as_it_was_written() -> None:
    for text in (
        "Neighborhood((64, 64), window=13)",
        "Neighborhood((8, 9), window=(5, 4), stride=(2, 1), causal=(True, False))",
        "Neighborhood(TokenLayout(text_length=7, grid=(6, 8)), window=3, dilation=2)",
    ):
        assert repr(eval(text)) == text
