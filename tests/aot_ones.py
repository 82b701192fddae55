"""Compiles every Triton kernel for a GPU with every number 1, and `sum_parts` for several numbers of parts.

Triton makes an int argument that is 1 a constant, which is not a tensor and lacks its methods; the interpreter does
not. Prints the names of the kernels as JSON, one list per call. To be run where no interpreter is set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import torch

from benchmarks.kernels import aot
from dalle_kernels import MaskPattern
from dalle_kernels.attention import contract as attention_contract
from dalle_kernels.attention import triton as attention
from dalle_kernels.codebook import triton_tiles
from dalle_kernels.codebook.gumbel import contract as gumbel_contract
from dalle_kernels.codebook.gumbel import triton as triton_gumbel
from dalle_kernels.codebook.projection import contract as projection_contract
from dalle_kernels.codebook.projection import triton as triton_projection
from dalle_kernels.codebook.vq import contract as vq_contract
from dalle_kernels.codebook.vq import triton as triton_vq
from dalle_kernels.decode import triton as decoding
from dalle_kernels.decode.contract import Inputs as DecodeInputs
from dalle_kernels.likelihood import contract as likelihood_contract
from dalle_kernels.likelihood import triton as likelihood
from dalle_kernels.sampling import contract as sampling_contract
from dalle_kernels.sampling import triton as sampling


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    row, matrix, heads = torch.empty(1), torch.empty(1, 1), torch.empty(1, 1, 1, 1)
    settings = torch.ones(()), False, True, 1, 0
    codes = torch.zeros(1, dtype=torch.int64)
    made = matrix, codes, row, row, row, row, torch.empty(0)
    saved = *settings, *made
    pattern = MaskPattern(torch.ones(1, 1, dtype=torch.bool))
    longer = MaskPattern(torch.ones(256, 256, dtype=torch.bool).tril())

    lse = torch.empty(1, 1, 1)
    yield "attention", lambda: attention.forward(attention_contract.Inputs(heads, heads, heads, None, 1.0, pattern))
    saved_heads = heads, heads, heads, heads, lse
    yield (
        "attention_backward",
        lambda: attention.backward(
            attention_contract.Grads(heads, None),
            attention_contract.Kept(*saved_heads, None, 1.0, pattern),
            attention_contract.Needs(True, True, True),
        ),
    )
    step = DecodeInputs(*(heads,) * 5, torch.tensor(0), pattern, 1.0)
    yield "decode", lambda: decoding.forward(step).out
    yield "decode_splits", lambda: decoding.forward(step._replace(pattern=longer)).out
    yield "gumbel", lambda: triton_gumbel.forward(gumbel_contract.Inputs(matrix, matrix, *settings))
    yield (
        "gumbel_backward",
        lambda: triton_gumbel.backward(
            gumbel_contract.Grads(matrix, row),
            gumbel_contract.Kept(matrix, matrix, *saved),
            gumbel_contract.Needs(True, True),
        ),
    )
    layer = matrix, matrix, row, matrix
    yield "projection", lambda: triton_projection.forward(projection_contract.Inputs(*layer, *settings, True, False))
    yield (
        "projection_backward",
        lambda: triton_projection.backward(
            projection_contract.Grads(matrix, row, row),
            projection_contract.Kept(*layer, *settings, True, False, *made, row),
            projection_contract.Needs(True, True, True, True),
        ),
    )
    table = matrix[None]
    yield "vq", lambda: triton_vq.forward(vq_contract.Inputs(table, table, 1, "euclidean", 1, None, None, None)).nearest
    drawn = vq_contract.Inputs(table, table, 1, "cosine", 1, 1.0, 1, 0)
    yield "vq_drawn", lambda: triton_vq.forward(drawn).nearest
    kept = vq_contract.Kept(table, table[:, :, None], codes[None, :, None], 1)
    yield (
        "vq_backward",
        lambda: triton_vq.backward(vq_contract.Grads(row[None, :, None]), kept, vq_contract.Needs(True, True)),
    )
    yield "statistics", lambda: triton_vq.sum_rows(matrix, codes, 1)
    yield (
        "sampling",
        lambda: sampling.forward(sampling_contract.Inputs(matrix, matrix, 1, 1, 1, 0.5, 1, 0)).tokens,
    )
    yield (
        "likelihood",
        lambda: (
            likelihood.forward(likelihood_contract.Inputs(row, row, row)).nll,
            likelihood.backward(
                likelihood_contract.Grads(row),
                likelihood_contract.Kept(row, row, row),
                likelihood_contract.Needs(True, True),
            ),
        ),
    )
    # Not one variant for every number of parts, which follows from the number of rows.
    many = [torch.empty(number, 4, 16) for number in (1, 2, 3, 16, 17)]
    yield "sum_parts", lambda: [triton_tiles.sum_parts(parts, torch.bfloat16) for parts in many]


def main() -> None:
    compiled = {}
    for name, call in calls():
        with aot.recording(aot.ARCHITECTURES[0]) as kernels:
            call()
        compiled[name] = list(kernels)
    print(json.dumps(compiled))


if __name__ == "__main__":
    main()
