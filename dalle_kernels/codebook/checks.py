"""What the codebook's doors ask of their arguments."""

from __future__ import annotations

from typing import Any

import torch

from dalle_kernels.backends.contract import Call
from dalle_kernels.checks import autocast, check_alike, check_tensor


def describe(inputs: torch.Tensor, codebook: torch.Tensor, *_: Any, **__: Any) -> Call:
    check_tensor("the first argument", inputs)
    check_tensor("codebook", codebook, rank=2)
    return Call(inputs.device, autocast(inputs)[0].dtype, codebook.shape[-1])


def check_pair(name: str, inputs: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    check_tensor(name, inputs)
    check_tensor("codebook", codebook, rank=2)
    if inputs.dim() < 1 or 0 in codebook.shape:
        raise ValueError(
            f"{name}, codebook: got shapes {tuple(inputs.shape)}, {tuple(codebook.shape)}, wanted at least one code"
        )
    inputs, codebook = autocast(inputs, codebook)
    check_alike("codebook", codebook, name, inputs)
    return inputs, codebook


def gradient_like(tensor: torch.Tensor) -> torch.Tensor:
    """The codebook's gradients are contiguous."""
    return tensor.new_empty(tensor.shape)


def refuse_nan(name: str, inputs: torch.Tensor, row_result: torch.Tensor) -> None:
    """On the CPU, a NaN in a row's result is traced to the row; on a GPU the host does not wait to look."""
    if row_result.device.type == "cpu" and row_result.isnan().any():
        for row in row_result.isnan().nonzero().flatten().tolist():
            if inputs[row].isnan().any():
                raise ValueError(f"{name}: row {row} holds NaN, wanted numbers")
