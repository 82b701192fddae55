"""Drawing tokens in native code: csrc/sampling. AVX2 or AVX-512, rows shared out over torch's threads."""

from __future__ import annotations

import torch

from dalle_kernels.backends import native
from dalle_kernels.backends.contract import Call
from dalle_kernels.sampling.contract import Inputs, Outputs


def refuse(call: Call) -> str | None:
    return native.refuse_cpu(call.device, call.dtype)


def describe() -> str:
    return native.instruction_set()


def forward(inputs: Inputs) -> Outputs:
    """No sort: top-k and top-p are thresholds found by selection."""
    *rest, seed, row_offset = inputs
    return Outputs(torch.ops.dalle_kernels_cpu.sample(*rest, int(seed), int(row_offset)))
