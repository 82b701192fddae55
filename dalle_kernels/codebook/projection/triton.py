"""Gumbel-softmax lookup from features in Triton: the logits exist one tile at a time and never leave the chip.

Forward: as in gumbel/triton.py, with the four tiles of logits made by one matrix product.

Backward: rows are taken in strips. A kernel makes a strip's logits again and turns them into dlogits while they are on
the chip; dcodebook is summed as there. dfeatures and dweight are then two plain matrix products of the
strip, and the next strip reuses its memory. That is the least arithmetic there can be, three products of N x C x K, for
STRIP_BYTES of memory.

The mean distribution over the codes, where asked for, needs each row's sum before any of its shares is known: a second
kernel makes the logits once more, owns codes and sums down the rows. Its derivative G pulls at the logits with
p (G - p . G) / N, for which a kernel that owns rows makes p . G / N first; the rest goes with the term of kl.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from dalle_kernels.backends.contract import Call
from dalle_kernels.backends.triton_common import ceil_div, dot, obstacle
from dalle_kernels.backends.triton_noise import LOG2_E, philox
from dalle_kernels.codebook.projection.contract import Grads, Inputs, Kept, Needs, Outputs
from dalle_kernels.codebook.triton_tiles import (
    LOWEST,
    STREAM,
    add_noise,
    apart,
    backward_step,
    code_places,
    codes_of,
    constants,
    enter,
    load_codes,
    load_row_gradients,
    piece_width,
    pieces,
    slice_piece,
    store_rows,
    sum_parts,
    unkept,
)
from dalle_kernels.noise import on_device

WIDEST = 256
STRIP_BYTES = 64 * 1024 * 1024
MEAN_PROGRAMS = 264
"""Of the mean distribution, at the least where there are rows enough: two for each processor of an H100."""


@triton.jit
def scores(
    features_rows, weight, bias, code, valid, C,
    BIAS: tl.constexpr, EVEN: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Clean scores [BLOCK_N, codes] of the codes `code`, -inf of those that are not `valid`."""
    weight_rows = weight + code.to(tl.int64)[:, None] * C
    channel = tl.arange(0, BLOCK_C)[None, :]
    logits = tl.zeros([BLOCK_N, code.shape[0]], tl.float32)
    for first in range(0, C, BLOCK_C):
        if EVEN_C:
            f = tl.load(features_rows + first + channel)
            w = tl.load(weight_rows + first + channel)
        else:
            f = tl.load(features_rows + first + channel, mask=first + channel < C, other=0.0)
            w = tl.load(weight_rows + first + channel, mask=first + channel < C, other=0.0)
        logits = dot(f, tl.trans(w), logits, PRECISION)
    if BIAS:
        logits += tl.load(bias + code).to(tl.float32)[None, :]
    if not EVEN:
        logits = tl.where(valid[None, :], logits, float("-inf"))
    return logits


