"""Gumbel-softmax lookup in Triton: one pass over the logits forward, one backward.

With t the logits, s = t + g the noisy scores (g shifted by a constant, which no softmax sees), m the largest of these,
tau the temperature and e(x) = 2^(x log2(e)):

    y = e((s - m) / tau) / S    the sampled mixture            latents = y @ codebook       S = sum e((s - m) / tau)
    p = e(t - m) / P            the encoder's distribution     kl = log K + sum p log p     P = sum e(t - m)

kl = log K + ln 2 (A / P - log2 P) where A = sum e(t - m) (t - m) log2(e). Noise lies between -2.82 and 16.64, so the
running maximum m of the noisy scores is never far below the clean ones: one maximum serves both sums. Differences from
it come first, exactly, and it is kept apart from log S and log P: logits may be so large that these, and even the
noise, are lost in their rounding.

Backward, with G the gradient of the latents, delta = sum over d of G latents, and h the gradient of kl:

    dlogits   = y (G codebook^T - delta) / tau + h p (log p + log K - kl)
    dcodebook = y^T G

A program owns 4 x BLOCK_Q codes and walks down the rows, so dcodebook is summed in registers in a fixed order. Rows are
split among a few programs to fill the machine; their partial sums are added in order by a second kernel.
"""

import torch
import triton
import triton.language as tl

