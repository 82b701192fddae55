"""The sampling kernel in Triton: in Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from dalle_kernels import sample_tokens
from dalle_kernels.backends.contract import Call
from dalle_kernels.sampling import triton as triton_kernel
from tests.sampling import masked

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6, "top_k": 7},
    {"top_p": 0.6},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.1, "top_k": 10**6, "top_p": 1.0},
]


def both(logits: torch.Tensor, **kwargs: Any) -> tuple[list[int], list[int]]:
    """The tokens that the kernel draws, and those that the definition draws."""
    drawn, true = (sample_tokens(logits, backend=backend, **kwargs) for backend in ("triton", "reference"))
    assert drawn.dtype == torch.int64
    return drawn.tolist(), true.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_what_the_definition_draws(settings: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for tokens in (5, 600):
        logits = (2 * torch.randn(2, tokens, device=DEVICE)).to(dtype)
        drawn, true = both(logits, seed=-9, **settings)
        assert drawn == true


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_guidance(settings: dict[str, Any]) -> None:
    torch.manual_seed(1)
    logits, unconditional = torch.randn(2, 2, 300, device=DEVICE)
    drawn, true = both(logits, seed=2, unconditional_logits=unconditional, guidance_scale=3.0, **settings)
    assert drawn == true


def test_equal_logits_stay_or_go_together() -> None:
    logits = torch.tensor([0.3, 0.1, 0.3, 0.0, -0.0, 0.1], device=DEVICE).expand(5, 6)
    kept = {
        "top_k": [(1, {0, 2}), (3, {0, 1, 2, 5}), (5, set(range(6)))],
        "top_p": [(0.1, {0, 2}), (0.6, {0, 1, 2, 5})],
    }
    for setting, cases in kept.items():
        for value, allowed in cases:
            drawn, true = both(logits, seed=3, **{setting: value})
            assert drawn == true
            assert set(drawn) <= allowed
    assert sample_tokens(logits[:1], temperature=0.0, backend="triton").tolist() == [0]


def test_ruled_out_tokens_are_never_drawn() -> None:
    logits = torch.full((3, 9), -torch.inf, device=DEVICE)
    logits[:, [2, 8]] = 0
    for settings in SETTINGS:
        assert set(sample_tokens(logits, seed=4, backend="triton", **settings).tolist()) <= {2, 8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("scale", masked.SCALES)
@pytest.mark.parametrize("settings", masked.SETTINGS, ids=str)
def test_guidance_never_draws_what_either_side_rules_out(
    settings: dict[str, Any], scale: float, dtype: torch.dtype
) -> None:
    logits, unconditional, _ = masked.guided(dtype, 3, DEVICE)
    drawn, true = both(logits, seed=7, unconditional_logits=unconditional, guidance_scale=scale, **settings)
    assert drawn == true
    logits, unconditional = masked.nothing_to_draw(DEVICE)
    drawn, true = both(logits, seed=7, unconditional_logits=unconditional, guidance_scale=scale, **settings)
    assert drawn == true == [0]


def test_one_token_and_strided_rows() -> None:
    torch.manual_seed(2)
    assert both(torch.zeros(3, 1, device=DEVICE), seed=1) == ([0, 0, 0], [0, 0, 0])
    assert both(torch.randn(4, 2, device=DEVICE)[:, ::2], seed=1) == ([0] * 4, [0] * 4)
    assert both(torch.randn(0, 8, device=DEVICE)[:, ::2], seed=1) == ([], [])
    drawn, true = both(torch.randn(6, 80, device=DEVICE)[::2, :50], seed=1, top_k=5)
    assert drawn == true
    assert sample_tokens(torch.zeros(0, 7, device=DEVICE), backend="triton").shape == (0,)


def test_a_whole_vocabulary() -> None:
    """16,384 text tokens, 128 of padding and 8,192 image tokens: the longest row of a DALL-E."""
    torch.manual_seed(3)
    logits = 4 * torch.randn(1, 24704, device=DEVICE)
    drawn, true = both(logits, seed=5, top_k=100, top_p=0.9)
    assert drawn == true


def test_what_is_refused() -> None:
    device = torch.device(DEVICE)
    assert triton_kernel.refuse(Call(device, torch.float16, 32768)) is None
    assert "32769 tokens" in triton_kernel.refuse(Call(device, torch.float16, 32769))
    assert "float64" in triton_kernel.refuse(Call(device, torch.float64, 10))
