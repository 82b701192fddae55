"""Microseconds of host time that a Triton attention call costs, measured without a GPU.

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
from dalle_kernels.decode import triton_kernel
from dalle_kernels.decode.cache import KVCache

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
    with recording(90):
        out, lse = triton_backend.forward(q, k, v, None, 0.125, PATTERN)
        calls: dict[str, Callable[[], object]] = {
            "forward (1 kernel)": lambda: triton_backend.forward(q, k, v, None, 0.125, PATTERN),
            "backward (4 kernels)": lambda: triton_backend.backward(out, None, q, k, v, out, lse, None, 0.125, PATTERN),
            "decode (2 kernels)": lambda: triton_kernel.forward(
                token, token, token, cache.keys, cache.values, position, 0.125, PATTERN
            ),
        }
        for name, call in calls.items():
            print(f"{name}: {microseconds(call):.1f} us of host time, the launch itself left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
