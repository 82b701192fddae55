"""What sm_90a adds to the emulated machine: the PTX manual's layouts, and a fault for each rule that is broken."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch


def _swizzled(byte: int, bits: int) -> int:
    """PTX ISA, "Swizzle modes": 16-byte pieces of 8 rows trade places by exclusive or with the row's number."""
    return byte ^ ((byte >> 7 & ((1 << bits) - 1)) << 4)


@pytest.mark.parametrize(
    ("place", "box", "swizzle"),
    [
        ((0, 0, 0, 0), (64, 16, 1, 1), 3),
        ((0, 5, 2, 1), (64, 24, 1, 1), 3),  # rows 5 to 19, then past the end
        ((64, 0, 1, 0), (64, 8, 2, 1), 3),  # the last 16 of 80 columns
        ((0, -3, 0, 0), (64, 8, 1, 2), 3),
        ((0, 4, 1, 0), (32, 8, 2, 1), 2),
        ((16, 0, 0, 0), (16, 8, 1, 1), 1),
        ((0, 0, 2, 1), (64, 8, 1, 1), 0),
    ],
)
def test_a_box_lies_as_the_manual_swizzles_it(
    machine: ModuleType, place: tuple[int, ...], box: tuple[int, ...], swizzle: int
) -> None:
    tensor = np.random.default_rng(4).integers(1, 2**16, (2, 3, 20, 80)).astype(np.uint16)
    got = machine.boxes(tensor, place, box, swizzle)
    seen = np.zeros(got.size, bool)
    linear = 0
    for w in range(box[3]):
        for z in range(box[2]):
            for y in range(box[1]):
                for x in range(box[0]):
                    index = (place[3] + w, place[2] + z, place[1] + y, place[0] + x)
                    inside = all(0 <= i < size for i, size in zip(index, tensor.shape, strict=True))
                    at = _swizzled(2 * linear, swizzle) // 2
                    assert got[at] == (tensor[index] if inside else 0), index
                    seen[at] = True
                    linear += 1
    assert seen.all()


