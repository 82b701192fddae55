"""NaN in the CUDA kernels of attention and decoding: the rule of every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dalle_kernels.backends import cuda_library
from tests.attention import nan_rule


@pytest.mark.parametrize("poisoned", nan_rule.NAMES)
def test_attention(emulated: Any, poisoned: str) -> None:
    nan_rule.check("cuda", torch.bfloat16, poisoned)


@pytest.mark.parametrize("poisoned", nan_rule.NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("multiprocessors", [1, 4])
def test_decoding(
    emulated: Any, monkeypatch: pytest.MonkeyPatch, poisoned: str, dtype: torch.dtype, multiprocessors: int
) -> None:
    monkeypatch.setattr(cuda_library, "multiprocessors", lambda device: multiprocessors)
    nan_rule.check_decoding("cuda", dtype, poisoned)
