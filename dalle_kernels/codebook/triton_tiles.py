"""Tiles of codes that Triton kernels of the codebook share: how a row's statistics and gradients take four of them in.

The formulas are those of gumbel/triton.py. A tile takes BLOCK_Q columns out of each quarter of the codebook, which one
Philox counter serves (see triton_noise). The four tiles of a step enter one matrix product side by side, in the order
that costs no exchange between threads: code j of the product is column j // 4 of quarter j % 4.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl

from dalle_kernels.backends import launch
from dalle_kernels.backends.triton_common import ceil_div, dot, precision
from dalle_kernels.backends.triton_noise import LN_2, LOG2_E, fast_log2, gumbel2, philox
from dalle_kernels.noise import GUMBEL_STREAM

STREAM = tl.constexpr(GUMBEL_STREAM)
ALIGNMENT = 128  # every BLOCK_Q divides a quarter of a codebook whose size this divides
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the largest of no scores: finite, so that -inf less it is -inf
NEGATIVE = tl.constexpr(-1e30)  # stands for an exponent of minus infinity where 0 times it must not be NaN


@triton.jit
def together(x_0, x_1, x_2, x_3):
    """Four tiles [n, BLOCK_Q], one of each quarter, as one [n, 4 BLOCK_Q] whose place is 4 column + quarter."""
    both = tl.join(tl.join(x_0, x_2), tl.join(x_1, x_3))
    return tl.reshape(both, [x_0.shape[0], 4 * x_0.shape[1]])


@triton.jit
def apart(x):
    """The opposite of `together`."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 4, 2, 2]))
    x_0, x_2 = tl.split(even)
    x_1, x_3 = tl.split(odd)
    return x_0, x_1, x_2, x_3


@triton.jit
def codes_of(start, K, quarter, BLOCK_Q: tl.constexpr):
    """Codes [4 BLOCK_Q] in the order of `together`, and which of them exist; those that do not read as code 0."""
    place = tl.arange(0, 4 * BLOCK_Q)
    column = start + place // 4
    code = column + place % 4 * quarter
    valid = (column < quarter) & (code < K)
    return tl.where(valid, code, 0), valid


@triton.jit
def load_codes(codebook, code, valid, D, row_width, EVEN: tl.constexpr, BLOCK_D: tl.constexpr):
    """Codebook rows [4 BLOCK_Q, BLOCK_D], zero past the end."""
    feature = tl.arange(0, BLOCK_D)[None, :]
    pointers = codebook + code.to(tl.int64)[:, None] * row_width + feature
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=valid[:, None] & (feature < D), other=0.0)


@triton.jit
def unkept(code, first, EVEN: tl.constexpr):
    """`code`, looking as if it changed with the row `first`, which is never below 0. Masked loads need so many pointers
    that a compiler which keeps them from step to step has no registers left."""
    return code if EVEN else code + (first < 0)


@triton.jit
def add_noise(t, word, NOISE: tl.constexpr):
    if NOISE:
        return t + gumbel2(word) * LN_2
    else:
        return t


