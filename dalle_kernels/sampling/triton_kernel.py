"""One token a row in one Triton kernel: guidance, temperature, top-k, top-p and Gumbel-argmax.

A program holds a whole row in registers, as four tiles, one for each quarter of the vocabulary, which one Philox
counter serves. Both thresholds are found without sorting, by fixing one bit after another of an unsigned key that
orders as the logits do:

    top-k   the largest key t that at least k logits reach:                       keep key >= t
    top-p   the largest key t with at least top_p of the probability above it:    keep key > t

Equal logits have equal keys, so they stay or go together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dalle_kernels.backends import Call
from dalle_kernels.noise import SAMPLING_STREAM
from dalle_kernels.triton_common import obstacle
from dalle_kernels.triton_noise import LN_2, LOG2_E, gumbel2, philox

STREAM = tl.constexpr(SAMPLING_STREAM)
LARGEST = 32768  # a row in the registers of one block


@triton.jit
def load_quarter(
    logits, unconditional, column, quarter_index: tl.constexpr, V, quarter, guidance, temperature,
    GUIDED: tl.constexpr, GREEDY: tl.constexpr,
):  # fmt: skip
    """Guided logits over temperature of one quarter [1, BLOCK]; -inf past the end."""
    token = column + quarter_index * quarter
    valid = (column < quarter) & (token < V)
    x = tl.load(logits + token, mask=valid, other=0.0).to(tl.float32)
    if GUIDED:
        base = tl.load(unconditional + token, mask=valid, other=0.0).to(tl.float32)
        x = base + guidance * (x - base)
    if not GREEDY:
        x = tl.div_rn(x, temperature + tl.zeros_like(x))
    return tl.where(valid, x, float("-inf"))


@triton.jit
def ordered_key(x):
    """uint32 keys that order as floats do; both zeros have one key."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, ~bits, bits | 0x80000000)


@triton.jit
def total4(a, b, c, d):
    return tl.sum((a + b) + (c + d))


@triton.jit
def largest4(a, b, c, d):
    return tl.max(tl.maximum(tl.maximum(a, b), tl.maximum(c, d)))


@triton.jit
def first4(x_0, x_1, x_2, x_3, largest, column, V, quarter):
    """The first token whose score is `largest`."""
    token_0 = tl.where(x_0 == largest, column, V - 1)
    token_1 = tl.where(x_1 == largest, column + quarter, V - 1)
    token_2 = tl.where(x_2 == largest, column + 2 * quarter, V - 1)
    token_3 = tl.where(x_3 == largest, column + 3 * quarter, V - 1)
    return tl.min(tl.minimum(tl.minimum(token_0, token_1), tl.minimum(token_2, token_3)))


@triton.jit
def count_from(key, threshold):
    return (key >= threshold).to(tl.int32)


@triton.jit
def mass_above(x, key, threshold, shift):
    return tl.where(key > threshold, tl.exp2(x * LOG2_E - shift), 0.0)


