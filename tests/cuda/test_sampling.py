"""The CUDA sampling kernel, run by the emulation, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dalle_kernels import sample_tokens
from tests.sampling import masked


def _logits(rows: int, vocabulary: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return (3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 5, 258, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.6, "top_k": 1},
        {"top_k": 40},
        {"top_p": 0.8},
        {"temperature": 1.7, "top_k": 100, "top_p": 0.5},
        {"top_p": 1e-9},
        {"top_k": 10**6, "top_p": 1.0},
    ],
    ids=str,
)
def test_draws_what_the_reference_draws(
    emulated: Any, dtype: torch.dtype, vocabulary: int, options: dict[str, Any]
) -> None:
    logits = _logits(6, vocabulary, dtype)
    for seed, row_offset in ((0, 0), (-(2**63), 2**32 - 2), (12345678901, 2**63 - 100)):
        drawn = {"seed": seed, "row_offset": row_offset, **options}
        got = sample_tokens(logits, backend="cuda", **drawn)
        assert got.equal(sample_tokens(logits, backend="reference", **drawn))


def test_guidance_and_strided_rows(emulated: Any) -> None:
    both = _logits(8, 300, torch.float16).reshape(4, 2, 300)
    options = {"unconditional_logits": both[:, 1], "guidance_scale": 3.0, "top_k": 50, "seed": 3}
    got = sample_tokens(both[:, 0], backend="cuda", **options)
    assert got.equal(sample_tokens(both[:, 0], backend="reference", **options))


def test_equal_logits_stay_or_go_together(emulated: Any) -> None:
    logits = torch.tensor([[1.0, 0.0, -0.0, 0.0, -1.0, 0.0]]).repeat(200, 1)
    drawn = sample_tokens(logits, top_k=2, seed=1, backend="cuda")  # the second largest is shared by four
    assert drawn.equal(sample_tokens(logits, top_k=2, seed=1, backend="reference"))
    assert set(drawn.tolist()) == {0, 1, 2, 3, 5}
    drawn = sample_tokens(logits, top_p=0.45, seed=1, backend="cuda")
    assert drawn.equal(sample_tokens(logits, top_p=0.45, seed=1, backend="reference"))


def test_tokens_that_are_ruled_out_are_never_drawn(emulated: Any) -> None:
    logits = _logits(50, 64, torch.float32)
    logits[:, 10:] = -torch.inf
    for options in ({}, {"top_k": 30}, {"top_p": 0.99}):
        drawn = sample_tokens(logits, seed=9, backend="cuda", **options)
        assert drawn.equal(sample_tokens(logits, seed=9, backend="reference", **options))
        assert drawn.max() < 10
    nothing = torch.full((2, 64), -torch.inf)
    assert sample_tokens(nothing, seed=9, backend="cuda").tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", masked.SCALES)
@pytest.mark.parametrize("settings", masked.SETTINGS, ids=str)
def test_guidance_never_draws_what_either_side_rules_out(
    emulated: Any, settings: dict[str, Any], scale: float, dtype: torch.dtype
) -> None:
    for logits, unconditional in (masked.guided(dtype)[:2], masked.nothing_to_draw()):
        options = {"seed": 7, "unconditional_logits": unconditional, "guidance_scale": scale, **settings}
        drawn = sample_tokens(logits, backend="cuda", **options)
        assert drawn.equal(sample_tokens(logits, backend="reference", **options))


def test_an_empty_batch_and_one_token(emulated: Any) -> None:
    assert sample_tokens(_logits(0, 64, torch.float32), seed=1, backend="cuda").shape == (0,)
    assert sample_tokens(_logits(0, 8, torch.float32)[:, ::2], seed=1, backend="cuda").shape == (0,)
    assert sample_tokens(_logits(4, 2, torch.float32)[:, ::2], seed=1, backend="cuda").tolist() == [0] * 4


def test_no_rows(emulated: Any) -> None:
    assert sample_tokens(torch.empty(0, 300), seed=1, backend="cuda").shape == (0,)
