"""The statistics of codes, defined: plain PyTorch."""

from __future__ import annotations

import torch

from dalle_kernels.backends.contract import Call
from dalle_kernels.codebook.statistics.contract import Inputs, Outputs
from dalle_kernels.precision import widen


def refuse(call: Call) -> str | None:
    return None


def forward(inputs: Inputs) -> Outputs:
    """Rows that do not count add up in a code of their own, behind the last, which is cut off."""
    wide = widen(inputs.features)
    heads, _, width = wide.shape
    index = torch.where(inputs.indices < 0, inputs.codes, inputs.indices)
    index = (index + (inputs.codes + 1) * torch.arange(heads, device=index.device)[:, None]).flatten()
    counts = torch.bincount(index, minlength=heads * (inputs.codes + 1)).view(heads, -1)[:, :-1]
    sums = wide.new_zeros(heads * (inputs.codes + 1), width).index_add_(0, index, wide.reshape(-1, width))
    return Outputs(counts.to(wide.dtype), sums.view(heads, -1, width)[:, :-1].contiguous())
