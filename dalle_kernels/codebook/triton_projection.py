"""Gumbel-softmax lookup from features in Triton: the logits exist one tile at a time and never leave the chip.

Forward: as in triton_gumbel, with the tile of logits made by a matrix product. One product of BLOCK_N rows with
4 x BLOCK_Q codes, taken in turn from the four quarters, fills four tiles: code j of the product is column j // 4 of
quarter j % 4.

Backward: rows are taken in strips. A kernel makes a strip's logits again and turns them into dlogits while they are on
the chip; dcodebook is summed as in triton_gumbel. dfeatures and dweight are then two plain matrix products of the
strip, and the next strip reuses its memory. That is the least arithmetic there can be, three products of N x C x K, for
STRIP_BYTES of memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dalle_kernels.backends import Call
from dalle_kernels.codebook.triton_gumbel import (
    NEGATIVE,
    PIECE,
    STREAM,
    add_noise,
    backward_tile,
    code_products,
    load_row_gradients,
    mix,
    observe,
    pieces,
    plan,
    slice_piece,
    store_codes,
    store_rows,
    sum_parts,
)
from dalle_kernels.triton_common import dot, obstacle
from dalle_kernels.triton_noise import LOG2_E, philox

WIDEST = 256
STRIP_BYTES = 64 * 1024 * 1024


@triton.jit
def project(
    features_rows, weight, bias, start, C, K, quarter,
    BIAS: tl.constexpr, EVEN: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Clean scores of four tiles [BLOCK_N, BLOCK_Q], one of each quarter, NEGATIVE past the codebook."""
    place = tl.arange(0, 4 * BLOCK_Q)
    column = start + place // 4
    code = column + place % 4 * quarter
    valid = (column < quarter) & (code < K)
    code = tl.where(valid, code, 0)
    weight_rows = weight + code.to(tl.int64)[:, None] * C
    channel = tl.arange(0, BLOCK_C)[None, :]
    logits = tl.zeros([BLOCK_N, 4 * BLOCK_Q], tl.float32)
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
    t = tl.maximum(logits * LOG2_E, NEGATIVE, propagate_nan=tl.PropagateNan.ALL)
    if not EVEN:
        t = tl.where(valid[None, :], t, NEGATIVE)
    even, odd = tl.split(tl.reshape(t, [BLOCK_N, BLOCK_Q, 2, 2]))
    t_0, t_2 = tl.split(even)
    t_1, t_3 = tl.split(odd)
    return t_0, t_1, t_2, t_3


@triton.jit
def first_best(s, largest, column, quarter_index: tl.constexpr, K, quarter):
    """The first code of each row's largest score in one quarter's tile."""
    return tl.min(tl.where(s == largest[:, None], column + quarter_index * quarter, K - 1), 1)


