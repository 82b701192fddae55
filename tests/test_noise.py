"""The noise: published Philox vectors, the Gumbel law, and where each number comes from."""

from __future__ import annotations

import math

import pytest
import torch

from dalle_kernels.noise import GUMBEL_STREAM, SAMPLING_STREAM, gumbel_noise, philox4x32


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_published_vectors(counter, key, words) -> None:  # type: ignore[no-untyped-def]
    """Random123's known answers for philox4x32, 10 rounds."""
    as_tensors = [[torch.tensor(word) for word in group] for group in (counter, key)]
    got = philox4x32(tuple(as_tensors[0]), tuple(as_tensors[1]))  # type: ignore[arg-type]
    assert tuple(int(word) for word in got) == words


def test_the_law_is_gumbels() -> None:
    noise = gumbel_noise(torch.tensor(1), 512, 2048, GUMBEL_STREAM).double()
    assert abs(float(noise.mean()) - 0.577216) < 0.005
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.01
    assert float(noise.min()) > -2.82
    assert float(noise.max()) < 16.65


def test_extreme_words_stay_finite() -> None:
    uniform = (torch.tensor([0, 0xFFFFFFFF]) >> 9).float().add(0.5) * 2.0**-23
    noise = -torch.log(-torch.log(uniform))
    torch.testing.assert_close(noise, torch.tensor([-2.8115, 16.6355]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("codes", [1, 3, 8, 10, 37])
def test_each_number_has_its_place(codes: int) -> None:
    """Code k of row n is word k // Kq of the counter (k mod Kq, n, 0, stream), whatever the shape around it."""
    seed = torch.tensor(-3_000_000_007)
    noise, quarter = gumbel_noise(seed, 5, codes, SAMPLING_STREAM), -(-codes // 4)
    for row in (0, 4):
        for code in {0, codes // 2, codes - 1}:
            counter = tuple(torch.tensor(word) for word in (code % quarter, row, 0, SAMPLING_STREAM))
            key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
            word = int(philox4x32(counter, key)[code // quarter])
            u = torch.tensor(((word >> 9) + 0.5) * 2.0**-23)
            assert noise[row, code] == -torch.log(-torch.log(u))


def test_streams_rows_and_seeds_differ() -> None:
    base = gumbel_noise(torch.tensor(1), 2, 64, GUMBEL_STREAM)
    assert not torch.equal(base[0], base[1])
    assert not torch.equal(base, gumbel_noise(torch.tensor(1), 2, 64, SAMPLING_STREAM))
    assert not torch.equal(base, gumbel_noise(torch.tensor(1 + 2**32), 2, 64, GUMBEL_STREAM))
    assert torch.equal(base, gumbel_noise(torch.tensor(1), 2, 64, GUMBEL_STREAM))
