"""The CUDA decoding kernel, run by the emulation, against sparse attention in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dalle_kernels import KVCache, TokenLayout, decode_attention
from dalle_kernels.attention import reference
from dalle_kernels.attention.contract import Inputs
from dalle_kernels.patterns.patterns import Causal, Column, Convolution, MaskPattern, Pattern, Row, Strided

LAYOUT = TokenLayout(text_length=5, grid=(4, 6))
PATTERNS: list[Pattern] = [
    Row(LAYOUT),
    Column(LAYOUT),
    Causal(LAYOUT),
    Convolution(LAYOUT, kernel_size=3),
    Strided(29, 5),
    Row(TokenLayout(0, (3, 5))),
]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def _decode(pattern: Pattern, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefill: int) -> torch.Tensor:
    batch, heads, length, width = q.shape
    cache = KVCache(pattern, batch, heads, width, dtype=q.dtype)
    cache.keys.fill_(torch.nan)  # a slot that is read before it was written shows
    cache.values.fill_(torch.nan)
    cache.prefill(k[:, :, :prefill], v[:, :, :prefill])
    steps = [
        decode_attention(*(tensor[:, :, i : i + 1] for tensor in (q, k, v)), cache, torch.tensor(i), backend="cuda")
        for i in range(prefill, length)
    ]
    return torch.cat(steps, dim=2)


def _want(pattern: Pattern, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return reference.forward(Inputs(q.double(), k.double(), v.double(), None, q.shape[-1] ** -0.5, pattern))[0]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_token_by_token_gives_what_attention_gives(emulated: Any, pattern: Pattern, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, 2, pattern.length, 32).to(dtype) for _ in range(3))
    got = _decode(pattern, q, k, v, prefill=pattern.length // 3)
    want = _want(pattern, q, k, v)[:, :, pattern.length // 3 :]
    torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(8, torch.bfloat16), (16, torch.float32), (80, torch.bfloat16), (128, torch.float32), (128, torch.float16)],
)
def test_widths(emulated: Any, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    pattern = Row(LAYOUT)
    q, k, v = (torch.randn(1, 3, pattern.length, width).to(dtype) for _ in range(3))
    got = _decode(pattern, q, k, v, prefill=pattern.length - 4)
    torch.testing.assert_close(got.double(), _want(pattern, q, k, v)[:, :, -4:], atol=TOLERANCE[dtype], rtol=0.02)


def test_split_over_keys_and_strided_inputs(emulated: Any) -> None:
    torch.manual_seed(5)
    pattern = Causal(TokenLayout(100, (10, 12)))  # 220 slots: three splits for one head
    joined = torch.randn(1, pattern.length, 3, 1, 64).bfloat16()
    q, k, v = (tensor.transpose(1, 2) for tensor in joined.unbind(2))
    got = _decode(pattern, q, k, v, prefill=pattern.length - 2)
    want = _want(pattern, q, k, v)[:, :, -2:]
    torch.testing.assert_close(got.double(), want, atol=TOLERANCE[torch.bfloat16], rtol=0.02)
    early = _decode(pattern, q[:, :, :2], k[:, :, :2], v[:, :, :2], prefill=0)  # most splits have no key
    torch.testing.assert_close(early.double(), _want(pattern, q, k, v)[:, :, :2], atol=0.02, rtol=0.02)


def test_torchs_default_dtype_has_no_say(emulated: Any) -> None:
    pattern = Causal(TokenLayout(100, (10, 12)))  # split over keys, with a workspace
    q, k, v = (torch.randn(1, 1, pattern.length, 32) for _ in range(3))
    want = _want(pattern, q, k, v)[:, :, -1:]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = _decode(pattern, q, k, v, prefill=pattern.length - 1)
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=2e-6)


def test_a_query_that_sees_nothing_gives_zeros(emulated: Any) -> None:
    mask = torch.tril(torch.ones(6, 6, dtype=torch.bool))
    mask[3] = False
    pattern = MaskPattern(mask)
    q, k, v = (torch.randn(1, 1, 6, 16) for _ in range(3))
    got = _decode(pattern, q, k, v, prefill=0)
    assert (got[:, :, 3] == 0).all()
    torch.testing.assert_close(got.double(), _want(pattern, q, k, v), atol=2e-6, rtol=2e-6)
