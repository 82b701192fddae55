"""Compiles every Triton kernel for a GPU with every number 1, and `sum_parts` for several numbers of parts.

Triton makes an int argument that is 1 a constant, which is not a tensor and lacks its methods; the interpreter does
not. Prints the names of the kernels as JSON, one list per call. To be run where no interpreter is set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import torch

from benchmarks import aot
from dalle_kernels import MaskPattern
from dalle_kernels.attention import triton as attention
from dalle_kernels.codebook.gumbel import triton as triton_gumbel
from dalle_kernels.codebook.projection import triton as triton_projection
from dalle_kernels.codebook.vq import triton as triton_vq
from dalle_kernels.decode import triton as decoding
from dalle_kernels.likelihood import triton as likelihood
from dalle_kernels.sampling import triton as sampling


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    row, matrix, heads = torch.empty(1), torch.empty(1, 1), torch.empty(1, 1, 1, 1)
    settings = torch.ones(()), False, True, torch.tensor(1)
    codes = torch.zeros(1, dtype=torch.int64)
    saved = *settings, matrix, codes, row, row, row, torch.empty(0)
    pattern = MaskPattern(torch.ones(1, 1, dtype=torch.bool))
    longer = MaskPattern(torch.ones(256, 256, dtype=torch.bool).tril())

    lse = torch.empty(1, 1, 1)
    yield "attention", lambda: attention.forward(heads, heads, heads, None, 1.0, pattern)
    saved_heads = heads, heads, heads, heads, lse
    yield "attention_backward", lambda: attention.backward(heads, None, *saved_heads, None, 1.0, pattern)
    yield "decode", lambda: decoding.forward(heads, heads, heads, heads, heads, torch.tensor(0), 1.0, pattern)
    yield "decode_splits", lambda: decoding.forward(heads, heads, heads, heads, heads, torch.tensor(0), 1.0, longer)
    yield "gumbel", lambda: triton_gumbel.gumbel_forward(matrix, matrix, *settings)
    yield "gumbel_backward", lambda: triton_gumbel.gumbel_backward(matrix, row, matrix, matrix, *saved)
    layer = matrix, matrix, row, matrix
    yield "projection", lambda: triton_projection.projection_forward(*layer, *settings)
    yield "projection_backward", lambda: triton_projection.projection_backward(matrix, row, *layer, *saved)
    yield "vq", lambda: triton_vq.vq_forward(matrix, matrix)
    yield "vq_backward", lambda: triton_vq.vq_backward(row, matrix, matrix, codes)
    yield "sampling", lambda: sampling.sample(matrix, matrix, 1, 1, 1, 0.5, torch.tensor(1))
    yield "likelihood", lambda: (likelihood.forward(row, row, row), likelihood.backward(row, row, row, row))
    # Not one variant for every number of parts, which follows from the number of rows.
    many = [torch.empty(number, 4, 16) for number in (1, 2, 3, 16, 17)]
    yield "sum_parts", lambda: [triton_gumbel.sum_parts(parts, torch.bfloat16) for parts in many]


def main() -> None:
    compiled = {}
    for name, call in calls():
        with aot.recording(aot.ARCHITECTURES[0]) as kernels:
            call()
        compiled[name] = list(kernels)
    print(json.dumps(compiled))


if __name__ == "__main__":
    main()