@triton.jit
def sample_kernel(
    logits, unconditional, tokens, seed, guidance, temperature, top_k, top_p, V, quarter, stride, unconditional_stride,
    GUIDED: tl.constexpr, GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    if GUIDED:
        unconditional += row * unconditional_stride
    column = tl.arange(0, BLOCK)[None, :]
    x_0 = load_quarter(logits, unconditional, column, 0, V, quarter, guidance, temperature, GUIDED, GREEDY)
    x_1 = load_quarter(logits, unconditional, column, 1, V, quarter, guidance, temperature, GUIDED, GREEDY)
    x_2 = load_quarter(logits, unconditional, column, 2, V, quarter, guidance, temperature, GUIDED, GREEDY)
    x_3 = load_quarter(logits, unconditional, column, 3, V, quarter, guidance, temperature, GUIDED, GREEDY)
    if TOP_K:
        key_0, key_1, key_2, key_3 = ordered_key(x_0), ordered_key(x_1), ordered_key(x_2), ordered_key(x_3)
        threshold = tl.zeros([], tl.uint32)
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(32):
            trial = threshold | bit
            reached = total4(
                count_from(key_0, trial), count_from(key_1, trial), count_from(key_2, trial), count_from(key_3, trial)
            )
            threshold = tl.where(reached >= top_k, trial, threshold)
            bit = bit >> 1
        x_0 = tl.where(key_0 >= threshold, x_0, float("-inf"))
        x_1 = tl.where(key_1 >= threshold, x_1, float("-inf"))
        x_2 = tl.where(key_2 >= threshold, x_2, float("-inf"))
        x_3 = tl.where(key_3 >= threshold, x_3, float("-inf"))
    if TOP_P:
        key_0, key_1, key_2, key_3 = ordered_key(x_0), ordered_key(x_1), ordered_key(x_2), ordered_key(x_3)
        shift = largest4(x_0, x_1, x_2, x_3) * LOG2_E
        threshold = tl.zeros([], tl.uint32)
        wanted = top_p * total4(
            mass_above(x_0, key_0, threshold, shift), mass_above(x_1, key_1, threshold, shift),
            mass_above(x_2, key_2, threshold, shift), mass_above(x_3, key_3, threshold, shift),
        )  # fmt: skip
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(32):
            trial = threshold | bit
            above = total4(
                mass_above(x_0, key_0, trial, shift), mass_above(x_1, key_1, trial, shift),
                mass_above(x_2, key_2, trial, shift), mass_above(x_3, key_3, trial, shift),
            )  # fmt: skip
            threshold = tl.where(above >= wanted, trial, threshold)
            bit = bit >> 1
        x_0 = tl.where(key_0 > threshold, x_0, float("-inf"))
        x_1 = tl.where(key_1 > threshold, x_1, float("-inf"))
        x_2 = tl.where(key_2 > threshold, x_2, float("-inf"))
        x_3 = tl.where(key_3 > threshold, x_3, float("-inf"))
    if not GREEDY:
        rows = row + tl.zeros([1, 1], tl.int64)
        word_0, word_1, word_2, word_3 = philox(column.to(tl.uint32), rows, tl.load(seed), STREAM)
        x_0 += gumbel2(word_0) * LN_2
        x_1 += gumbel2(word_1) * LN_2
        x_2 += gumbel2(word_2) * LN_2
        x_3 += gumbel2(word_3) * LN_2
    token = first4(x_0, x_1, x_2, x_3, largest4(x_0, x_1, x_2, x_3), column, V, quarter)
    tl.store(tokens + row, token.to(tl.int64))


def refuse(call: Call) -> str | None:
    if call.width > LARGEST:
        return f"there are {call.width} tokens, the kernel holds rows of at most {LARGEST}"
    return obstacle(call.device, call.dtype)


def sample(
    logits: torch.Tensor,
    unconditional: torch.Tensor | None,
    guidance_scale: float,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: torch.Tensor,
) -> torch.Tensor:
    """int64 [B]. `top_k` 0 and `top_p` 1 are off; `temperature` 0 takes the largest logit."""
    rows, tokens = logits.shape
    out = logits.new_empty(rows, dtype=torch.int64)
    if rows:
        quarter = triton.cdiv(tokens, 4)
        block = max(128, triton.next_power_of_2(quarter))
        greedy = temperature == 0
        sample_kernel[(rows,)](
            logits, unconditional, out, seed, guidance_scale, temperature, top_k, top_p,
            tokens, quarter, logits.stride(0), 0 if unconditional is None else unconditional.stride(0),
            GUIDED=unconditional is not None, GREEDY=greedy,
            TOP_K=0 < top_k < tokens and not greedy, TOP_P=top_p < 1 and not greedy,
            BLOCK=block, num_warps=max(4, min(32, block // 256)),
        )  # fmt: skip
    return out
