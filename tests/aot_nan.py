"""Prints, as JSON, what PTX Triton makes of a maximum and of a comparison with NaN: {"sm_80": {"maximum": [...], ...}}.

A process of its own, because where the interpreter is chosen nothing is compiled.
"""

from __future__ import annotations

import json
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.kernels.aot import ARCHITECTURES


@triton.jit
def maximum(x, y):
    place = tl.arange(0, 128)
    tl.store(y + place, tl.maximum(tl.load(x + place), tl.load(y + place)))


@triton.jit
def maximum_all(x, y):
    place = tl.arange(0, 128)
    tl.store(y + place, tl.maximum(tl.load(x + place), tl.load(y + place), propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def largest(x, y):
    tl.store(y, tl.max(tl.load(x + tl.arange(0, 128))))


@triton.jit
def without_nan(x, y):
    place = tl.arange(0, 128)
    value = tl.load(x + place)
    tl.store(y + place, tl.where(value == value, value, float("-inf")))


def instructions(kernel, architecture: int) -> list[str]:
    """The PTX instructions of `kernel` that find a maximum or compare floats, each once."""
    source = ASTSource(kernel, {"x": "*fp32", "y": "*fp32"}, {})
    ptx = triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["ptx"]
    return sorted(set(re.findall(r"\b(?:max|setp\.\w+)(?:\.\w+)*\.f32\b", ptx)))


def main() -> None:
    kernels = {"maximum": maximum, "maximum_all": maximum_all, "largest": largest, "without_nan": without_nan}
    print(
        json.dumps(
            {
                f"sm_{architecture}": {name: instructions(kernel, architecture) for name, kernel in kernels.items()}
                for architecture in ARCHITECTURES
            }
        )
    )


if __name__ == "__main__":
    main()