@triton.jit
def exponent_of(difference):
    """A difference of clean scores as a power of two, for moments and entropies: no 0 is multiplied with -inf."""
    return tl.maximum(difference * LOG2_E, NEGATIVE, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def enter(
    t_0, t_1, t_2, t_3, s_0, s_1, s_2, s_3, column, maximum, index, noisy_sum, clean_sum, clean_moment, mixture, codes,
    inverse, K, quarter, PRECISION: tl.constexpr,
):  # fmt: skip
    """Enters four tiles into the running statistics of their rows and into the mixture [n, BLOCK_D], not normalised.

    t: clean scores, s: noisy ones, codes [4 BLOCK_Q, BLOCK_D]. `index` is the first code of the largest noisy score.
    """
    max_0, max_1, max_2, max_3 = tl.max(s_0, 1), tl.max(s_1, 1), tl.max(s_2, 1), tl.max(s_3, 1)
    largest = tl.maximum(tl.maximum(max_0, max_1), tl.maximum(max_2, max_3))
    # One quarter, the first that has the maximum, is searched for it.
    place = tl.where(max_0 == largest, 0, tl.where(max_1 == largest, 1, tl.where(max_2 == largest, 2, 3)))
    which = place[:, None]
    s = tl.where(which < 2, tl.where(which == 0, s_0, s_1), tl.where(which == 2, s_2, s_3))
    first = tl.min(tl.where(s == largest[:, None], column + which * quarter, K - 1), 1)
    # An equal maximum wins only by a smaller code, which a later tile can have in an earlier quarter.
    index = tl.where((largest > maximum) | ((largest == maximum) & (first < index)), first, index)
    larger = tl.maximum(maximum, largest)

    shift = maximum - larger
    drop = exponent_of(shift)
    scale = tl.exp2(drop)
    t_0, t_1 = exponent_of(t_0 - larger[:, None]), exponent_of(t_1 - larger[:, None])
    t_2, t_3 = exponent_of(t_2 - larger[:, None]), exponent_of(t_3 - larger[:, None])
    p_0, p_1, p_2, p_3 = tl.exp2(t_0), tl.exp2(t_1), tl.exp2(t_2), tl.exp2(t_3)
    moment = tl.sum((p_0 * t_0 + p_1 * t_1) + (p_2 * t_2 + p_3 * t_3), 1)
    clean_moment = (clean_moment + drop * clean_sum) * scale + moment
    clean_sum = clean_sum * scale + tl.sum((p_0 + p_1) + (p_2 + p_3), 1)

    slope = inverse * LOG2_E
    scale = tl.exp2(shift * slope)
    y_0, y_1 = tl.exp2((s_0 - larger[:, None]) * slope), tl.exp2((s_1 - larger[:, None]) * slope)
    y_2, y_3 = tl.exp2((s_2 - larger[:, None]) * slope), tl.exp2((s_3 - larger[:, None]) * slope)
    noisy_sum = noisy_sum * scale + tl.sum((y_0 + y_1) + (y_2 + y_3), 1)
    dtype = codes.dtype
    weights = together(y_0.to(dtype), y_1.to(dtype), y_2.to(dtype), y_3.to(dtype))
    mixture = dot(weights, codes, mixture * scale[:, None], PRECISION)
    return larger, index, noisy_sum, clean_sum, clean_moment, mixture


@triton.jit
def store_rows(
    latents, indices, kl, maxima, log_noisy, log_clean, mean, codebook, row, inside, feature, index, maximum,
    noisy_sum, clean_sum, clean_moment, mixture, K, D, HARD: tl.constexpr,
):  # fmt: skip
    """Writes what the statistics of whole rows come to; 0 / 0 for a row of -inf alone, which has no distribution."""
    index = tl.where(index == K, 0, index)
    clean_log = fast_log2(clean_sum)
    tl.store(indices + row, index.to(tl.int64), mask=inside)
    # K = 1 comes as a constant, which `tl.cast` takes but which has no method `to`.
    tl.store(kl + row, (tl.log2(tl.cast(K, tl.float32)) + clean_moment / clean_sum - clean_log) * LN_2, mask=inside)
    tl.store(maxima + row, maximum, mask=inside)
    tl.store(log_noisy + row, fast_log2(noisy_sum) * LN_2, mask=inside)
    tl.store(log_clean + row, clean_log * LN_2, mask=inside)
    kept = inside[:, None] & (feature < D)
    place = row[:, None] * D + feature
    mixture /= noisy_sum[:, None]
    if HARD:
        tl.store(mean + place, mixture, mask=kept)
        chosen = tl.load(codebook + index[:, None] * D + feature, mask=feature < D, other=0.0)
        tl.store(latents + place, chosen, mask=kept)
    else:
        tl.store(latents + place, mixture.to(latents.dtype.element_ty), mask=kept)


@triton.jit
def row_product_kernel(a, b, out, N, D, row_width, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[n] = sum over d of a[n, d] b[n, d], in fp32."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    feature = tl.arange(0, BLOCK_D)[None, :]
    place = row[:, None] * row_width + feature
    kept = (row < N)[:, None] & (feature < D)
    product = tl.load(a + place, mask=kept, other=0.0).to(tl.float32) * tl.load(b + place, mask=kept, other=0.0)
    tl.store(out + row, tl.sum(product, 1), mask=row < N)


@triton.jit(do_not_specialize=["number"])
def sum_parts_kernel(parts, out, total, number, BLOCK: tl.constexpr):
    """out = the sum over the first dimension of `parts` [number, total], in order, in fp32.

    `number` follows from how many rows there are: one kernel serves them all.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = place < total
    value = tl.load(parts + place, mask=kept, other=0.0)
    for _ in range(1, number):
        parts += total
        value += tl.load(parts + place, mask=kept, other=0.0)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=kept)


@triton.jit
def gradient_of(
    t, dy, word, code, index, inverse, maximum, base, delta, clean, slope, offset, grad_shares, K,
    LOGITS: tl.constexpr, LATENTS: tl.constexpr, KL: tl.constexpr, MEAN: tl.constexpr, HARD: tl.constexpr,
    NOISE: tl.constexpr,
):  # fmt: skip
    """(dlogits where LOGITS, what dcodebook weighs G with) of one quarter's tile of scores t [n, BLOCK_Q].

    dy: the quarter's part of G codebook^T; code: its codes [1, BLOCK_Q]; grad_shares [K]: with MEAN, the
    derivatives by each row's p besides, whose product with p `offset` lacks.
    """
    chosen, gradient = None, tl.zeros(t.shape, tl.float32)
    if LATENTS:
        y = tl.exp2((add_noise(t, word, NOISE) - maximum) * (inverse * LOG2_E) - base)
        if LOGITS:
            gradient = y * (dy * inverse - delta)
        chosen = tl.where(index == code, 1.0, 0.0) if HARD else y
    if LOGITS and KL:
        log_p = exponent_of(t - maximum) - clean
        if MEAN:
            offset += tl.load(grad_shares + code, mask=code < K, other=0.0)
        gradient += tl.exp2(log_p) * (slope * log_p + offset)
    return gradient, chosen


@triton.jit
def store_gradient(dlogits_rows, gradient, column, quarter_index: tl.constexpr, K, quarter, inside, MORE: tl.constexpr):
    """Stores one quarter's tile of dlogits, or adds it to what an earlier piece stored where there is MORE."""
    code = column + quarter_index * quarter
    kept = inside[:, None] & (column < quarter) & (code < K)
    if MORE:
        gradient += tl.load(dlogits_rows + code, mask=kept, other=0.0).to(tl.float32)
    tl.store(dlogits_rows + code, gradient.to(dlogits_rows.dtype.element_ty), mask=kept)


@triton.jit
def backward_step(
    t_0, t_1, t_2, t_3, noise_row, inside, column, codes, dcodes, grad, dlogits_rows, index, inverse, maximum, base,
    delta, clean, slope, offset, grad_shares, key, K, quarter,
    LOGITS: tl.constexpr, CODEBOOK: tl.constexpr, MORE: tl.constexpr, LATENTS: tl.constexpr, KL: tl.constexpr,
    MEAN: tl.constexpr, HARD: tl.constexpr, NOISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores four tiles of dlogits [n, BLOCK_Q] where LOGITS; returns dcodes [4 BLOCK_Q, BLOCK_D], with these rows'
    share added where CODEBOOK."""
    dy_0, dy_1, dy_2, dy_3 = None, None, None, None
    word_0, word_1, word_2, word_3 = None, None, None, None
    if LATENTS:
        tie = t_0
        if LOGITS:
            dy = dot(grad, tl.trans(codes), tl.zeros([grad.shape[0], codes.shape[0]], tl.float32), PRECISION)
            dy_0, dy_1, dy_2, dy_3 = apart(dy)
            tie = dy_0
        if NOISE:
            # No product or score is this large: the term only ties the noise to the tile's layout (see `philox`).
            tied = (noise_row + (tl.max(tie, 1) > 3.4e38))[:, None]
            word_0, word_1, word_2, word_3 = philox(column.to(tl.uint32), tied, key, STREAM)
    gradient, chosen_0 = gradient_of(
        t_0, dy_0, word_0, column, index, inverse, maximum, base, delta, clean, slope, offset,
        grad_shares, K, LOGITS, LATENTS, KL, MEAN, HARD, NOISE,
    )  # fmt: skip
    if LOGITS:
        store_gradient(dlogits_rows, gradient, column, 0, K, quarter, inside, MORE)
    gradient, chosen_1 = gradient_of(
        t_1, dy_1, word_1, column + quarter, index, inverse, maximum, base, delta, clean, slope, offset,
        grad_shares, K, LOGITS, LATENTS, KL, MEAN, HARD, NOISE,
    )  # fmt: skip
    if LOGITS:
        store_gradient(dlogits_rows, gradient, column, 1, K, quarter, inside, MORE)
    gradient, chosen_2 = gradient_of(
        t_2, dy_2, word_2, column + 2 * quarter, index, inverse, maximum, base, delta, clean, slope, offset,
        grad_shares, K, LOGITS, LATENTS, KL, MEAN, HARD, NOISE,
    )  # fmt: skip
    if LOGITS:
        store_gradient(dlogits_rows, gradient, column, 2, K, quarter, inside, MORE)
    gradient, chosen_3 = gradient_of(
        t_3, dy_3, word_3, column + 3 * quarter, index, inverse, maximum, base, delta, clean, slope, offset,
        grad_shares, K, LOGITS, LATENTS, KL, MEAN, HARD, NOISE,
    )  # fmt: skip
    if LOGITS:
        store_gradient(dlogits_rows, gradient, column, 3, K, quarter, inside, MORE)
    if CODEBOOK:
        dtype = grad.dtype
        chosen = together(chosen_0.to(dtype), chosen_1.to(dtype), chosen_2.to(dtype), chosen_3.to(dtype))
        dcodes = dot(tl.trans(chosen), grad, dcodes, PRECISION)
    return dcodes


@triton.jit
def code_places(code, row_width, BLOCK_D: tl.constexpr):
    """Where the elements [4 BLOCK_Q, BLOCK_D] of these codes lie in a part of dcodebook."""
    return code.to(tl.int64)[:, None] * row_width + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_row_gradients(
    grad_latents, grad_kl, indices, deltas, kl, maxima, log_noisy, log_clean, row, inside, feature, inverse, K, D,
    row_width, LATENTS: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """What the backward pass knows of its rows: G [n, BLOCK_D], zero where not `inside`, and columns [n, 1]."""
    # Never read where a flag is off; Triton 3.6 cannot return None.
    grad, index, base, delta, slope, offset, clean = 0.0, 0, 0.0, 0.0, 0.0, 0.0, 0.0
    if LATENTS:
        grad = tl.load(
            grad_latents + row[:, None] * row_width + feature, mask=inside[:, None] & (feature < D), other=0.0
        )
        index = tl.load(indices + row).to(tl.int32)[:, None]
        base = (tl.load(log_noisy + row) * LOG2_E)[:, None]
        delta = (tl.load(deltas + row) * inverse)[:, None]
    if KL:
        scale = tl.load(grad_kl + row)
        slope = (scale * LN_2)[:, None]
        offset = (scale * (tl.log2(tl.cast(K, tl.float32)) * LN_2 - tl.load(kl + row)))[:, None]
        clean = (tl.load(log_clean + row) * LOG2_E)[:, None]
    maximum = tl.load(maxima + row)[:, None]
    return grad, index, maximum, base, delta, slope, offset, clean


@functools.lru_cache(maxsize=256)
def constants(
    kernel: str, device: torch.device, dtype: torch.dtype, codes: int, width: int, whole: bool = True
) -> Mapping[str, Any]:
    """The constants of a launch: tile sizes, warps and stages from the table, and what the shapes allow.

    Shapes that do not fill a whole number of tiles are masked everywhere, which takes registers: smaller tiles then.
    """
    block_d = max(16, triton.next_power_of_2(width))
    even = codes % ALIGNMENT == 0 and width == block_d and whole
    name = kernel if even else f"{kernel}_tails"
    settings = launch.settings_for(name, launch.architecture(device), 8 * dtype.itemsize, width)
    shapes = {"BLOCK_D": block_d, "EVEN": even, "PRECISION": precision(dtype), "enable_fp_fusion": True}
    return MappingProxyType({**settings, **shapes})


def piece_width(dtype: torch.dtype) -> int:
    """Dimensions of the latents that the backward pass takes at once: 256 bytes."""
    return 256 // dtype.itemsize


def pieces(width: int, dtype: torch.dtype, grad_latents: torch.Tensor | None) -> list[tuple[int, int]]:
    """(first, size) of the pieces of a codebook's rows that the backward pass takes one after another.

    dlogits is a sum over the latents' dimensions, so a wide codebook's can be made piece by piece, each at the price of
    another pass over the logits; the sums of a whole wide row would not fit the registers.
    """
    piece = piece_width(dtype)
    if grad_latents is None:
        return [(0, min(width, piece))]
    return [(first, min(piece, width - first)) for first in range(0, width, piece)]


def slice_piece(
    first: int,
    size: int,
    grad_latents: torch.Tensor | None,
    codebook: torch.Tensor,
    parts: torch.Tensor | None,
    mixture: torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """One piece of the gradient, the codebook and dcodebook's parts, and the piece's row products."""
    if grad_latents is None:
        return None, codebook, None, None
    grads, part = grad_latents[:, first:], None if parts is None else parts[..., first:]
    return grads, codebook[:, first:], part, row_product(grads, mixture[:, first:], size)


def row_product(a: torch.Tensor, b: torch.Tensor, size: int) -> torch.Tensor:
    """fp32 [N]: the products of the rows of a and b, of their first `size` elements; rows equally far apart in both."""
    rows = a.shape[0]
    out = a.new_empty(rows, dtype=torch.float32)
    block = triton.next_power_of_2(size)
    grid = (ceil_div(rows, 32),)
    row_product_kernel[grid](
        a, b, out, rows, size, a.stride(0), BLOCK_N=32, BLOCK_D=block, num_warps=4, enable_fp_fusion=True
    )
    return out


def sum_parts(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum over the first dimension of fp32 `parts`, in order, rounded to `dtype` once."""
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    grid = (ceil_div(out.numel(), 1024),)
    sum_parts_kernel[grid](parts, out, out.numel(), parts.shape[0], BLOCK=1024, num_warps=4, enable_fp_fusion=True)
    return out
