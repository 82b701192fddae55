"""The statistics of codes in native code: csrc/codebook."""

from __future__ import annotations

import torch

from dalle_kernels.backends import native
from dalle_kernels.backends.contract import Call
from dalle_kernels.codebook.statistics.contract import Inputs, Outputs


def refuse(call: Call) -> str | None:
    return native.refuse_cpu(call.device, call.dtype)


def describe() -> str:
    return native.instruction_set()


def forward(inputs: Inputs) -> Outputs:
    """The same bits for any number of threads."""
    return Outputs(*torch.ops.dalle_kernels_cpu.code_statistics(*inputs))
