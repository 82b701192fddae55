"""The attention kernels' cases for `aot`: one per row of the launch table, and the other kinds of call."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.kernels.aot import DTYPES, Case
from dalle_kernels.attention import triton as triton_backend
from dalle_kernels.attention.contract import Grads, Inputs, Kept, Needs
from dalle_kernels.backends import launch
from dalle_kernels.decode import triton as triton_kernel
from dalle_kernels.decode.cache import KVCache
from dalle_kernels.patterns.layout import TokenLayout
from dalle_kernels.patterns.patterns import Row

LAYOUT = TokenLayout(text_length=256, grid=(32, 32))
ALL = Needs(True, True, True)


def cases(arch: int) -> Iterator[Case]:
    for bits, width in launch.served("attention_forward", "attention_backward_keys", "attention_backward_queries"):
        yield f"attention/{bits}-bit/{width}", attention(bits, width)
        if (bits, width) != (16, 128):  # spills on sm_90: benchmarks/notes/triton.md
            yield f"attention/{bits}-bit/{width}/softcap", attention(bits, width, softcap=50.0)
    for bits in DTYPES:
        yield f"attention/{bits}-bit/64/part", attention(bits, 64, queries=LAYOUT.image_length // 2)
    yield "attention/16-bit/64/padded-prefix", attention(16, 64, length=LAYOUT.length - 1, padded=True)
    yield "attention/16-bit/64/far", attention(16, 64, far=True)
    yield "attention/16-bit/80", attention(16, 80)
    for frozen, needs in (("q, k", Needs(False, False, True)), ("q, v", Needs(False, True, False))):
        yield f"attention/16-bit/64/frozen {frozen}", attention(16, 64, needs=needs)
    for bits, width in launch.served("decode_forward"):
        yield f"decode/{bits}-bit/{width}", _decode(bits, width, heads=16)
        yield f"decode/{bits}-bit/{width}/softcap", _decode(bits, width, heads=16, softcap=50.0)
    yield "decode/16-bit/64/one-split", _decode(16, 64, heads=256)
    yield "decode/8-bit/64/everything", _decode(8, 64, heads=16, softcap=50.0, copies=2)


def _decode(bits: int, width: int, heads: int, softcap: float | None = None, copies: int = 1):
    """With copies: after a padded prompt that they share, each at a position of its own, two query heads a key head."""
    groups, dtype = min(copies, 2), DTYPES[16 if bits == 8 else bits]

    def call() -> None:
        q, k, v = (torch.empty(copies, count, 1, width, dtype=dtype) for count in (heads, *(heads // groups,) * 2))
        cache = KVCache(Row(LAYOUT), 1, heads // groups, width, torch.int8 if bits == 8 else dtype, copies=copies)
        position = torch.zeros((), dtype=torch.int64)
        if copies > 1:
            prompt = torch.empty(1, heads // groups, LAYOUT.text_length, width, dtype=dtype)
            cache.prefill(prompt, prompt, torch.zeros(1, LAYOUT.text_length, dtype=torch.bool))
            position = torch.zeros(copies, dtype=torch.int64)
        triton_kernel.forward(cache.inputs(q, k, v, position, softcap=softcap))

    return call


def attention(
    bits: int,
    width: int,
    length: int = LAYOUT.length,
    padded: bool = False,
    softcap: float | None = None,
    far: bool = False,
    needs: Needs = ALL,
    queries: int | None = None,
):
    """A call, forward and backward.

    `far`: rows whose offsets take 64 bits; `queries`: those of so many of the last tokens.
    """
    pattern = Row(LAYOUT)

    def call() -> None:
        q, k, v = (torch.empty(2, 16, length, width, dtype=DTYPES[bits]) for _ in range(3))
        if far:  # rows that overlap, of memory that nothing touches
            step = 2**31 // (length - 1) // 16 * 16 + 16
            q, k, v = (x.new_empty(length * step).as_strided(x.shape, (width, width, step, 1)) for x in (q, k, v))
        start = 0 if queries is None else length - queries
        q = q[:, :, start:]
        padding = torch.zeros(2, length, dtype=torch.bool) if padded else None
        settings = padding, width**-0.5, pattern, softcap, start
        out, lse = triton_backend.forward(Inputs(q, k, v, *settings))
        triton_backend.backward(Grads(out, lse if padded else None), Kept(q, k, v, out, lse, *settings), needs)

    return call
