"""The attention forward for sm_90a, run by the emulation, against the reference in float64; and the plans it walks."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from dalle_kernels import TokenLayout, sparse_attention
from dalle_kernels.attention import cuda_sm90a
from dalle_kernels.attention.cuda_sm90a import FIRST_MASKED, FIRST_SEES, LAST_USE, LOADS, walk_for
from dalle_kernels.backends import cuda_library
from dalle_kernels.patterns.patterns import AxialRow, Causal, Column, Convolution, Fixed, MaskPattern, Pattern, Row
from dalle_kernels.patterns.schedule import schedule_for
from tests.cuda.elsewhere import Elsewhere
from tests.cuda.test_attention import _check, _check_padding_and_strides_and_aliases, _inputs
from tests.emulation.build import build

LAYOUT = TokenLayout(text_length=70, grid=(16, 15))  # 310 tokens: two row tiles of 256, five column tiles
PATTERNS: list[Pattern] = [
    Row(LAYOUT),
    Column(LAYOUT),
    Convolution(LAYOUT, kernel_size=5),
    Causal(TokenLayout(70, (9, 11))),
    AxialRow(TokenLayout(1, (1, 140))),
    Fixed(200, 16, 2),
    Row(TokenLayout(0, (5, 6))),
    Column(TokenLayout(1, (7, 1))),
]


@pytest.fixture
def hopper(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """One H100's shared memory, and none of its answers from the kernel for sm_80."""
    if isinstance(emulated, Elsewhere) and torch.cuda.get_device_capability(emulated.device) != (9, 0):
        pytest.skip("this GPU has no sm_90a")
    served = []

    class Only:
        @staticmethod
        def attention_forward_sm90a(*args: Any) -> None:
            served.append(args)
            emulated.attention_forward_sm90a(*args)

    monkeypatch.setattr(cuda_library, "has_sm90a", lambda device: True)
    monkeypatch.setattr(cuda_library, "shared_memory", lambda device, blocks: 232_448 // blocks)
    monkeypatch.setattr(cuda_library, "operations", lambda: Only)
    yield emulated
    assert served


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward(hopper: Any, pattern: Pattern, dtype: torch.dtype) -> None:
    _check(pattern, *_inputs(1, 2, pattern.length, 32, dtype))


@pytest.mark.parametrize("width", [16, 64, 80, 96, 128])
def test_forward_widths(hopper: Any, width: int) -> None:
    pattern = Column(TokenLayout(70, (9, 11)))  # both ways of copying
    _check(pattern, *_inputs(1, 1, pattern.length, width, torch.bfloat16))


@pytest.mark.parametrize("length", [1, 63, 65, 128, 257])
def test_forward_of_a_prefix(hopper: Any, length: int) -> None:
    _check(Column(LAYOUT), *_inputs(1, 1, length, 64, torch.float16))


def test_forward_with_padding_and_strides_and_aliases(hopper: Any) -> None:
    _check_padding_and_strides_and_aliases(Row(TokenLayout(70, (9, 11))))


def test_rows_that_see_nothing(hopper: Any) -> None:
    mask = torch.rand(400, 400, generator=torch.Generator().manual_seed(6)) < 0.05
    mask[10:20] = False
    mask[64:128] = False  # one warpgroup
    mask[256:] = False  # and a row tile
    mask[:, 70:] = False
    q, k, v = _inputs(1, 1, 400, 16, torch.float16)
    _check(MaskPattern(mask), q, k, v)
    out, lse = sparse_attention(q, k, v, MaskPattern(mask), return_lse=True, backend="cuda")
    assert (out[:, :, 256:] == 0).all()
    assert (lse[:, :, 256:] == -torch.inf).all()


@pytest.mark.parametrize("slots", [3, 5])
@pytest.mark.parametrize("multiprocessors", [1, 2, 7])
def test_any_number_of_slots_parts_and_heads_a_block(
    hopper: Any, monkeypatch: pytest.MonkeyPatch, slots: int, multiprocessors: int
) -> None:
    tile = 64 * 128
    monkeypatch.setattr(cuda_library, "shared_memory", lambda device, blocks: 1024 + (4 + 2 * slots) * tile)
    monkeypatch.setattr(cuda_library, "multiprocessors", lambda device: multiprocessors)
    pattern = Convolution(TokenLayout(130, (12, 18)), kernel_size=5)
    _check(pattern, *_inputs(1, 3, pattern.length, 16, torch.bfloat16))


@pytest.mark.parametrize("order", [1, 2])
def test_warps_and_copies_in_any_order(hopper: Any, order: int) -> None:
    if isinstance(hopper, Elsewhere):
        pytest.skip("a GPU keeps its own order")
    set_order = ctypes.CDLL(str(build().operations)).emulation_set_order
    set_order(ctypes.c_uint64(order))
    try:
        _check(Column(LAYOUT), *_inputs(1, 2, LAYOUT.length, 16, torch.bfloat16))
    finally:
        set_order(ctypes.c_uint64(0))


def test_large_scores_do_not_overflow(hopper: Any) -> None:
    q, k, v = _inputs(1, 1, 169, 32, torch.bfloat16)
    _check(Row(TokenLayout(70, (9, 11))), 30 * q, 30 * k, v)


def test_calls_that_it_does_not_serve_go_to_the_kernel_for_sm_80(
    emulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = _inputs(1, 2, 100, 32, torch.float16)
    pattern = Row(TokenLayout(20, (8, 10)))
    assert cuda_sm90a.refuse(q, k, v) == "it needs a GPU of compute capability 9.0 and a library built for 9.0a"
    monkeypatch.setattr(cuda_library, "has_sm90a", lambda device: True)
    assert cuda_sm90a.refuse(q, k, v) is None
    shared = k[:, :1].expand(k.shape)
    assert (cuda_sm90a.refuse(q, shared, v) or "").startswith("k repeats in memory")
    _check(pattern, q, shared, v)


@pytest.mark.parametrize("pattern", [Row(TokenLayout()), Column(TokenLayout()), Convolution(TokenLayout())], ids=str)
@pytest.mark.parametrize("length", [1280, 1001])
@pytest.mark.parametrize(("rows", "slots"), [(256, 12), (128, 6), (256, 3)])
def test_a_plan_is_sound(pattern: Pattern, length: int, rows: int, slots: int) -> None:
    planned = walk_for(pattern, rows, length, slots, parts=2)
    walk = planned.walk
    masks = schedule_for(pattern, (rows, 64), length).masks.view(-1, rows // 64, 64 * 2)
    for first, last in pairwise(walk.tile_steps[walk.part_tiles.long()].tolist()):
        holds: dict[int, int | None] = {}
        for tile, slot, mask, flags in walk.steps[first:last].tolist():
            if flags & LOADS:
                assert holds.get(slot) is None, "the last use of what lay there was announced"
                holds[slot] = tile
            assert holds[slot] == tile
            if flags & LAST_USE:
                holds[slot] = None
            for group, words in enumerate(masks[mask].tolist()):
                assert bool(flags & FIRST_SEES << group) == any(words)
                assert bool(flags & FIRST_MASKED << group) == any(word != -1 for word in words)
        assert not any(holds.values()), "every slot is empty for the next head"
    for group, run in enumerate(planned.runs.tolist()):
        tokens = walk.order[64 * group : 64 * group + 64].tolist()
        copied = [token for token in range(run, run + 64) if token < length]
        assert run == -1 or tokens == copied
        assert run != -1 or any(after != before + 1 for before, after in pairwise(tokens)) or tokens[-1] != length - 1


@pytest.mark.parametrize("pattern", [Row(TokenLayout()), Column(TokenLayout()), Convolution(TokenLayout())], ids=str)
def test_a_heads_keys_are_read_once_and_early_at_the_papers_width(pattern: Pattern) -> None:
    steps = walk_for(pattern, 256, 1280, 12, parts=1).walk.steps.tolist()
    assert sum(flags & LOADS for *_, flags in steps) == 1280 // 64
    used: dict[int, int] = {}
    for index, (_, slot, _, flags) in enumerate(steps):
        if flags & LOADS and slot in used:
            assert index - used[slot] > 12, "a load may start that many steps before it is needed"
        used[slot] = index