from dalle_kernels.backends.contract import Call
from dalle_kernels.backends.triton_common import ceil_div, obstacle
from dalle_kernels.backends.triton_noise import philox
from dalle_kernels.codebook.gumbel.contract import Grads, Inputs, Kept, Needs, Outputs
from dalle_kernels.codebook.triton_tiles import (
    LOWEST,
    STREAM,
    add_noise,
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


@triton.jit
def load_scores(logits_rows, columns, quarter_index: tl.constexpr, K, quarter, EVEN: tl.constexpr):
    """Clean scores t [n, BLOCK_Q] of one quarter's columns; -inf past the codebook."""
    code = columns + quarter_index * quarter
    if EVEN:
        return tl.load(logits_rows + code).to(tl.float32)
    valid = (columns < quarter) & (code < K)
    return tl.load(logits_rows + code, mask=valid, other=float("-inf")).to(tl.float32)


@triton.jit
def gumbel_forward_kernel(
    logits, codebook, temperature, seed, latents, indices, kl, maxima, log_noisy, log_clean, mean,
    N, K, quarter, D, stride,
    HARD: tl.constexpr, NOISE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    inverse = 1.0 / tl.load(temperature)
    key, first_row = tl.load(seed), tl.load(seed + 1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < N
    row = tl.minimum(row, N - 1)
    rows = logits + row[:, None] * stride
    feature = tl.arange(0, BLOCK_D)[None, :]

    maximum = tl.full([BLOCK_N], LOWEST, tl.float32)
    index = tl.full([BLOCK_N], K, tl.int32)  # of no code yet, so that the first as low as LOWEST is found
    noisy_sum = tl.zeros([BLOCK_N], tl.float32)
    clean_sum = tl.zeros([BLOCK_N], tl.float32)
    clean_moment = tl.zeros([BLOCK_N], tl.float32)
    mixture = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    for start in range(0, quarter, BLOCK_Q):
        column = start + tl.arange(0, BLOCK_Q)[None, :]
        # No code lies below 0: the term only ties the noise to the tile's layout (see `philox`).
        word_0, word_1, word_2, word_3 = philox(
            column.to(tl.uint32), (row + first_row + (index < 0))[:, None], key, STREAM
        )
        t_0 = load_scores(rows, column, 0, K, quarter, EVEN)
        t_1 = load_scores(rows, column, 1, K, quarter, EVEN)
        t_2 = load_scores(rows, column, 2, K, quarter, EVEN)
        t_3 = load_scores(rows, column, 3, K, quarter, EVEN)
        s_0, s_1 = add_noise(t_0, word_0, NOISE), add_noise(t_1, word_1, NOISE)
        s_2, s_3 = add_noise(t_2, word_2, NOISE), add_noise(t_3, word_3, NOISE)
        code, valid = codes_of(start, K, quarter, BLOCK_Q)
        maximum, index, noisy_sum, clean_sum, clean_moment, mixture = enter(
            t_0, t_1, t_2, t_3, s_0, s_1, s_2, s_3, column, maximum, index, noisy_sum, clean_sum, clean_moment, mixture,
            load_codes(codebook, code, valid, D, D, EVEN, BLOCK_D), inverse, K, quarter, PRECISION,
        )  # fmt: skip

    store_rows(
        latents, indices, kl, maxima, log_noisy, log_clean, mean, codebook, row, inside, feature, index, maximum,
        noisy_sum, clean_sum, clean_moment, mixture, K, D, HARD,
    )  # fmt: skip


@triton.jit
def gumbel_backward_kernel(
    grad_latents, grad_kl, logits, codebook, temperature, seed, indices, deltas, kl, maxima, log_noisy, log_clean,
    dlogits, parts, N, K, quarter, D, row_width, stride, share,
    LOGITS: tl.constexpr, CODEBOOK: tl.constexpr, MORE: tl.constexpr, LATENTS: tl.constexpr, KL: tl.constexpr,
    HARD: tl.constexpr, NOISE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    inverse = 1.0 / tl.load(temperature)
    key, first_row = tl.load(seed), tl.load(seed + 1)
    start = tl.program_id(0) * BLOCK_Q
    column = start + tl.arange(0, BLOCK_Q)[None, :]
    code, valid = codes_of(start, K, quarter, BLOCK_Q)
    feature = tl.arange(0, BLOCK_D)[None, :]
    dcodes = tl.zeros([4 * BLOCK_Q, BLOCK_D], tl.float32)

    stop = tl.minimum(N, (tl.program_id(1) + 1) * share)
    for first in range(tl.program_id(1) * share, stop, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        inside = row < stop
        row = tl.minimum(row, stop - 1).to(tl.int64)
        rows = logits + row[:, None] * stride
        dlogits_rows = dlogits + row[:, None] * K if LOGITS else None
        # Rows past the share repeat its last one with a gradient of zero: they add nothing, and are not stored.
        grad, index, maximum, base, delta, slope, offset, clean = load_row_gradients(
            grad_latents, grad_kl, indices, deltas, kl, maxima, log_noisy, log_clean, row, inside, feature, inverse,
            K, D, row_width, LATENTS, KL,
        )  # fmt: skip
        t_0 = load_scores(rows, column, 0, K, quarter, EVEN)
        t_1 = load_scores(rows, column, 1, K, quarter, EVEN)
        t_2 = load_scores(rows, column, 2, K, quarter, EVEN)
        t_3 = load_scores(rows, column, 3, K, quarter, EVEN)
        # The codes come from cache each time: no registers hold them.
        codes = None
        if LOGITS and LATENTS:
            codes = load_codes(codebook, unkept(code, first, EVEN), valid, D, row_width, EVEN, BLOCK_D)
        dcodes = backward_step(
            t_0, t_1, t_2, t_3, row + first_row, inside, column, codes, dcodes, grad, dlogits_rows, index, inverse,
            maximum, base, delta, clean, slope, offset, None, key, K, quarter,
            LOGITS, CODEBOOK, MORE, LATENTS, KL, False, HARD, NOISE, PRECISION,
        )  # fmt: skip

    if CODEBOOK:
        part = parts + tl.program_id(1).to(tl.int64) * K * row_width
        tl.store(part + code_places(code, row_width, BLOCK_D), dcodes, mask=valid[:, None] & (feature < D))


def refuse(call: Call) -> str | None:
    if call.width > WIDEST:
        return f"the codebook is {call.width} wide, the kernels hold rows of at most {WIDEST}"
    if call.extras:
        return f"the kernels have no {call.extras[0]}: another register for it spills others"
    return obstacle(call.device, call.dtype)


def forward(inputs: Inputs) -> Outputs:
    logits, codebook, temperature, hard, noise, seed, row_offset, _ = inputs
    temperature, key = on_device(temperature, seed, row_offset, logits.device)
    (rows, codes), width = logits.shape, codebook.shape[1]
    latents = logits.new_empty(rows, width)
    indices = logits.new_empty(rows, dtype=torch.int64)
    kl, maximum, log_noisy, log_clean = (logits.new_empty(rows, dtype=torch.float32) for _ in range(4))
    mixture = logits.new_empty((rows, width) if hard else (0,), dtype=torch.float32)
    if rows:
        settings = constants("gumbel_forward", logits.device, logits.dtype, codes, width)
        gumbel_forward_kernel[(ceil_div(rows, settings["BLOCK_N"]),)](
            logits, codebook, temperature, key, latents, indices, kl, maximum, log_noisy, log_clean, mixture,
            rows, codes, ceil_div(codes, 4), width, logits.stride(0), HARD=hard, NOISE=noise, **settings,
        )  # fmt: skip
    return Outputs(latents, indices, kl, maximum, log_noisy, log_clean, mixture)


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    """See the formulas at the top of the file."""
    grad_latents, grad_kl = grads
    logits, codebook, temperature, hard, noise, seed, row_offset, *_ = kept
    latents, indices, kl, maximum, log_noisy, log_clean, mixture = kept[7:14]
    temperature, key = on_device(temperature, seed, row_offset, logits.device)
    (rows, codes), width = logits.shape, codebook.shape[1]
    dlogits = logits.new_empty(rows, codes) if needs.logits else None
    through_latents = needs.codebook and grad_latents is not None
    if not rows or not (needs.logits or through_latents):
        return dlogits, torch.zeros_like(codebook) if needs.codebook else None
    piece = piece_width(logits.dtype)
    whole = width <= piece or width % piece == 0
    settings = dict(constants("gumbel_backward", logits.device, logits.dtype, codes, min(width, piece), whole))
    quarter = ceil_div(codes, 4)
    tiles = ceil_div(quarter, settings["BLOCK_Q"])
    # Rows are split until there are programs enough, each with a whole number of tiles.
    steps = ceil_div(rows, settings["BLOCK_N"])
    parts = max(1, min(steps, settings.pop("programs") // tiles))
    share = ceil_div(steps, parts) * settings["BLOCK_N"]
    parts = ceil_div(rows, share)
    partial = logits.new_empty(parts, codes, width, dtype=torch.float32) if through_latents else None
    for first, size in pieces(width, logits.dtype, grad_latents):
        grad, rest, part, deltas = slice_piece(
            first, size, grad_latents, codebook, partial, mixture if hard else latents
        )
        gumbel_backward_kernel[(tiles, parts)](
            grad, grad_kl, logits, rest, temperature, key, indices, deltas, kl, maximum, log_noisy, log_clean,
            dlogits, part, rows, codes, quarter, size, width, logits.stride(0), share,
            LOGITS=needs.logits, CODEBOOK=through_latents, MORE=first > 0, LATENTS=grad_latents is not None,
            KL=grad_kl is not None and first == 0, HARD=hard, NOISE=noise, **settings,
        )  # fmt: skip
    if not needs.codebook:
        return dlogits, None
    return dlogits, torch.zeros_like(codebook) if partial is None else sum_parts(partial, codebook.dtype)
