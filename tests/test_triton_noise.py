"""The noise as Triton's device functions make it, against its definition."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from dalle_kernels.backends.triton_noise import gumbel2, philox
from dalle_kernels.noise import philox4x32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def words_kernel(seed, out, first_row, STREAM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.load(first_row) + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    words = philox(column.to(tl.uint32), row, tl.load(seed), STREAM)
    place = (tl.arange(0, ROWS)[:, None] * COLUMNS + column) * 4
    for word in tl.static_range(4):
        tl.store(out + place + word, words[word].to(tl.int64))


@triton.jit
def noise_kernel(words, out, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    tl.store(out + place, gumbel2(tl.load(words + place).to(tl.uint32)))


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
@pytest.mark.parametrize("first_row", [0, 2**32 - 1])
def test_words(seed: int, first_row: int) -> None:
    out = torch.empty(2, 8, 4, dtype=torch.int64, device=DEVICE)
    key = torch.tensor(seed, device=DEVICE)
    words_kernel[(1,)](key, out, torch.tensor(first_row, device=DEVICE), STREAM=1, ROWS=2, COLUMNS=8)
    row = first_row + torch.arange(2)[:, None]
    low = 0xFFFFFFFF
    counter = (torch.arange(8), row & low, row >> 32, torch.ones_like(row))
    key = torch.tensor(seed)
    expected = philox4x32(counter, (key & low, (key >> 32) & low))
    assert torch.equal(out.cpu(), torch.stack(expected, -1))


def test_noise_is_right_to_rounding_where_it_is_largest() -> None:
    torch.manual_seed(0)
    words = torch.randint(2**32, (1024,), device=DEVICE)
    words[:5] = torch.tensor([0, 2**32 - 1, 2**32 - 512, 7 << 29, (7 << 29) - 512])
    words[5:300] = 2**32 - 1 - torch.arange(295) * 512
    out = torch.empty(1024, device=DEVICE)
    noise_kernel[(1,)](words, out, COUNT=1024)
    uniform = ((words >> 9).double() + 0.5) * 2.0**-23
    exact = -torch.log2(-torch.log2(uniform))
    # fast_log2 is right to 2^-22 absolutely, its argument to a relative 1.3e-6 where the polynomial hands over.
    assert ((out.double() - exact).abs() <= 2.5e-6 + 2.0**-22 * exact.abs()).all()