@triton.jit
def project(
    features_rows, weight, bias, code, valid, C,
    BIAS: tl.constexpr, EVEN: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Clean scores of four tiles [BLOCK_N, BLOCK_Q], one of each quarter, -inf past the codebook."""
    return apart(scores(features_rows, weight, bias, code, valid, C, BIAS, EVEN, EVEN_C, PRECISION, BLOCK_N, BLOCK_C))


@triton.jit
def projection_forward_kernel(
    features, weight, bias, codebook, temperature, seed, latents, indices, kl, maxima, log_noisy, log_clean, mean,
    N, C, K, quarter, D, stride,
    BIAS: tl.constexpr, HARD: tl.constexpr, NOISE: tl.constexpr, EVEN: tl.constexpr, EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    inverse = 1.0 / tl.load(temperature)
    key, first_row = tl.load(seed), tl.load(seed + 1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < N
    row = tl.minimum(row, N - 1)
    rows = features + row[:, None] * stride
    feature = tl.arange(0, BLOCK_D)[None, :]

    maximum = tl.full([BLOCK_N], LOWEST, tl.float32)
    index = tl.full([BLOCK_N], K, tl.int32)
    noisy_sum = tl.zeros([BLOCK_N], tl.float32)
    clean_sum = tl.zeros([BLOCK_N], tl.float32)
    clean_moment = tl.zeros([BLOCK_N], tl.float32)
    mixture = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    for start in range(0, quarter, BLOCK_Q):
        column = start + tl.arange(0, BLOCK_Q)[None, :]
        code, valid = codes_of(start, K, quarter, BLOCK_Q)
        t_0, t_1, t_2, t_3 = project(
            rows, weight, bias, code, valid, C, BIAS, EVEN, EVEN_C, PRECISION, BLOCK_N, BLOCK_C
        )
        word_0, word_1, word_2, word_3 = None, None, None, None
        if NOISE:
            # No code lies below 0: the term only ties the noise to the tile's layout (see `philox`).
            word_0, word_1, word_2, word_3 = philox(
                column.to(tl.uint32), (row + first_row + (index < 0))[:, None], key, STREAM
            )
        s_0, s_1 = add_noise(t_0, word_0, NOISE), add_noise(t_1, word_1, NOISE)
        s_2, s_3 = add_noise(t_2, word_2, NOISE), add_noise(t_3, word_3, NOISE)
        maximum, index, noisy_sum, clean_sum, clean_moment, mixture = enter(
            t_0, t_1, t_2, t_3, s_0, s_1, s_2, s_3, column, maximum, index, noisy_sum, clean_sum, clean_moment, mixture,
            load_codes(codebook, code, valid, D, D, EVEN, BLOCK_D), inverse, K, quarter, PRECISION,
        )  # fmt: skip

    store_rows(
        latents, indices, kl, maxima, log_noisy, log_clean, mean, codebook, row, inside, feature, index, maximum,
        noisy_sum, clean_sum, clean_moment, mixture, K, D, HARD,
    )  # fmt: skip


@triton.jit
def shares_of(t, maxima, log_clean, row):
    """softmax of whole rows' scores, of those [BLOCK_N, codes] that are here; NaN for a row of -inf alone."""
    return tl.exp2((t - tl.load(maxima + row)[:, None]) * LOG2_E - (tl.load(log_clean + row) * LOG2_E)[:, None])


@triton.jit
def projection_mean_kernel(
    features, weight, bias, maxima, log_clean, parts, N, C, K, stride, share,
    BIAS: tl.constexpr, EVEN: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sum of softmax(scores) over a share of the rows, for BLOCK_K codes; `parts` [shares, K]."""
    place = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    valid = place < K
    code = tl.where(valid, place, 0)
    total = tl.zeros([BLOCK_K], tl.float32)
    begin = tl.program_id(1) * share
    stop = tl.minimum(N, begin + share)
    for first in range(begin, stop, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        inside = row < stop
        row = tl.minimum(row, stop - 1).to(tl.int64)
        t = scores(
            features + row[:, None] * stride, weight, bias, unkept(code, first, EVEN), valid, C,
            BIAS, EVEN, EVEN_C, PRECISION, BLOCK_N, BLOCK_C,
        )  # fmt: skip
        total += tl.sum(tl.where(inside[:, None], shares_of(t, maxima, log_clean, row), 0.0), 0)
    tl.store(parts + tl.program_id(1).to(tl.int64) * K + code, total, mask=valid)


@triton.jit
def projection_pull_kernel(
    features, weight, bias, grad_shares, maxima, log_clean, pulls, N, C, K, stride,
    BIAS: tl.constexpr, EVEN: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """pulls[n] = softmax(scores of row n) . grad_shares"""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < N
    row = tl.minimum(row, N - 1)
    rows = features + row[:, None] * stride
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        valid = place < K
        code = tl.where(valid, place, 0)
        t = scores(rows, weight, bias, code, valid, C, BIAS, EVEN, EVEN_C, PRECISION, BLOCK_N, BLOCK_C)
        total += tl.sum(shares_of(t, maxima, log_clean, row) * tl.load(grad_shares + code)[None, :], 1)
    tl.store(pulls + row, total, mask=inside)


@triton.jit
def projection_backward_kernel(
    features, weight, bias, grad_latents, grad_kl, grad_shares, pulls, codebook, temperature, seed, indices, deltas, kl,
    maxima, log_noisy, log_clean, dlogits, parts, low, high, C, K, quarter, D, row_width, stride, share,
    BIAS: tl.constexpr, ACCUMULATE: tl.constexpr, LOGITS: tl.constexpr, CODEBOOK: tl.constexpr, MORE: tl.constexpr,
    LATENTS: tl.constexpr, KL: tl.constexpr, MEAN: tl.constexpr, HARD: tl.constexpr, NOISE: tl.constexpr,
    EVEN: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dlogits [high - low, K] of the strip of rows from `low` to `high`, and its share of dcodebook."""
    inverse = 1.0 / tl.load(temperature)
    key, first_row = tl.load(seed), tl.load(seed + 1)
    start = tl.program_id(0) * BLOCK_Q
    column = start + tl.arange(0, BLOCK_Q)[None, :]
    code, valid = codes_of(start, K, quarter, BLOCK_Q)
    feature = tl.arange(0, BLOCK_D)[None, :]
    dcodes = tl.zeros([4 * BLOCK_Q, BLOCK_D], tl.float32)
    if CODEBOOK and ACCUMULATE:
        part = parts + tl.program_id(1).to(tl.int64) * K * row_width
        places = code_places(code, row_width, BLOCK_D)
        dcodes = tl.load(part + places, mask=valid[:, None] & (feature < D), other=0.0)

    begin = low + tl.program_id(1) * share
    stop = tl.minimum(high, begin + share)
    for first in range(begin, stop, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        inside = row < stop
        row = tl.minimum(row, stop - 1).to(tl.int64)
        rows = features + row[:, None] * stride
        dlogits_rows = dlogits + (row - low)[:, None] * K
        # Rows past the share repeat its last one with a gradient of zero: they add nothing, and are not stored.
        grad, index, maximum, base, delta, slope, offset, clean = load_row_gradients(
            grad_latents, grad_kl, indices, deltas, kl, maxima, log_noisy, log_clean, row, inside, feature, inverse,
            K, D, row_width, LATENTS, KL,
        )  # fmt: skip
        if MEAN:
            offset -= tl.load(pulls + row)[:, None]
        again = unkept(code, first, EVEN)
        t_0, t_1, t_2, t_3 = project(
            rows, weight, bias, again, valid, C, BIAS, EVEN, EVEN_C, PRECISION, BLOCK_N, BLOCK_C
        )
        codes = load_codes(codebook, again, valid, D, row_width, EVEN, BLOCK_D) if LOGITS and LATENTS else None
        dcodes = backward_step(
            t_0, t_1, t_2, t_3, row + first_row, inside, column, codes, dcodes, grad, dlogits_rows, index, inverse,
            maximum, base, delta, clean, slope, offset, grad_shares, key, K, quarter,
            LOGITS, CODEBOOK, MORE, LATENTS, KL, MEAN, HARD, NOISE, PRECISION,
        )  # fmt: skip

    if CODEBOOK:
        part = parts + tl.program_id(1).to(tl.int64) * K * row_width
        places = code_places(unkept(code, stop, EVEN), row_width, BLOCK_D)
        tl.store(part + places, dcodes, mask=valid[:, None] & (feature < D))


def refuse(call: Call) -> str | None:
    if call.width > WIDEST:
        return f"the codebook is {call.width} wide, the kernels hold rows of at most {WIDEST}"
    if call.extras:
        return f"the kernels have no {call.extras[0]}: another register for it spills others"
    return obstacle(call.device, call.dtype)


def forward(inputs: Inputs) -> Outputs:
    features, weight, bias, codebook, temperature, hard, noise, seed, row_offset, with_distribution, *_ = inputs
    temperature, key = on_device(temperature, seed, row_offset, features.device)
    (rows, channels), (codes, width) = features.shape, codebook.shape
    latents = features.new_empty(rows, width)
    indices = features.new_empty(rows, dtype=torch.int64)
    kl, maximum, log_noisy, log_clean = (features.new_empty(rows, dtype=torch.float32) for _ in range(4))
    mixture = features.new_empty((rows, width) if hard else (0,), dtype=torch.float32)
    mean = kl.new_full((codes if with_distribution else 0,), torch.nan)  # of no row
    if rows:
        settings = constants("projection_forward", features.device, features.dtype, codes, width)
        projection_forward_kernel[(ceil_div(rows, settings["BLOCK_N"]),)](
            features, weight, bias, codebook, temperature, key, latents, indices, kl, maximum, log_noisy, log_clean,
            mixture, rows, channels, codes, ceil_div(codes, 4), width, features.stride(0),
            BIAS=bias is not None, HARD=hard, NOISE=noise, EVEN_C=channels % settings["BLOCK_C"] == 0, **settings,
        )  # fmt: skip
        if with_distribution:
            mean = mean_distribution(features, weight, bias, maximum, log_clean, settings)
    return Outputs(latents, indices, kl, maximum, log_noisy, log_clean, mixture, mean)


def mean_distribution(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    maximum: torch.Tensor,
    log_clean: torch.Tensor,
    settings: Mapping[str, Any],
) -> torch.Tensor:
    """float32 [K], the mean over the rows of softmax(logits)."""
    (rows, channels), codes = features.shape, weight.shape[0]
    settings = one_tile(settings, channels)
    tiles, steps = ceil_div(codes, settings["BLOCK_K"]), ceil_div(rows, settings["BLOCK_N"])
    share = ceil_div(steps, max(1, MEAN_PROGRAMS // tiles)) * settings["BLOCK_N"]
    parts = features.new_empty(ceil_div(rows, share), codes, dtype=torch.float32)
    projection_mean_kernel[(tiles, len(parts))](
        features, weight, bias, maximum, log_clean, parts, rows, channels, codes, features.stride(0), share,
        BIAS=bias is not None, **settings,
    )  # fmt: skip
    return sum_parts(parts, torch.float32).div_(rows)


def one_tile(settings: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """A lookup's settings, for kernels whose codes lie in one tile and which look none up."""
    left = {name: value for name, value in settings.items() if name not in ("BLOCK_Q", "BLOCK_D")}
    return {**left, "BLOCK_K": 4 * settings["BLOCK_Q"], "EVEN_C": channels % settings["BLOCK_C"] == 0}


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    grad_latents, grad_kl, grad_mean = grads
    features, weight, bias, codebook, temperature, hard, noise, seed, row_offset, _, tied, *_ = kept
    latents, indices, kl, maximum, log_noisy, log_clean, mixture = kept[11:18]
    temperature, key = on_device(temperature, seed, row_offset, features.device)
    (rows, channels), (codes, width) = features.shape, codebook.shape
    dfeatures = features.new_empty(rows, channels) if needs.features else None
    dweight = weight.new_zeros(weight.shape, dtype=torch.float32) if needs.weight else None
    dbias = bias.new_zeros(codes, dtype=torch.float32) if needs.bias and bias is not None else None
    through_logits = needs.features or needs.weight or dbias is not None
    needs_codebook = needs.weight if tied else needs.codebook
    through_latents = needs_codebook and grad_latents is not None
    parts = None
    if rows and (through_logits or through_latents):
        piece = piece_width(features.dtype)
        whole = width <= piece or width % piece == 0
        settings = dict(
            constants("projection_backward", features.device, features.dtype, codes, min(width, piece), whole)
        )
        block = settings["BLOCK_N"]
        quarter = ceil_div(codes, 4)
        tiles = ceil_div(quarter, settings["BLOCK_Q"])
        strip_steps = min(ceil_div(rows, block), max(1, STRIP_BYTES // (codes * features.element_size() * block)))
        share = ceil_div(strip_steps, max(1, settings.pop("programs") // tiles)) * block
        strip = features.new_empty(min(rows, strip_steps * block), codes)
        grad_shares = pulls = None
        if through_logits and grad_mean is not None and grad_mean.numel():
            grad_shares, pulls = grad_mean / rows, kl.new_empty(rows)
            projection_pull_kernel[(ceil_div(rows, block),)](
                features, weight, bias, grad_shares, maximum, log_clean, pulls, rows, channels, codes,
                features.stride(0), BIAS=bias is not None, **one_tile(settings, channels),
                maxnreg=128,  # left alone, ptxas of Triton 3.6 keeps to 48 or 80 and spills
            )  # fmt: skip
            grad_kl = torch.zeros_like(kl) if grad_kl is None else grad_kl  # whose term the mean's goes with
        if through_latents:
            # Zeros: a short last strip does not reach every part, and the first may be it.
            parts = features.new_zeros(ceil_div(strip_steps * block, share), codes, width, dtype=torch.float32)
        sliced = [
            (first, size, *slice_piece(first, size, grad_latents, codebook, parts, mixture if hard else latents))
            for first, size in pieces(width, features.dtype, grad_latents)
        ]
        for low in range(0, rows, strip_steps * block):
            high = min(rows, low + strip_steps * block)
            for first, size, grad, rest, part, deltas in sliced:
                projection_backward_kernel[(tiles, ceil_div(high - low, share))](
                    features, weight, bias, grad, grad_kl, grad_shares, pulls, rest, temperature, key, indices, deltas,
                    kl, maximum, log_noisy, log_clean, strip, part, low, high, channels, codes, quarter, size, width,
                    features.stride(0), share,
                    BIAS=bias is not None, ACCUMULATE=low > 0, LOGITS=through_logits, CODEBOOK=through_latents,
                    MORE=first > 0, LATENTS=grad_latents is not None,
                    KL=grad_kl is not None and first == 0, MEAN=pulls is not None and first == 0,
                    HARD=hard, NOISE=noise, EVEN_C=channels % settings["BLOCK_C"] == 0, **settings,
                )  # fmt: skip
            dlogits = strip[: high - low]
            if dfeatures is not None:
                torch.mm(dlogits, weight, out=dfeatures[low:high])
            if dweight is not None:
                # Each strip's product is rounded once; the sum of the strips is not.
                dweight += dlogits.T @ features[low:high]
            if dbias is not None:
                dbias += dlogits.sum(0, dtype=torch.float32)
    dcodebook = None
    if needs_codebook:
        dcodebook = torch.zeros_like(codebook) if parts is None else sum_parts(parts, codebook.dtype)
        if tied and dweight is not None:
            dweight += dcodebook
    rounded = [None if total is None else total.to(weight.dtype) for total in (dweight, dbias)]
    return dfeatures, *rounded, dcodebook
