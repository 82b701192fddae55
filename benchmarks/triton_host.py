"""Microseconds of host time that a call of a Triton backend costs, measured without a GPU.

    python -m benchmarks.triton_host

Kernels are compiled once and then never launched: what is timed is this library's Python (output allocation, cached
plans) and Triton's (argument binding, specialization, kernel lookup), but not the driver's launch itself.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.aot import recording
from dalle_kernels.attention import triton_backend
from dalle_kernels.attention.layout import TokenLayout
from dalle_kernels.attention.patterns import Row
from dalle_kernels.codebook import triton_kernels
from dalle_kernels.decode import triton_kernel
from dalle_kernels.decode.cache import KVCache
from dalle_kernels.sampling import triton_kernel as sampling

PATTERN = Row(TokenLayout(256, (32, 32)))


def microseconds(call: Callable[[], object], calls: int = 200, repeats: int = 9) -> float:
    """Median over `repeats` of the mean time of `calls` calls, after a warm-up."""
    for _ in range(20):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)


def main() -> int:
    q, k, v = (torch.empty(1, 2, PATTERN.length, 64, dtype=torch.bfloat16) for _ in range(3))
    token = torch.empty(1, 2, 1, 64, dtype=torch.bfloat16)
    cache = KVCache(PATTERN, 1, 2, 64, dtype=torch.bfloat16)
    position = torch.zeros((), dtype=torch.int64)
    logits, codebook = torch.empty(64, 512, dtype=torch.bfloat16), torch.empty(512, 128, dtype=torch.bfloat16)
    seed = torch.zeros((), dtype=torch.int64)
    settings = logits, codebook, torch.ones(()), False, True, seed
    with recording(90):
        out, lse = triton_backend.forward(q, k, v, None, 0.125, PATTERN)
        outputs = triton_kernels.gumbel_forward(*settings)
        grads = outputs[0], outputs[2]
        calls: dict[str, Callable[[], object]] = {
            "forward (1 kernel)": lambda: triton_backend.forward(q, k, v, None, 0.125, PATTERN),
            "backward (4 kernels)": lambda: triton_backend.backward(out, None, q, k, v, out, lse, None, 0.125, PATTERN),
            "decode (2 kernels)": lambda: triton_kernel.forward(
                token, token, token, cache.keys, cache.values, position, 0.125, PATTERN
            ),
            "Gumbel lookup (1 kernel)": lambda: triton_kernels.gumbel_forward(*settings),
            "its backward (3 kernels)": lambda: triton_kernels.gumbel_backward(*grads, *settings, *outputs),
            "sampling (1 kernel)": lambda: sampling.sample(logits, None, 1.0, 1.0, 0, 1.0, seed),
        }
        for name, call in calls.items():
            print(f"{name}: {microseconds(call):.1f} us of host time, the launch itself left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
