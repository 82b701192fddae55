"""The codebook kernels' cases for `aot`: one per row of the launch table, and the other kinds of call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import torch

from benchmarks.kernels.aot import DTYPES, Case
from dalle_kernels.backends import launch
from dalle_kernels.codebook import triton_tiles
from dalle_kernels.codebook.gumbel import contract as gumbel_contract
from dalle_kernels.codebook.gumbel import triton as triton_gumbel
from dalle_kernels.codebook.projection import contract as projection_contract
from dalle_kernels.codebook.projection import triton as triton_projection
from dalle_kernels.codebook.statistics import contract as statistics_contract
from dalle_kernels.codebook.statistics import triton as triton_statistics
from dalle_kernels.codebook.vq import contract as vq_contract
from dalle_kernels.codebook.vq import triton as triton_vq

ROWS, CODES, CHANNELS = 512, 8192, 256


def cases(arch: int) -> Iterator[Case]:
    for tails, codes, less in (("", CODES, 0), ("_tails", CODES - 3, 5)):
        for bits, width in launch.served(f"gumbel_forward{tails}"):
            yield f"gumbel{tails}/{bits}-bit/{width}", gumbel_forward(bits, width - less, codes)
        for bits, width in launch.served(f"gumbel_backward{tails}"):
            yield f"gumbel{tails}/{bits}-bit/{width}/backward", gumbel_backward(bits, width - less, codes)
        for bits, width in launch.served(f"projection_forward{tails}"):
            name = f"projection{tails}/{bits}-bit/{width}"
            yield name, projection_forward(bits, width - less, codes)
            yield f"{name}/mean", projection_mean(bits, width - less, codes)
        for bits, width in launch.served(f"projection_backward{tails}"):
            name = f"projection{tails}/{bits}-bit/{width}/backward"
            yield name, projection_backward(bits, width - less, codes)
            yield f"{name}/mean", projection_backward(bits, width - less, codes, mean=True)
    yield "gumbel/16-bit/128/hard", gumbel_forward(16, 128, CODES, hard=True)
    yield "gumbel/16-bit/128/hard/backward", gumbel_backward(16, 128, CODES, hard=True)
    yield "gumbel/16-bit/256/backward", gumbel_backward(16, 256, CODES)  # in two pieces
    for frozen, needs in (("codebook", (True, False)), ("logits", (False, True))):
        yield f"gumbel/16-bit/128/frozen {frozen}/backward", gumbel_backward(16, 128, CODES, needs=needs)
    yield "projection/16-bit/128/backward/strips", projection_backward(16, 128, CODES, strip_bytes=1)
    for bits, width in launch.served("vq_forward"):
        yield f"vq/{bits}-bit/{width}", vq(bits, width)
    for metric in ("dot", "cosine"):
        yield f"vq/16-bit/128/{metric}", vq(16, 128, metric)
    for bits, width in launch.served("vq_best"):
        yield f"vq-best/{bits}-bit/{width}", vq(bits, width, "distance", k=8, drawn=True)
    yield "statistics/16-bit/128", statistics(16, 128)


def settings(hard: bool) -> tuple[torch.Tensor, bool, bool, int, int]:
    return torch.ones(()), hard, True, 1, 0


def results(latents: torch.Tensor, hard: bool) -> list[torch.Tensor]:
    """What a forward pass leaves besides the latents."""
    of_rows = torch.empty(ROWS)
    mixture = torch.empty(latents.shape if hard else (0,))
    return [torch.zeros(ROWS, dtype=torch.int64), of_rows, of_rows, of_rows, of_rows, mixture]


def gumbel_forward(bits: int, width: int, codes: int, hard: bool = False) -> Callable[[], object]:
    logits, codebook = torch.empty(ROWS, codes, dtype=DTYPES[bits]), torch.empty(codes, width, dtype=DTYPES[bits])
    return lambda: triton_gumbel.forward(gumbel_contract.Inputs(logits, codebook, *settings(hard)))


def gumbel_backward(
    bits: int, width: int, codes: int, hard: bool = False, needs: tuple[bool, bool] = (True, True)
) -> Callable[[], object]:
    logits, codebook = torch.empty(ROWS, codes, dtype=DTYPES[bits]), torch.empty(codes, width, dtype=DTYPES[bits])
    latents = torch.empty(ROWS, width, dtype=DTYPES[bits])
    saved = *settings(hard), latents, *results(latents, hard)
    return lambda: triton_gumbel.backward(
        gumbel_contract.Grads(latents, torch.empty(ROWS)),
        gumbel_contract.Kept(logits, codebook, *saved),
        gumbel_contract.Needs(*needs),
    )


def layer(bits: int, width: int, codes: int) -> list[torch.Tensor]:
    """Features, weight, bias and codebook."""
    shapes = (ROWS, CHANNELS), (codes, CHANNELS), (codes,), (codes, width)
    return [torch.zeros(shape, dtype=DTYPES[bits]) for shape in shapes]


def projection_forward(bits: int, width: int, codes: int) -> Callable[[], object]:
    inputs = *layer(bits, width, codes), *settings(False), False, False
    return lambda: triton_projection.forward(projection_contract.Inputs(*inputs))


def projection_mean(bits: int, width: int, codes: int) -> Callable[[], object]:
    features, weight, bias, _ = layer(bits, width, codes)
    of_rows = torch.empty(ROWS)

    def call() -> None:
        device, dtype = features.device, features.dtype
        constants = triton_tiles.constants("projection_forward", device, dtype, codes, width)
        triton_projection.mean_distribution(features, weight, bias, of_rows, of_rows, constants)

    return call


def projection_backward(
    bits: int, width: int, codes: int, strip_bytes: int | None = None, mean: bool = False
) -> Callable[[], object]:
    def call() -> None:
        latents, distribution = torch.empty(ROWS, width, dtype=DTYPES[bits]), torch.empty(codes if mean else 0)
        saved = *settings(False), mean, False, latents, *results(latents, False), distribution
        limit = triton_projection.STRIP_BYTES if strip_bytes is None else strip_bytes
        with mock.patch.object(triton_projection, "STRIP_BYTES", limit):
            triton_projection.backward(
                projection_contract.Grads(latents, torch.empty(ROWS), distribution if mean else None),
                projection_contract.Kept(*layer(bits, width, codes), *saved),
                projection_contract.Needs(True, True, True, True),
            )

    return call


def vq(bits: int, width: int, metric: str = "euclidean", k: int = 1, drawn: bool = False) -> Callable[[], object]:
    def call() -> None:
        features, codebook = (torch.empty(1, rows, width, dtype=DTYPES[bits]) for rows in (ROWS, CODES))
        noise = (1.0, 1, 0) if drawn else (None, None, None)
        triton_vq.forward(vq_contract.Inputs(features, codebook, CODES, metric, k, *noise))
        nearest, indices = features[:, :, None].expand(-1, -1, k, -1), torch.zeros(1, ROWS, k, dtype=torch.int64)
        triton_vq.backward(
            vq_contract.Grads(torch.empty(1, ROWS, k)),
            vq_contract.Kept(features, nearest, indices, CODES),
            vq_contract.Needs(True, True),
        )

    return call


def statistics(bits: int, width: int) -> Callable[[], object]:
    features = torch.empty(1, ROWS, width, dtype=DTYPES[bits])
    indices = torch.zeros(1, ROWS, dtype=torch.int64)
    return lambda: triton_statistics.forward(statistics_contract.Inputs(features, indices, CODES))
