"""One token a row in one Triton kernel: guidance, temperature, top-k, top-p and Gumbel-argmax.

A program owns a row and takes it as four tiles, one for each quarter of the vocabulary, which one Philox counter
serves. Where there is a filter it first holds the whole row in registers and finds the thresholds, without sorting, by
fixing one bit after another of an unsigned key that orders as floats do:

    top-k   the largest t that at least k logits reach:                       keep those that reach it
    top-p   the largest t with at least top_p of the probability above it:    keep those above it

Logits are compared with the float that has the key's place, so that no registers hold their keys. Equal logits stay or
go together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dalle_kernels.backends.contract import Call
from dalle_kernels.backends.triton_common import ceil_div, obstacle
from dalle_kernels.backends.triton_noise import INTERPRETED, LN_2, LOG2_E, gumbel2, philox
from dalle_kernels.noise import SAMPLING_STREAM, packed
from dalle_kernels.sampling.contract import Inputs, Outputs

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
        # NaN, of tokens that are ruled out, becomes -inf. On a GPU a maximum drops NaN, in one instruction; so does the
        # interpreter, but only from Triton 3.8 on.
        x = tl.where(x == x, x, float("-inf")) if INTERPRETED else tl.maximum(x, float("-inf"))
    if not GREEDY:
        x = tl.div_rn(x, temperature + tl.zeros_like(x))
    return tl.where(valid, x, float("-inf"))


@triton.jit
def number_of(key):
    """The float that has the place of the scalar `key` among keys: floats in their order have ascending uint32 keys.

    Keys below that of -inf stand for it; those above that of inf give NaN, which no number reaches or exceeds. (The
    interpreter of Triton 3.6 to 3.8 fills ~key's ones with -1, which NumPy 2 refuses for uint32.)
    """
    key = tl.maximum(key, 0x007FFFFF)
    return tl.where(key >= 0x80000000, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF).to(tl.float32, bitcast=True)


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
def count_from(x, threshold):
    return (x >= threshold).to(tl.int32)


@triton.jit
def mass_above(x, threshold, largest):
    return tl.where(x > threshold, tl.exp2((x - largest) * LOG2_E), 0.0)


@triton.jit
def find_thresholds(
    logits, unconditional, top_k, top_p, V, quarter, guidance, temperature,
    GUIDED: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the tokens that stay reach, and what they exceed."""
    reach = float("-inf")
    exceed = float("-inf")
    column = tl.arange(0, BLOCK)[None, :]
    x_0 = load_quarter(logits, unconditional, column, 0, V, quarter, guidance, temperature, GUIDED, False)
    x_1 = load_quarter(logits, unconditional, column, 1, V, quarter, guidance, temperature, GUIDED, False)
    x_2 = load_quarter(logits, unconditional, column, 2, V, quarter, guidance, temperature, GUIDED, False)
    x_3 = load_quarter(logits, unconditional, column, 3, V, quarter, guidance, temperature, GUIDED, False)
    if TOP_K:
        key = tl.zeros([], tl.uint32)
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(32):
            trial = number_of(key | bit)
            reached = total4(
                count_from(x_0, trial), count_from(x_1, trial), count_from(x_2, trial), count_from(x_3, trial)
            )
            key = tl.where(reached >= top_k, key | bit, key)
            bit = bit >> 1
        reach = number_of(key)
        x_0 = tl.where(x_0 >= reach, x_0, float("-inf"))
        x_1 = tl.where(x_1 >= reach, x_1, float("-inf"))
        x_2 = tl.where(x_2 >= reach, x_2, float("-inf"))
        x_3 = tl.where(x_3 >= reach, x_3, float("-inf"))
    if TOP_P:
        largest = largest4(x_0, x_1, x_2, x_3)
        wanted = top_p * total4(
            mass_above(x_0, exceed, largest), mass_above(x_1, exceed, largest),
            mass_above(x_2, exceed, largest), mass_above(x_3, exceed, largest),
        )  # fmt: skip
        key = tl.zeros([], tl.uint32)
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(32):
            trial = number_of(key | bit)
            # The bit is never 0, which a compiler cannot know: in a long row it finds the weights anew for every bit,
            # since kept beside the logits they would fill the registers.
            again = largest + tl.where(bit == 0, 1.0, 0.0) if BLOCK > 4096 else largest
            above = total4(
                mass_above(x_0, trial, again), mass_above(x_1, trial, again),
                mass_above(x_2, trial, again), mass_above(x_3, trial, again),
            )  # fmt: skip
            key = tl.where(above >= wanted, key | bit, key)
            bit = bit >> 1
        exceed = number_of(key)
    return reach, exceed


@triton.jit
def sample_kernel(
    logits, unconditional, tokens, seed, guidance, temperature, top_k, top_p, V, quarter, stride, unconditional_stride,
    GUIDED: tl.constexpr, GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    if GUIDED:
        unconditional += row * unconditional_stride
    if TOP_K or TOP_P:
        reach, exceed = find_thresholds(
            logits, unconditional, top_k, top_p, V, quarter, guidance, temperature, GUIDED, TOP_K, TOP_P, BLOCK
        )

    best = float("-inf")
    token = V - 1
    for first in range(0, quarter, CHUNK):
        column = first + tl.arange(0, CHUNK)[None, :]
        x_0 = load_quarter(logits, unconditional, column, 0, V, quarter, guidance, temperature, GUIDED, GREEDY)
        x_1 = load_quarter(logits, unconditional, column, 1, V, quarter, guidance, temperature, GUIDED, GREEDY)
        x_2 = load_quarter(logits, unconditional, column, 2, V, quarter, guidance, temperature, GUIDED, GREEDY)
        x_3 = load_quarter(logits, unconditional, column, 3, V, quarter, guidance, temperature, GUIDED, GREEDY)
        if TOP_K or TOP_P:
            x_0 = tl.where((x_0 >= reach) & (x_0 > exceed), x_0, float("-inf"))
            x_1 = tl.where((x_1 >= reach) & (x_1 > exceed), x_1, float("-inf"))
            x_2 = tl.where((x_2 >= reach) & (x_2 > exceed), x_2, float("-inf"))
            x_3 = tl.where((x_3 >= reach) & (x_3 > exceed), x_3, float("-inf"))
        if not GREEDY:
            rows = row + tl.load(seed + 1) + tl.zeros([1, 1], tl.int64)
            word_0, word_1, word_2, word_3 = philox(column.to(tl.uint32), rows, tl.load(seed), STREAM)
            x_0 += gumbel2(word_0) * LN_2
            x_1 += gumbel2(word_1) * LN_2
            x_2 += gumbel2(word_2) * LN_2
            x_3 += gumbel2(word_3) * LN_2
        largest = largest4(x_0, x_1, x_2, x_3)
        candidate = first4(x_0, x_1, x_2, x_3, largest, column, V, quarter)
        # Among equals the first token wins, which can lie in a later chunk of an earlier quarter.
        token = tl.where((largest > best) | ((largest == best) & (candidate < token)), candidate, token)
        best = tl.maximum(best, largest)
    tl.store(tokens + row, token.to(tl.int64))


def refuse(call: Call) -> str | None:
    if call.width > LARGEST:
        return f"there are {call.width} tokens, the kernel holds rows of at most {LARGEST}"
    return obstacle(call.device, call.dtype)


def forward(inputs: Inputs) -> Outputs:
    logits, unconditional, guidance_scale, temperature, top_k, top_p, seed, row_offset = inputs
    rows, tokens = logits.shape
    out = logits.new_empty(rows, dtype=torch.int64)
    if rows:
        quarter = ceil_div(tokens, 4)
        block = max(128, triton.next_power_of_2(quarter))
        greedy, key = temperature == 0, packed(seed, row_offset, logits.device)
        sample_kernel[(rows,)](
            logits, unconditional, out, key, guidance_scale, temperature, top_k, top_p,
            tokens, quarter, logits.stride(0), 0 if unconditional is None else unconditional.stride(0),
            GUIDED=unconditional is not None, GREEDY=greedy,
            TOP_K=0 < top_k < tokens and not greedy, TOP_P=top_p < 1 and not greedy,
            # Guided logits are rounded as the definition rounds them, so both keep the same tokens.
            BLOCK=block, CHUNK=min(block, 1024), num_warps=max(4, min(16, block // 256)), enable_fp_fusion=False,
        )  # fmt: skip
    return Outputs(out)
