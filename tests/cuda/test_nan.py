"""NaN in the CUDA kernels of attention and decoding: the rule of every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dalle_kernels.backends import cuda_library
from tests.attention import nan_rule
from tests.cuda.elsewhere import Elsewhere
from tests.cuda.test_attention import one_pass  # noqa: F401  (a fixture)


@pytest.mark.parametrize("poisoned", nan_rule.NAMES)
def test_attention(emulated: Any, poisoned: str) -> None:
    nan_rule.check("cuda", torch.bfloat16, poisoned)


@pytest.mark.parametrize("poisoned", nan_rule.NAMES)
def test_one_pass(one_pass: list[int], poisoned: str) -> None:  # noqa: F811
    nan_rule.check("cuda", torch.float16, poisoned)


@pytest.mark.parametrize("poisoned", nan_rule.NAMES)
def test_the_forward_for_sm90a(emulated: Any, monkeypatch: pytest.MonkeyPatch, poisoned: str) -> None:
    if isinstance(emulated, Elsewhere) and torch.cuda.get_device_capability(emulated.device) != (9, 0):
        pytest.skip("this GPU has no sm_90a")
    monkeypatch.setattr(cuda_library, "has_sm90a", lambda device: True)
    monkeypatch.setattr(cuda_library, "shared_memory", lambda device, blocks: 232_448 // blocks)
    nan_rule.check("cuda", torch.bfloat16, poisoned)


@pytest.mark.parametrize("poisoned", nan_rule.NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("multiprocessors", [1, 4])
def test_decoding(
    emulated: Any, monkeypatch: pytest.MonkeyPatch, poisoned: str, dtype: torch.dtype, multiprocessors: int
) -> None:
    monkeypatch.setattr(cuda_library, "multiprocessors", lambda device: multiprocessors)
    nan_rule.check_decoding("cuda", dtype, poisoned)
