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
    sparse_attention,
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
    triton_kernel.launch_for.cache_clear()
    yield
    triton_kernel.launch_for.cache_clear()


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


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("pattern", "prompt"), [(Row(LAYOUT), 38), (Convolution(LAYOUT, 3), 35), (Strided(42, 6), 9)], ids=str
)
def test_shared_prompts_padding_and_positions_by_row(
    pattern: Pattern, prompt: int, padded: bool, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_splits(monkeypatch, splits, heads=12)
    torch.manual_seed(1)
    prompts, copies = 2, 3
    q, k, v = (torch.randn(prompts * copies, 2, pattern.length, 16, device=DEVICE) for _ in range(3))
    for tensor in (k, v):
        tensor[:, :, :prompt] = tensor[::copies, :, :prompt].repeat_interleave(copies, 0)
    padding = torch.zeros(prompts, pattern.length, dtype=torch.bool, device=DEVICE)
    padding[1, 2:prompt:2] = padding[0, : prompt - 1] = padded
    hidden = padding.repeat_interleave(copies, 0)
    wide = q.double(), k.double(), v.double()
    whole = sparse_attention(*wide, pattern, key_padding_mask=hidden, backend="reference").float()
    caches = [
        KVCache(pattern, prompts, 2, 16, device=DEVICE, copies=copies),
        KVCache(pattern, prompts * copies, 2, 16, device=DEVICE),
    ]
    for cache, step in zip(caches, (copies, 1), strict=True):
        mask = padding.repeat_interleave(copies // step, 0)[:, :prompt] if padded else None
        cache.prefill(k[::step, :, :prompt], v[::step, :, :prompt], mask)
        rows, positions = torch.arange(prompts * copies, device=DEVICE), torch.full((6,), prompt, device=DEVICE)
        for turn in range(4):
            now = [tensor[rows, :, positions][:, :, None] for tensor in (q, k, v)]
            got = decode_attention(*now, cache, positions if turn else positions[:1], backend="triton")
            torch.testing.assert_close(got, whole[rows, :, positions][:, :, None], atol=2e-6, rtol=2e-6)
            positions = positions + 1
            if turn == 1:
                positions[2] -= 1
                cache.truncate(positions)


@pytest.mark.parametrize("splits", [1, 3])
def test_a_query_whose_keys_are_all_padding_gets_zeros(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force_splits(monkeypatch, splits, heads=2)
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    mask[39, 39] = False
    pattern = MaskPattern(mask)
    kv = torch.randn(2, 2, 1, 39, 16, device=DEVICE)
    now = [torch.randn(2, 1, 1, 16, device=DEVICE) for _ in range(3)]
    padding = torch.zeros(2, 39, dtype=torch.bool, device=DEVICE)
    padding[0] = True
    padding[1, :38] = True  # whole splits of it
    for copies in (1, 2):
        prompts = slice(0, 2 // copies)
        cache = KVCache(pattern, 2 // copies, 1, 16, device=DEVICE, copies=copies)
        cache.prefill(kv[0][prompts], kv[1][prompts], padding[prompts])
        out = decode_attention(*now, cache, 39, backend="triton")
        assert not out[0].any()
        wanted = kv[1][1, :, 38:] if copies == 1 else torch.zeros(1, 1, 16, device=DEVICE)
        torch.testing.assert_close(out[1], wanted)


def test_several_tokens_a_step() -> None:
    torch.manual_seed(2)
    pattern = Row(LAYOUT)
    q, k, v = (torch.randn(1, 2, pattern.length, 16, device=DEVICE) for _ in range(3))
    cache = KVCache(pattern, 1, 2, 16, device=DEVICE)
    cache.prefill(k[:, :, :40], v[:, :, :40])
    got = decode_attention(*(tensor[:, :, 40:47] for tensor in (q, k, v)), cache, 40, backend="triton")
    whole = sparse_attention(q.double(), k.double(), v.double(), pattern, backend="reference").float()
    torch.testing.assert_close(got, whole[:, :, 40:47], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [16, 80, 128])
def test_widths_and_dtypes_after_a_prefill(width: int, dtype: torch.dtype) -> None:
    check(Row(LAYOUT), 3, 1, width, dtype, range(43, 47), scale=-0.4)


def test_splits_fill_the_device() -> None:
    pattern, device = Row(TokenLayout()), torch.device(DEVICE)
    few = triton_kernel.launch_for(pattern, device, torch.bfloat16, 64, heads=2)
    many = triton_kernel.launch_for(pattern, device, torch.bfloat16, 64, heads=10_000)
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
