"""NaN in attention and decoding: one rule for every backend (tests/cuda has it for the CUDA kernels)."""

from __future__ import annotations

import pytest
import torch

from tests.attention import nan_rule

DTYPES = {"reference": torch.float64, "cpu": torch.float32, "cpu-16": torch.bfloat16, "triton": torch.float32}


def _backend(name: str) -> tuple[str, torch.dtype]:
    if name == "triton":
        pytest.importorskip("triton")
    return name.removesuffix("-16"), DTYPES[name]


@pytest.mark.parametrize("poisoned", nan_rule.NAMES)
@pytest.mark.parametrize("name", DTYPES)
def test_attention(name: str, poisoned: str) -> None:
    nan_rule.check(*_backend(name), poisoned)


@pytest.mark.parametrize("poisoned", nan_rule.NAMES)
@pytest.mark.parametrize("name", DTYPES)
def test_decoding(name: str, poisoned: str) -> None:
    nan_rule.check_decoding(*_backend(name), poisoned)
