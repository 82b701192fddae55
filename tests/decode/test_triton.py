"""The Triton decoding step against float64: in Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from dalle_kernels import (
    AxialRow,
    Column,
    Convolution,
    KVCache,
    MaskPattern,
    Pattern,
    Row,
    Strided,
    TokenLayout,
    decode_attention,
)
from dalle_kernels.backends.contract import Call
from dalle_kernels.decode import triton as triton_kernel
from tests.oracles import attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUT = TokenLayout(35, (3, 5))
PATTERNS = [Row(LAYOUT), Column(LAYOUT), Convolution(LAYOUT, 3), AxialRow(TokenLayout(0, (4, 5))), Strided(30, 6)]


def decode(
    pattern: Pattern, qkv: list[torch.Tensor], prefilled: int, steps: range, scale: float | None = None
) -> torch.Tensor:
    """Outputs [B, H, len(steps), D] of the given steps, one by one."""
    q, k, v = qkv
    batch, heads, _, width = q.shape
    cache = KVCache(pattern, batch, heads, width, dtype=q.dtype, device=DEVICE)
    cache.keys.fill_(torch.nan)  # a slot that nobody wrote must not be read
    cache.values.fill_(torch.nan)
    cache.prefill(k[:, :, :prefilled], v[:, :, :prefilled])
    position = torch.zeros((), dtype=torch.int64, device=DEVICE)
    rows = []
    for step in range(prefilled, steps.stop):
        position.fill_(step)
        now = [tensor[:, :, step : step + 1] for tensor in qkv]
        out = decode_attention(*now, cache, position, scale, backend="triton")
        assert out.dtype == q.dtype
        rows.append(out)
    return torch.cat(rows[steps.start - prefilled :], 2)


def check(pattern: Pattern, batch: int, heads: int, width: int, dtype: torch.dtype, steps: range, **kwargs) -> None:
    torch.manual_seed(0)
    packed = torch.randn(batch, pattern.length, 3, heads, width, device=DEVICE).to(dtype)
    qkv = list(packed.permute(2, 0, 3, 1, 4).unbind())
    got = decode(pattern, qkv, steps.start, steps, **kwargs)
    mask = pattern.mask().to(DEVICE)
    scale = kwargs.get("scale")
    exact, _ = attention(*(tensor.double() for tensor in qkv), mask, scale)
    plain, _ = attention(*qkv, mask, scale)
    chosen = slice(steps.start, steps.stop)
    exact, plain = exact[:, :, chosen], plain[:, :, chosen]
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + rounding
    assert (got.double() - exact).abs().max() <= allowed


@pytest.fixture(autouse=True)
def _fresh_plans() -> Iterator[None]:
    triton_kernel.plan_for.cache_clear()
    yield
    triton_kernel.plan_for.cache_clear()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_step(pattern: Pattern, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force_splits(monkeypatch, splits, heads=2)
    check(pattern, 1, 2, 16, torch.float32, range(pattern.length))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("blind", [0, 20])
def test_a_query_that_sees_no_key_gets_zeros(blind: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force_splits(monkeypatch, splits, heads=2)
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    mask[blind] = False
    pattern = MaskPattern(mask)
    check(pattern, 1, 2, 16, torch.float32, range(40))
    now = [torch.randn(1, 2, 1, 16, device=DEVICE) for _ in range(3)]
    cache = KVCache(pattern, 1, 2, 16, device=DEVICE)
    cache.lengths.fill_(blind)
    assert not decode_attention(*now, cache, blind, backend="triton").any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [16, 80, 128])
def test_widths_and_dtypes_after_a_prefill(width: int, dtype: torch.dtype) -> None:
    check(Row(LAYOUT), 3, 1, width, dtype, range(43, 47), scale=-0.4)


def test_splits_fill_the_device() -> None:
    pattern, device = Row(TokenLayout()), torch.device(DEVICE)
    few = triton_kernel.plan_for(pattern, device, torch.bfloat16, 64, heads=2)
    many = triton_kernel.plan_for(pattern, device, torch.bfloat16, 64, heads=10_000)
    assert few.splits == -(-289 // few.constants["KEYS"])
    assert many.splits == 1


def test_refusals() -> None:
    device = torch.device(DEVICE)
    assert triton_kernel.refuse(Call(device, torch.bfloat16, 64)) is None
    assert "float64" in str(triton_kernel.refuse(Call(device, torch.float64, 64)))
    assert "512" in str(triton_kernel.refuse(Call(device, torch.float32, 512)))


def force_splits(monkeypatch: pytest.MonkeyPatch, splits: int, heads: int) -> None:
    """Tiles of 16 keys and so many programs that a step has `splits` splits, empty ones among them at first."""
    settings = {"KEYS": 16, "programs": splits * heads, "num_warps": 1, "num_stages": 1}
    monkeypatch.setattr(triton_kernel.launch, "settings_for", lambda *_: settings)