# Operand B by the manual's canonical layouts, in 16-byte pieces: rows of `span` bytes, eight of them a group.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("columns", "mode"), [(64, 1), (32, 1), (16, 1), (32, 2), (64, 2), (16, 3), (64, 3)])
def test_a_warpgroups_product_follows_the_manual(
    machine: ModuleType, dtype: torch.dtype, transposed: bool, columns: int, mode: int
) -> None:
    generator = torch.Generator().manual_seed(columns + mode)
    a = torch.randn(64, 16, generator=generator).to(dtype)
    b = torch.randn(16, columns, generator=generator).to(dtype)
    c = torch.randn(64, columns, generator=generator)

    span = 256 >> mode  # descriptor bits 62 and 63: 1 for 128 bytes, 2 for 64, 3 for 32
    stride, leading = 8 * span + 8 * span * (mode == 2), 4096 if transposed else 16
    memory = np.zeros(16 * 1024, np.uint16)
    bits_b = b.view(torch.int16).numpy().view(np.uint16)
    first = 0 if transposed else min(32, span - 32)  # the second 16 of k in a row, where it has them
    for k in range(16):
        for column in range(columns):
            row, along = (k, 2 * column) if transposed else (column, first + 2 * k)
            byte = row // 8 * stride + row % 8 * span + along // span * leading + along % span
            memory[_swizzled(byte, 4 - mode) // 2] = bits_b[k, column]
    descriptor = mode << 62 | (stride >> 4) << 32 | (leading >> 4) << 16 | first >> 4

    words_a = np.zeros((128, 4), np.uint32)
    sums = np.zeros((128, columns // 2), np.float32)
    bits_a = a.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    where = np.zeros((128, columns // 2, 2), int)
    for thread in range(128):
        # PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16": four warps of 16 rows each.
        group, lane = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
        for i in range(8):
            row, column = group + i // 2 % 2 * 8, lane + i % 2 + i // 4 * 8
            words_a[thread, i // 2] |= bits_a[row, column] << (16 * (i % 2))
        for i in range(columns // 2):
            where[thread, i] = group + i // 2 % 2 * 8, i // 4 * 8 + lane + i % 2
            sums[thread, i] = c[tuple(where[thread, i])]
    run = machine.product_bfloat16 if dtype == torch.bfloat16 else machine.product_float16
    got = run(columns, transposed, words_a, memory.view(np.uint32), descriptor, sums)
    want = (2 * (a.double() @ b.double()) + c.double()).numpy()
    np.testing.assert_allclose(got, want[where[..., 0], where[..., 1]], atol=1e-4)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("slots", [1, 3])
def test_a_ring_of_slots_hands_rows_from_warp_to_warp(machine: ModuleType, order: int, slots: int) -> None:
    rows = np.random.default_rng(8).integers(0, 9, (80, 32)).astype(np.float32)
    machine.set_order(order)
    try:
        assert (machine.pipeline(rows, slots) == rows.sum(0)).all()
    finally:
        machine.set_order(0)


def test_a_wait_that_returns_at_once_forgets_nothing(machine: ModuleType) -> None:
    values = np.arange(128, dtype=np.float32)
    assert (machine.knowledge(values) == np.roll(values, -32)).all()


def test_sums_are_nan_until_they_are_waited_for(machine: ModuleType) -> None:
    before, after = machine.early(np.ones(1, np.float32))
    assert np.isnan(before).all()
    assert (after == 0).all()


def test_a_product_needs_a_whole_warpgroup(machine: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="fewer than four warps"):
        machine.half_a_warpgroup()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("barrier that nobody made", "no barrier was made"),
        ("barrier used before it is known", "no barrier lies between|no barrier was made"),
        ("more arrivals than counted", "more arrivals than the barrier's 1"),
        ("ordinary read of a barrier", "an ordinary read of a barrier"),
        ("ordinary write to a barrier", "a write to where a barrier lies"),
        ("wait for a parity of 2", "a parity of 2"),
        ("phase that never ends", "deadlock.*128 threads wait at a barrier in shared memory"),
        ("copy on a barrier that was not fenced", "no fence_async"),
        ("box to a misaligned place", "must start at a multiple of 128"),
        ("box past the end", "a box of 8192 bytes to byte 1024 of 8208"),
        ("box read before its phase is over", "read while an asynchronous copy|read before it was written"),
        ("box whose barrier nobody asked", "no barrier lies between|read while an asynchronous copy"),
        ("bytes that nobody announced", "its bytes were not announced"),
        ("too many bytes announced", "deadlock.*wait at a barrier in shared memory"),
        ("more bytes than a phase can count", "expects 1048576 bytes"),
        ("box into what others still read", "overwritten with no barrier|read while an asynchronous copy"),
        ("box over an ordinary store without a fence", "ordinary store of thread [0-9]+ with no fence_async"),
        ("exit with a box under way", "exits with bulk copies under way"),
        ("product without a fence", "no warpgroup_fence"),
        ("product on registers changed since the fence", "no warpgroup_fence"),
        ("matrix that starts askew", "starts 128 bytes past a multiple of 1024"),
        ("matrix with another swizzle", "another swizzle"),
        ("matrix without swizzle", "without swizzle"),
        ("matrix past the end", "leaves shared memory"),
        ("matrix before its phase is over", "read while an asynchronous copy|read before it was written"),
        ("matrix that nobody wrote", "read before it was written"),
        ("matrix stored without a fence", "no fence_async"),
        ("sums changed while their product runs", "sums were changed"),
        ("fragment changed while its product runs", "a fragment of A was changed"),
        ("matrix released while its product runs", "read while an asynchronous copy|overwritten with no barrier"),
        ("warps with different products", "run different products"),
        ("product that one warp skips", "different numbers of products"),
        ("exit with a product under way", "exits with products under way"),
    ],
)
@pytest.mark.parametrize("order", [0, 1])
def test_a_broken_rule_is_a_fault(machine: ModuleType, rule: str, message: str, order: int) -> None:
    machine.set_order(order)
    try:
        with pytest.raises(RuntimeError, match=message):
            machine.broken_hopper(rule, np.ones((64, 32), np.float32))
    finally:
        machine.set_order(0)
