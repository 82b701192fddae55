"""What the codebook's doors ask of their arguments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from dalle_kernels.backends.contract import Call
from dalle_kernels.backends.sharding import divided
from dalle_kernels.checks import autocast, check_alike, check_tensor


def describe(inputs: torch.Tensor, codebook: torch.Tensor, *_: Any, **__: Any) -> Call:
    check_tensor("the first argument", inputs)
    check_tensor("codebook", codebook, rank=2)
    return Call(inputs.device, autocast(inputs)[0].dtype, codebook.shape[-1])


def contiguous(grads: Iterable[torch.Tensor | None]) -> Iterator[torch.Tensor | None]:
    """The gradients that come in, as backends are given them."""
    return (None if grad is None else grad.contiguous() for grad in grads)


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


def check_row_mask(row_mask: object, features: torch.Tensor) -> torch.Tensor | None:
    """`row_mask`, a bool for each row of `features`, or None."""
    if row_mask is None:
        return None
    if not isinstance(row_mask, torch.Tensor):
        raise TypeError(f"row_mask: got {type(row_mask).__name__}, wanted a torch.Tensor")
    if divided([features]) and not divided([row_mask]):
        raise TypeError("row_mask: got a torch.Tensor, wanted a DTensor as features are")
    if row_mask.dtype != torch.bool or row_mask.shape != features.shape[:-1]:
        came = f"{row_mask.dtype} of shape {tuple(row_mask.shape)}"
        raise ValueError(f"row_mask: got {came}, wanted torch.bool of shape {tuple(features.shape[:-1])}")
    if row_mask.device != features.device:
        raise ValueError(f"row_mask: got a tensor on {row_mask.device}, wanted {features.device} where features are")
    return row_mask


def gradient_like(tensor: torch.Tensor) -> torch.Tensor:
    """The codebook's gradients are contiguous."""
    return tensor.new_empty(tensor.shape)


def refuse_nan(name: str, inputs: torch.Tensor, row_results: torch.Tensor, *, or_infinite: bool = False) -> None:
    """On the CPU, a NaN in a row's results is traced to the row; on a GPU the host does not wait to look.

    Where `or_infinite`, so is an infinity. A sum is no number wherever one of its terms is none, and costs no table of
    flags; as results may overflow where the row is finite, the row has the last word.
    """
    if not row_results.is_cpu:
        return
    total = row_results.sum().item()
    if math.isfinite(total) or (math.isinf(total) and not or_infinite):
        return
    rows = inputs.reshape(-1, inputs.shape[-1])
    suspects = ~row_results.isfinite() if or_infinite else row_results.isnan()
    for row in suspects.reshape(len(rows), -1).any(1).nonzero().flatten().tolist():
        if rows[row].isnan().any():
            raise ValueError(f"{name}: row {row} holds NaN, wanted numbers")
        if or_infinite and rows[row].isinf().any():
            raise ValueError(f"{name}: row {row} holds infinity, wanted finite numbers")
