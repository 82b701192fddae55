"""What `tune` tries for the attention and decoding kernels: 1280 tokens in 496 heads, one decoding step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.kernels.tune import Task, product
from dalle_kernels.attention import triton as triton_backend
from dalle_kernels.attention.contract import Grads, Inputs, Kept, Needs
from dalle_kernels.backends import launch
from dalle_kernels.decode import triton as triton_kernel
from dalle_kernels.decode.cache import KVCache
from dalle_kernels.patterns.layout import TokenLayout
from dalle_kernels.patterns.patterns import Row

PATTERN = Row(TokenLayout(256, (32, 32)))
DTYPES = {16: torch.bfloat16, 32: torch.float32}
TILED = product(
    query_tile=(32, 64, 128), key_tile=(32, 64, 128), heads_at_once=(8, 32), num_warps=(2, 4, 8), num_stages=(1, 2, 3)
)
BY_QUERY = [{**settings, "full_tiles_at_once": tiles} for settings in TILED for tiles in (1, 2)]


def tasks() -> Iterator[Task]:
    for row in {(row["kernel"], row["bits"], row["width"]): row for row in launch.rows()}.values():
        kernel, bits, width = row["kernel"], row["bits"], row["width"]
        if kernel == "attention_forward":
            yield Task(kernel, bits, width, BY_QUERY, lambda bits=bits, width=width: _forward(bits, width))
        elif kernel in ("attention_backward_keys", "attention_backward_queries"):
            candidates = TILED if kernel == "attention_backward_keys" else BY_QUERY
            yield Task(kernel, bits, width, candidates, lambda bits=bits, width=width: _backward(bits, width))
        elif kernel == "decode_forward":
            candidates = product(KEYS=(16, 32, 64, 128), programs=(1, 132, 264, 528), num_warps=(1, 2, 4, 8))
            yield Task(kernel, bits, width, candidates, lambda bits=bits, width=width: _decode(bits, width))


def _inputs(bits: int, width: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(8, 62, PATTERN.length, width, device="cuda", dtype=DTYPES[bits]) for _ in range(3))


def _forward(bits: int, width: int) -> Callable[[], object]:
    q, k, v = _inputs(bits, width)
    return lambda: triton_backend.forward(Inputs(q, k, v, None, width**-0.5, PATTERN))


def _backward(bits: int, width: int) -> Callable[[], object]:
    q, k, v = _inputs(bits, width)
    out, lse = triton_backend.forward(Inputs(q, k, v, None, width**-0.5, PATTERN))
    grad = torch.randn_like(out)
    return lambda: triton_backend.backward(
        Grads(grad, None), Kept(q, k, v, out, lse, None, width**-0.5, PATTERN), Needs(True, True, True)
    )


def _decode(bits: int, width: int) -> Callable[[], object]:
    dtype = DTYPES[16 if bits == 8 else bits]
    q, k, v = (torch.randn(1, 62, 1, width, device="cuda", dtype=dtype) for _ in range(3))
    cache = KVCache(PATTERN, 1, 62, width, dtype=torch.int8 if bits == 8 else dtype, device="cuda")
    # Zeros would hide what a wrong kernel makes of earlier tokens.
    cache.prefill(*(torch.randn(1, 62, PATTERN.length - 1, width, device="cuda", dtype=dtype) for _ in range(2)))
    position = torch.full((), PATTERN.length - 1, dtype=torch.int64, device="cuda")
    return lambda: triton_kernel.forward(cache.inputs(q, k, v, position)).out
