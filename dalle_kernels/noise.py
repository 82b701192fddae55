"""The Gumbel noise of every backend, defined once.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the 64-bit seed as its key. For a
table of N rows and K codes, code k of row n takes word k // Kq of the counter (k mod Kq, n low, n high, stream), with
Kq = ceil(K / 4): a kernel that works on one counter feeds four tiles, one in each quarter of the codebook, and needs no
shuffles. u = ((word >> 9) + 0.5) * 2^-23 is exact in float32 and never 0 or 1; the noise is -log(-log u), in float32,
between -2.82 and 16.64. The backward pass regenerates it from the seed.

n counts from `row_offset`: a process that has rows a .. b of a batch draws with row_offset=a what the whole batch would
have drawn there. Beyond 2^64 it wraps. Kernels of a GPU read both as one int64 [2], the seed and the offset.

The first word counts from `counter_offset`: a process that has codes a .. b of each quarter of a codebook, one quarter
after the other, draws with counter_offset=a what the whole codebook would have drawn there.
"""

from __future__ import annotations

import torch

GUMBEL_STREAM = 0  # the counter's last word: gumbel_lookup
SAMPLING_STREAM = 1  # sample_tokens
VQ_STREAM = 2  # vq_lookup; head h of its codebook draws from VQ_STREAM + h HEAD_STEP
HEAD_STEP = 256

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def _product(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of the 64-bit product; int64 wraps as uint64 does, and the masks drop the sign."""
    product = a * b
    return (product >> 32) & _LOW, product & _LOW


def philox4x32(
    counter: tuple[torch.Tensor, ...], key: tuple[int | torch.Tensor, int | torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors that broadcast, each holding 32-bit words.
        key: two ints or int64 tensors that broadcast with them, likewise.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def gumbel_noise(
    seed: int | torch.Tensor,
    rows: int,
    codes: int,
    stream: int,
    row_offset: int | torch.Tensor = 0,
    device: torch.device | str | None = None,
    counter_offset: int = 0,
) -> torch.Tensor:
    """The noise of a whole table.

    Args:
        seed: 64 bits, an int or 0-dim int64.
        rows, codes: the table's shape, N and K.
        stream: which operation draws: GUMBEL_STREAM, SAMPLING_STREAM or VQ_STREAM.
        row_offset: which row of the noise the first row takes; an int or 0-dim int64.
        device: of the table; the seed's, or that of ints, the CPU, where None.
        counter_offset: which code of its quarter the first code of each quarter is, in a larger codebook.

    Returns:
        float32 [N, K].

    Example:
        >>> gumbel_noise(7, rows=2, codes=5, stream=GUMBEL_STREAM).shape
        torch.Size([2, 5])
    """
    if device is None:
        device = seed.device if isinstance(seed, torch.Tensor) else "cpu"
    quarter = max(-(-codes // 4), 1)
    counter = torch.arange(quarter, device=device) + counter_offset
    row = torch.arange(rows, device=device)[:, None] + row_offset
    words = philox4x32(
        (counter, row & _LOW, (row >> 32) & _LOW, torch.full_like(row, stream)), (seed & _LOW, (seed >> 32) & _LOW)
    )
    word = torch.cat([word.expand(rows, quarter) for word in words], dim=1)[:, :codes]
    uniform = ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def packed(seed: int | torch.Tensor, row_offset: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """int64 [2] on `device`: what its kernels read of both."""
    both = (torch.as_tensor(number, dtype=torch.int64, device=device) for number in (seed, row_offset))
    return torch.stack(tuple(both))


def on_device(
    temperature: float | torch.Tensor, seed: int | torch.Tensor, row_offset: int | torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a kernel on `device` that draws reads: the temperature as float32 of 0 dimensions, the rest `packed`."""
    return torch.as_tensor(temperature, dtype=torch.float32, device=device), packed(seed, row_offset, device)