@triton.jit
def projection_forward_kernel(
    features, weight, bias, codebook, temperature, seed, latents, indices, kl, lse_noisy, lse_clean, mean,
    N, C, K, quarter, D, stride,
    BIAS: tl.constexpr, HARD: tl.constexpr, NOISE: tl.constexpr, EVEN: tl.constexpr, EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    inverse = 1.0 / tl.load(temperature)
    key = tl.load(seed)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < N
    row = tl.minimum(row, N - 1)
    rows = features + row[:, None] * stride
    feature = tl.arange(0, BLOCK_D)[None, :]

    maximum = tl.full([BLOCK_N], NEGATIVE, tl.float32)
    index = tl.zeros([BLOCK_N], tl.int32)
    noisy_sum = tl.zeros([BLOCK_N], tl.float32)
    clean_sum = tl.zeros([BLOCK_N], tl.float32)
    clean_moment = tl.zeros([BLOCK_N], tl.float32)
    mixture = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    for start in range(0, quarter, BLOCK_Q):
        column = start + tl.arange(0, BLOCK_Q)[None, :]
        code = start + tl.arange(0, BLOCK_Q)[:, None]
        previous = maximum
        t_0, t_1, t_2, t_3 = project(
            rows, weight, bias, start, C, K, quarter, BIAS, EVEN, EVEN_C, PRECISION, BLOCK_N, BLOCK_Q, BLOCK_C
        )
        word_0, word_1, word_2, word_3 = None, None, None, None
        if NOISE:
            # No code lies below 0: the term only ties the noise to the tile's layout (see `philox`).
            word_0, word_1, word_2, word_3 = philox(column.to(tl.uint32), (row + (index < 0))[:, None], key, STREAM)
        s_0 = add_noise(t_0, word_0, NOISE)
        largest = tl.max(s_0, 1)
        first = first_best(s_0, largest, column, 0, K, quarter)
        maximum, index, clean_sum, clean_moment = observe(t_0, largest, first, maximum, index, clean_sum, clean_moment)
        s_1 = add_noise(t_1, word_1, NOISE)
        largest = tl.max(s_1, 1)
        first = first_best(s_1, largest, column, 1, K, quarter)
        maximum, index, clean_sum, clean_moment = observe(t_1, largest, first, maximum, index, clean_sum, clean_moment)
        s_2 = add_noise(t_2, word_2, NOISE)
        largest = tl.max(s_2, 1)
        first = first_best(s_2, largest, column, 2, K, quarter)
        maximum, index, clean_sum, clean_moment = observe(t_2, largest, first, maximum, index, clean_sum, clean_moment)
        s_3 = add_noise(t_3, word_3, NOISE)
        largest = tl.max(s_3, 1)
        first = first_best(s_3, largest, column, 3, K, quarter)
        maximum, index, clean_sum, clean_moment = observe(t_3, largest, first, maximum, index, clean_sum, clean_moment)

        noisy_sum, mixture = mix(
            s_0, s_1, s_2, s_3, previous, maximum, inverse, noisy_sum, mixture,
            codebook, code, feature, K, quarter, D, EVEN, PRECISION,
        )  # fmt: skip

    store_rows(
        latents, indices, kl, lse_noisy, lse_clean, mean, codebook, row, inside, feature, index, maximum, inverse,
        noisy_sum, clean_sum, clean_moment, mixture, K, D, HARD, NOISE,
    )  # fmt: skip


@triton.jit
def load_part(
    part, start, quarter_index: tl.constexpr, K, quarter, D, row_width,
    ACCUMULATE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What earlier strips summed of dcodebook, transposed [BLOCK_D, BLOCK_Q], or zeros."""
    if ACCUMULATE:
        column = start + tl.arange(0, BLOCK_Q)[None, :]
        feature = tl.arange(0, BLOCK_D)[:, None]
        code = column + quarter_index * quarter
        kept = (column < quarter) & (code < K) & (feature < D)
        return tl.load(part + code * row_width + feature, mask=kept, other=0.0)
    else:
        return tl.zeros([BLOCK_D, BLOCK_Q], tl.float32)


@triton.jit
def projection_backward_kernel(
    features, weight, bias, grad_latents, grad_kl, codebook, temperature, seed, indices, deltas, kl, lse_noisy,
    lse_clean, dlogits, parts, low, high, C, K, quarter, D, row_width, stride, share,
    BIAS: tl.constexpr, ACCUMULATE: tl.constexpr, MORE: tl.constexpr, LATENTS: tl.constexpr, KL: tl.constexpr,
    HARD: tl.constexpr, NOISE: tl.constexpr, EVEN: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dlogits [high - low, K] of the strip of rows from `low` to `high`, and its share of dcodebook."""
    inverse = 1.0 / tl.load(temperature)
    key = tl.load(seed)
    start = tl.program_id(0) * BLOCK_Q
    column = start + tl.arange(0, BLOCK_Q)[None, :]
    code = start + tl.arange(0, BLOCK_Q)[:, None]
    feature = tl.arange(0, BLOCK_D)[None, :]
    part = parts + tl.program_id(1).to(tl.int64) * K * row_width if LATENTS else parts
    dcodes_0, dcodes_1, dcodes_2, dcodes_3 = None, None, None, None
    if LATENTS:
        dcodes_0 = load_part(part, start, 0, K, quarter, D, row_width, ACCUMULATE, BLOCK_Q, BLOCK_D)
        dcodes_1 = load_part(part, start, 1, K, quarter, D, row_width, ACCUMULATE, BLOCK_Q, BLOCK_D)
        dcodes_2 = load_part(part, start, 2, K, quarter, D, row_width, ACCUMULATE, BLOCK_Q, BLOCK_D)
        dcodes_3 = load_part(part, start, 3, K, quarter, D, row_width, ACCUMULATE, BLOCK_Q, BLOCK_D)

    begin = low + tl.program_id(1) * share
    stop = tl.minimum(high, begin + share)
    for first in range(begin, stop, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        inside = row < stop
        row = tl.minimum(row, stop - 1).to(tl.int64)
        rows = features + row[:, None] * stride
        dlogits_rows = dlogits + (row - low)[:, None] * K
        # Rows past the share repeat its last one with a gradient of zero: they add nothing, and are not stored.
        grad, index, base, delta, slope, offset, clean = load_row_gradients(
            grad_latents, grad_kl, indices, deltas, kl, lse_noisy, lse_clean, row, inside, feature, inverse, K, D,
            row_width, LATENTS, KL, NOISE,
        )  # fmt: skip
        t_0, t_1, t_2, t_3 = project(
            rows, weight, bias, start, C, K, quarter, BIAS, EVEN, EVEN_C, PRECISION, BLOCK_N, BLOCK_Q, BLOCK_C
        )
        dy_0 = code_products(grad, codebook, code, feature, 0, K, quarter, D, row_width, LATENTS, EVEN, PRECISION)
        word_0, word_1, word_2, word_3 = None, None, None, None
        if LATENTS and NOISE:
            # No product is this large: the term only ties the noise to the tile's layout (see `philox`).
            tied = (row + (tl.max(dy_0, 1) > 3.4e38))[:, None]
            word_0, word_1, word_2, word_3 = philox(column.to(tl.uint32), tied, key, STREAM)
        dcodes_0 = backward_tile(
            t_0, dy_0, word_0, column, 0, K, quarter, inside, dcodes_0, grad, dlogits_rows, index, inverse, base, delta,
            clean, slope, offset, MORE, LATENTS, KL, HARD, NOISE, PRECISION,
        )  # fmt: skip
        dy_1 = code_products(grad, codebook, code, feature, 1, K, quarter, D, row_width, LATENTS, EVEN, PRECISION)
        dcodes_1 = backward_tile(
            t_1, dy_1, word_1, column, 1, K, quarter, inside, dcodes_1, grad, dlogits_rows, index, inverse, base, delta,
            clean, slope, offset, MORE, LATENTS, KL, HARD, NOISE, PRECISION,
        )  # fmt: skip
        dy_2 = code_products(grad, codebook, code, feature, 2, K, quarter, D, row_width, LATENTS, EVEN, PRECISION)
        dcodes_2 = backward_tile(
            t_2, dy_2, word_2, column, 2, K, quarter, inside, dcodes_2, grad, dlogits_rows, index, inverse, base, delta,
            clean, slope, offset, MORE, LATENTS, KL, HARD, NOISE, PRECISION,
        )  # fmt: skip
        dy_3 = code_products(grad, codebook, code, feature, 3, K, quarter, D, row_width, LATENTS, EVEN, PRECISION)
        dcodes_3 = backward_tile(
            t_3, dy_3, word_3, column, 3, K, quarter, inside, dcodes_3, grad, dlogits_rows, index, inverse, base, delta,
            clean, slope, offset, MORE, LATENTS, KL, HARD, NOISE, PRECISION,
        )  # fmt: skip

    if LATENTS:
        store_codes(part, dcodes_0, start, 0, K, quarter, D, row_width, BLOCK_Q, BLOCK_D)
        store_codes(part, dcodes_1, start, 1, K, quarter, D, row_width, BLOCK_Q, BLOCK_D)
        store_codes(part, dcodes_2, start, 2, K, quarter, D, row_width, BLOCK_Q, BLOCK_D)
        store_codes(part, dcodes_3, start, 3, K, quarter, D, row_width, BLOCK_Q, BLOCK_D)


def refuse(call: Call) -> str | None:
    if call.width > WIDEST:
        return f"the codebook is {call.width} wide, the kernels hold rows of at most {WIDEST}"
    return obstacle(call.device, call.dtype)


def projection_forward(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: torch.Tensor,
    temperature: torch.Tensor,
    hard: bool,
    noise: bool,
    seed: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """What `gumbel_forward(features @ weight.T + bias, codebook, ...)` returns."""
    (rows, channels), (codes, width) = features.shape, codebook.shape
    latents = features.new_empty(rows, width)
    indices = features.new_empty(rows, dtype=torch.int64)
    kl, lse_noisy, lse_clean = (features.new_empty(rows, dtype=torch.float32) for _ in range(3))
    mixture = features.new_empty((rows, width) if hard else (0,), dtype=torch.float32)
    if rows:
        settings = plan("projection_forward", features.device, features.dtype, codes, width)
        projection_forward_kernel[(triton.cdiv(rows, settings["BLOCK_N"]),)](
            features, weight, bias, codebook, temperature, seed, latents, indices, kl, lse_noisy, lse_clean, mixture,
            rows, channels, codes, triton.cdiv(codes, 4), width, features.stride(0),
            BIAS=bias is not None, HARD=hard, NOISE=noise, EVEN_C=channels % settings["BLOCK_C"] == 0, **settings,
        )  # fmt: skip
    return latents, indices, kl, lse_noisy, lse_clean, mixture


def projection_backward(
    grad_latents: torch.Tensor | None,
    grad_kl: torch.Tensor | None,
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: torch.Tensor,
    temperature: torch.Tensor,
    hard: bool,
    noise: bool,
    seed: torch.Tensor,
    latents: torch.Tensor,
    indices: torch.Tensor,
    kl: torch.Tensor,
    lse_noisy: torch.Tensor,
    lse_clean: torch.Tensor,
    mixture: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(dfeatures, dweight, dbias or None, dcodebook)."""
    (rows, channels), (codes, width) = features.shape, codebook.shape
    dfeatures = features.new_empty(rows, channels)
    dweight = weight.new_zeros(weight.shape, dtype=torch.float32)
    dbias = None if bias is None else bias.new_zeros(codes, dtype=torch.float32)
    parts = None
    if rows:
        whole = width <= PIECE or width % PIECE == 0
        settings = dict(plan("projection_backward", features.device, features.dtype, codes, min(width, PIECE), whole))
        block = settings["BLOCK_N"]
        quarter = triton.cdiv(codes, 4)
        tiles = triton.cdiv(quarter, settings["BLOCK_Q"])
        strip_steps = min(triton.cdiv(rows, block), max(1, STRIP_BYTES // (codes * features.element_size() * block)))
        share = triton.cdiv(strip_steps, max(1, settings.pop("programs") // tiles)) * block
        strip = features.new_empty(min(rows, strip_steps * block), codes)
        if grad_latents is not None:
            # Zeros: a short last strip does not reach every part, and the first may be it.
            parts = features.new_zeros(triton.cdiv(strip_steps * block, share), codes, width, dtype=torch.float32)
        sliced = [
            (first, size, *slice_piece(first, size, grad_latents, codebook, parts, mixture if hard else latents))
            for first, size in pieces(width, grad_latents)
        ]
        for low in range(0, rows, strip_steps * block):
            high = min(rows, low + strip_steps * block)
            for first, size, grads, rest, part, deltas in sliced:
                projection_backward_kernel[(tiles, triton.cdiv(high - low, share))](
                    features, weight, bias, grads, grad_kl, rest, temperature, seed, indices, deltas, kl, lse_noisy,
                    lse_clean, strip, part, low, high, channels, codes, quarter, size, width, features.stride(0), share,
                    BIAS=bias is not None, ACCUMULATE=low > 0, MORE=first > 0, LATENTS=grad_latents is not None,
                    KL=grad_kl is not None and first == 0, HARD=hard, NOISE=noise,
                    EVEN_C=channels % settings["BLOCK_C"] == 0, **settings,
                )  # fmt: skip
            dlogits = strip[: high - low]
            torch.mm(dlogits, weight, out=dfeatures[low:high])
            # Each strip's product is rounded once; the sum of the strips is not.
            dweight += dlogits.T @ features[low:high]
            if dbias is not None:
                dbias += dlogits.sum(0, dtype=torch.float32)
    dcodebook = torch.zeros_like(codebook) if parts is None else sum_parts(parts, codebook.dtype)
    return dfeatures, dweight.to(weight.dtype), None if dbias is None else dbias.to(weight.dtype), dcodebook
