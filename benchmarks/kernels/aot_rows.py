"""Cases for `aot` of the kernels that the launch table does not hold: sampling and the likelihood."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.kernels.aot import DTYPES, Case
from dalle_kernels.likelihood import contract as likelihood_contract
from dalle_kernels.likelihood import triton as likelihood
from dalle_kernels.sampling import contract as sampling_contract
from dalle_kernels.sampling import triton as sampling


def cases(arch: int) -> Iterator[Case]:
    # The longest row of a DALL-E: 16,384 text tokens, 128 of padding and 8,192 image tokens; and the image's alone.
    yield "sampling/16-bit/24704/guided", sample(16, 24704, guided=True)
    yield "sampling/16-bit/8192", sample(16, 8192)
    yield f"sampling/32-bit/{sampling.LARGEST}/guided", sample(32, sampling.LARGEST, guided=True)
    for bits in DTYPES:
        yield f"likelihood/{bits}-bit", nll(bits)


def sample(bits: int, tokens: int, guided: bool = False) -> Callable[[], object]:
    logits = torch.empty(4, tokens, dtype=DTYPES[bits])
    return lambda: (
        sampling.forward(sampling_contract.Inputs(logits, logits if guided else None, 3.0, 0.9, 100, 0.95, 1, 0)).tokens
    )


def nll(bits: int) -> Callable[[], object]:
    x, grad = torch.empty(4096, dtype=DTYPES[bits]), torch.empty(4096)
    return lambda: (
        likelihood.forward(likelihood_contract.Inputs(x, x, x)).nll,
        likelihood.backward(
            likelihood_contract.Grads(grad), likelihood_contract.Kept(x, x, x), likelihood_contract.Needs(True, True)
        ),
    )
