"""The emulated machine against the PTX manual's layouts, and its checks against kernels that break one rule each."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch


def _bits(values: torch.Tensor) -> np.ndarray:
    return values.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_follows_the_manuals_fragments(machine: ModuleType, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(16, 16, generator=generator).to(dtype)
    b = torch.randn(16, 8, generator=generator).to(dtype)
    c = torch.randn(16, 8, generator=generator)
    bits_a, bits_b = _bits(a), _bits(b)
    words_a = np.zeros((32, 4), np.uint32)
    words_b = np.zeros((32, 2), np.uint32)
    words_c = np.zeros((32, 4), np.float32)
    for lane in range(32):
        # PTX ISA, mma.m16n8k16, floating point: groupID = lane >> 2, threadID_in_group = lane % 4.
        group, thread = lane >> 2, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            column = thread * 2 + (i & 1) + (8 if i >= 4 else 0)
            words_a[lane, i // 2] |= bits_a[row, column] << (16 * (i & 1))
        for i in range(4):
            row = thread * 2 + (i & 1) + (8 if i >= 2 else 0)
            words_b[lane, i // 2] |= bits_b[row, group] << (16 * (i & 1))
        for i in range(4):
            words_c[lane, i] = c[group if i < 2 else group + 8, thread * 2 + (i & 1)]
    run = machine.mma_bfloat16 if dtype == torch.bfloat16 else machine.mma_float16
    got = run(words_a, words_b, words_c)
    want = (a.double() @ b.double() + c.double()).numpy()
    for lane in range(32):
        for i in range(4):
            row, column = (lane >> 2) + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)
            assert abs(got[lane, i] - want[row, column]) < 1e-5


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_gives_each_lane_its_word(machine: ModuleType, transposed: bool) -> None:
    elements = np.arange(32 * 8, dtype=np.uint16).reshape(32, 8)
    rows = np.random.default_rng(3).permutation(32).astype(np.int32)  # lane l names row rows[l]
    got = machine.ldmatrix(elements.view(np.uint32), rows, transposed)
    for lane in range(32):
        for matrix in range(4):
            tile = elements[rows[8 * matrix : 8 * matrix + 8]]
            tile = tile.T if transposed else tile
            low, high = tile[lane // 4, lane % 4 * 2], tile[lane // 4, lane % 4 * 2 + 1]
            assert got[lane, matrix] == int(low) | int(high) << 16


def test_shuffles_and_votes(machine: ModuleType) -> None:
    values = np.random.default_rng(5).integers(0, 100, 32).astype(np.int32)
    got = machine.shuffles(values, 5)
    lanes = np.arange(32)
    assert (got[0] == values[lanes ^ 5]).all()
    assert (got[2] == np.where(lanes >= 5, values[lanes - 5], values)).all()
    assert (got[1].view(np.uint32) == sum(1 << int(lane) for lane in lanes if values[lane] % 2)).all()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_block_sums_through_shared_memory(machine: ModuleType, order: int) -> None:
    values = np.random.default_rng(7).integers(0, 9, 3 * 128).astype(np.float32)
    machine.set_order(order)
    try:
        assert machine.block_sums(values, 3, 128)[0] == values.sum()
    finally:
        machine.set_order(0)


def test_atomic_additions_meet_without_a_barrier(machine: ModuleType) -> None:
    values = np.random.default_rng(9).integers(0, 8, 500).astype(np.uint32)
    assert (machine.histogram(values, 96) == np.bincount(values, minlength=8)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_round_as_torch_does(machine: ModuleType, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.cat(
        [
            torch.randn(4000, generator=generator) * torch.exp2(torch.randint(-30, 20, (4000,), generator=generator)),
            torch.arange(-2050, 2051) * 0.5,
            torch.tensor([0.0, -0.0, 65503.9, 65519.9, 65520.0, 1e9, -1e9, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25]),
        ]
    )
    got = machine.conversions(values.numpy(), dtype == torch.float16)
    assert (got == _bits(values.to(dtype))).all()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("global read past the end", "global read of 4 bytes at byte [0-9]+ of an array of 256"),
        ("write to an input", "a write to an array that is an input"),
        ("shared read past the end", "shared read of 4 bytes at byte 256 of 256"),
        ("shared write before the start", "belongs to no array"),
        ("misaligned vector", "past a multiple"),
        ("misaligned copy", "no multiple of 16"),
        ("unwritten shared memory", "read before it was written"),
        ("divergent barrier", "deadlock.*32 threads have exited, 32 threads wait at __syncthreads"),
        ("shuffle that half a warp skips", "deadlock.*wait at __shfl_xor_sync"),
        ("shuffle from outside its mask", "lane (16|17) is not in the mask"),
        ("lanes at different instructions", "different instructions"),
        ("race between warps", "was written by thread (0|32) too"),
        ("read without a barrier", "read before it was written|no barrier lies between"),
        ("read without a warp barrier", "read before it was written|no barrier lies between"),
        ("overwritten while others read", "overwritten with no barrier after warp|no barrier lies between"),
        ("copy read before its wait", "is read while an asynchronous copy|is written while an asynchronous copy"),
        ("copy read before its barrier", "no barrier lies between|read before it was written"),
        ("too few groups waited for", "is read while an asynchronous copy"),
        ("copy into what others still read", "overwritten with no barrier|no barrier lies between|under way"),
        ("atomic addition to what others write", "no barrier lies between|read before it was written"),
        ("read beside atomic additions", "no barrier lies between|overwritten with no barrier"),
        ("exit with a copy under way", "exits with asynchronous copies under way"),
    ],
)
@pytest.mark.parametrize("order", [0, 1])
def test_a_broken_rule_is_a_fault(machine: ModuleType, rule: str, message: str, order: int) -> None:
    machine.set_order(order)
    try:
        with pytest.raises(RuntimeError, match=message):
            machine.broken(rule, np.ones(64, np.float32))
    finally:
        machine.set_order(0)
