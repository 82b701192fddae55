"""What `tune` tries for the codebook's kernels: 8192 rows and codes (three codes fewer for tails)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.kernels.aot import DTYPES
from benchmarks.kernels.tune import Task, product
from dalle_kernels.backends import launch
from dalle_kernels.codebook.gumbel import contract as gumbel_contract
from dalle_kernels.codebook.gumbel import triton as triton_gumbel
from dalle_kernels.codebook.projection import contract as projection_contract
from dalle_kernels.codebook.projection import triton as triton_projection
from dalle_kernels.codebook.vq import contract as vq_contract
from dalle_kernels.codebook.vq import triton as triton_vq

ROWS, CODES, CHANNELS = 8192, 8192, 256
TILES = {"BLOCK_N": (32, 64, 128), "BLOCK_Q": (8, 16, 32), "num_warps": (4, 8, 16), "num_stages": (1, 2, 3)}
CANDIDATES = {
    "gumbel_forward": product(**TILES),
    "gumbel_backward": product(**TILES, programs=(132, 264, 528)),
    "projection_forward": product(**TILES, BLOCK_C=(32, 64)),
    "projection_backward": product(**TILES, BLOCK_C=(32, 64)),
    "vq_forward": product(
        BLOCK_N=(64, 128), BLOCK_K=(32, 64, 128), BLOCK_C=(32, 256), num_warps=(4, 8), num_stages=(1, 2, 3)
    ),
    "vq_best": product(**TILES, BLOCK_C=(32, 256)),
}


def tasks() -> Iterator[Task]:
    for row in {(row["kernel"], row["bits"], row["width"]): row for row in launch.rows()}.values():
        kernel, bits, width = row["kernel"], row["bits"], row["width"]
        name = kernel.removesuffix("_tails")
        if name in CANDIDATES:
            tails = name != kernel
            yield Task(
                kernel, bits, width, CANDIDATES[name],
                lambda name=name, bits=bits, width=width, tails=tails: prepare(name, bits, width, tails),
            )  # fmt: skip


def prepare(kernel: str, bits: int, width: int, tails: bool) -> Callable[[], object]:
    """The call to time, on inputs of its own."""
    codes, width = (CODES - 3, width - 5) if tails else (CODES, width)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=DTYPES[bits])

    codebook = randn(codes, width)
    if kernel.startswith("vq"):
        features = randn(ROWS, width)
        noise: tuple[Any, ...] = (None, None, None)
        if kernel == "vq_best":  # of one drawn row: what several rows cost depends on the codebook
            noise = 1.0, 1, 0
        inputs = vq_contract.Inputs(features[None], codebook[None], len(codebook), "euclidean", 1, *noise)
        return lambda: triton_vq.forward(inputs)
    settings: tuple[Any, ...] = torch.ones((), device="cuda"), False, True, 1, 0
    grads: tuple[torch.Tensor | None, ...] = randn(ROWS, width), torch.ones(ROWS, device="cuda")
    if kernel.startswith("gumbel"):
        tensors = randn(ROWS, codes), codebook
        contract, room = gumbel_contract, triton_gumbel
    else:
        tensors = randn(ROWS, CHANNELS), randn(codes, CHANNELS) / CHANNELS**0.5, randn(codes), codebook
        contract, room = projection_contract, triton_projection
        settings, grads = (*settings, False, False), (*grads, None)  # without the mean distribution
    if kernel.endswith("forward"):
        return lambda: room.forward(contract.Inputs(*tensors, *settings))
    outputs = room.forward(contract.Inputs(*tensors, *settings))
    kept = contract.Kept(*tensors, *settings, *outputs)
    needs = contract.Needs._make([True] * len(contract.Needs._fields))
    return lambda: room.backward(contract.Grads(*grads), kept, needs)
