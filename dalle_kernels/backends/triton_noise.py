"""The library's Gumbel noise as device functions for Triton kernels.

The definition is `dalle_kernels.noise`'s: Philox4x32-10, keyed by the 64-bit seed, with counter (k mod Kq, row low, row
high, stream), whose word l serves code k = l Kq + (k mod Kq); u = ((word >> 9) + 0.5) 2^-23 and g = -log(-log u).

Kernels keep scores in units of log2, where softmax costs one exp2 per element and no multiplications:

    score2 = (logit + g) log2(e) + CONSTANT,   g log2(e) + CONSTANT = -log2(-log2 u),   CONSTANT = log2(log 2)

so `gumbel2(word)` returns -log2(-log2 u), two logarithms and no scaling. A softmax and an argmax do not see the
constant.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

# The interpreter has no libdevice, and computes tl.log2 as numpy does. On a GPU tl.log2 costs some thirty instructions.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def fast_log2(x):
    """log2 in one instruction: absolute error 2^-22 for 0.5 < x < 2, relative error 2^-22 elsewhere."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def _multiply_wide(x, factor: tl.constexpr):
    """High and low words of the 64-bit product of two 32-bit words, from one instruction."""
    product = x.to(tl.uint64) * factor
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(column, row, seed, stream):
    """The four words of counter (column, row low, row high, stream) under the key `seed`.

    column: uint32 [1, n]; row: int64 [m, 1]; seed: int64 scalar. Returns four uint32 [m, n].

    Nothing is broadcast before it must be: the first two rounds multiply single rows and columns, so ten rounds cost
    about eight.

    A compiler keeps this chain in the layout that its inputs have, and carries the noise through shared memory to the
    tile it is added to, unless they agree. Callers therefore add to `row` a zero that is computed from the tile, which
    gives the chain the tile's layout.
    """
    key_0 = seed.to(tl.uint32)
    key_1 = (seed >> 32).to(tl.uint32)
    word_0 = column
    word_1 = row.to(tl.uint32)
    word_2 = (row >> 32).to(tl.uint32)
    word_3 = tl.full([1, 1], stream, tl.uint32)
    for _ in tl.static_range(10):
        high_0, low_0 = _multiply_wide(word_0, 0xD2511F53)
        high_1, low_1 = _multiply_wide(word_2, 0xCD9E8D57)
        word_0 = high_1 ^ word_1 ^ key_0
        word_1 = low_1
        word_2 = high_0 ^ word_3 ^ key_1
        word_3 = low_0
        key_0 += 0x9E3779B9
        key_1 += 0xBB67AE85
    return word_0, word_1, word_2, word_3


@triton.jit
def gumbel2(word):
    """-log2(-log2 u) of a random word, u = ((word >> 9) + 0.5) 2^-23; finite always. Shape as `word`, float32.

    The largest noise, which decides the samples, comes from u near 1, where log2 u keeps no digits if it is right to an
    absolute error only. There a polynomial in v = 1 - u, which is exact, takes over: -log2(1 - v) = v P(v) with P the
    quartic of least relative error (1.4e-8) on (0, 1/8].
    """
    # The 23 bits become the fraction of a float in [1, 2); subtracting 1 - 2^-24 is exact.
    u = ((word >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.999999940395355224609375
    v = 1.0 - u
    polynomial = 0.3792401850223541 * v + 0.3501446545124054
    polynomial = polynomial * v + 0.4813823997974396
    polynomial = polynomial * v + 0.7213398218154907
    polynomial = polynomial * v + 1.4426950216293335
    negative_log2 = tl.where(v <= 0.125, polynomial * v, -fast_log2(u))
    return -fast_log2(negative_log2)
