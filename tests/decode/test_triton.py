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
from dalle_kernels.decode.eight_bit import quantize, widen
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


@pytest.mark.parametrize(
    ("pattern", "prompt", "padded", "splits", "eight_bit", "groups", "softcap"),
    [
        *(
            (pattern, prompt, padded, splits, False, 1, None)
            for pattern, prompt in ((Row(LAYOUT), 38), (Convolution(LAYOUT, 3), 35), (Strided(42, 6), 9))
            for padded in (False, True)
            for splits in (1, 3)
        ),
        (Row(LAYOUT), 38, False, 1, True, 1, None),
        (Row(LAYOUT), 38, True, 3, True, 2, 2.0),
        (Convolution(LAYOUT, 3), 35, True, 1, True, 2, None),
        (Strided(42, 6), 9, True, 3, True, 1, 2.0),
        (Strided(42, 6), 9, False, 3, False, 2, 2.0),
    ],
    ids=str,
)
def test_shared_prompts_padding_and_positions_by_row(
    pattern: Pattern,
    prompt: int,
    padded: bool,
    splits: int,
    eight_bit: bool,
    groups: int,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    force_splits(monkeypatch, splits, heads=12)
    torch.manual_seed(1)
    prompts, copies = 2, 3
    heads, dtype = 2 // groups, torch.int8 if eight_bit else torch.float32
    q, k, v = (torch.randn(prompts * copies, count, pattern.length, 16, device=DEVICE) for count in (2, heads, heads))
    for tensor in (k, v):
        tensor[:, :, :prompt] = tensor[::copies, :, :prompt].repeat_interleave(copies, 0)
    padding = torch.zeros(prompts, pattern.length, dtype=torch.bool, device=DEVICE)
    padding[1, 2:prompt:2] = padding[0, : prompt - 1] = padded
    hidden = padding.repeat_interleave(copies, 0)
    whole = truth(q, k, v, pattern, eight_bit, softcap, hidden)
    caches = [
        KVCache(pattern, prompts, heads, 16, dtype, DEVICE, copies),
        KVCache(pattern, prompts * copies, heads, 16, dtype, DEVICE),
    ]
    for cache, step in zip(caches, (copies, 1), strict=True):
        mask = padding.repeat_interleave(copies // step, 0)[:, :prompt] if padded else None
        cache.prefill(k[::step, :, :prompt], v[::step, :, :prompt], mask)
        rows, positions = torch.arange(prompts * copies, device=DEVICE), torch.full((6,), prompt, device=DEVICE)
        for turn in range(4):
            now = [tensor[rows, :, positions][:, :, None] for tensor in (q, k, v)]
            where = positions if turn else positions[:1]
            got = decode_attention(*now, cache, where, backend="triton", softcap=softcap)
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


@pytest.mark.parametrize(
    ("width", "dtype"), [(16, torch.float32), (80, torch.bfloat16), (80, torch.float32), (128, torch.float16)], ids=str
)
def test_eight_bits_of_several_widths_and_dtypes(width: int, dtype: torch.dtype) -> None:
    """The same bits in the cache as the reference's, zeros, halves of steps and all magnitudes among them."""
    torch.manual_seed(4)
    pattern = Row(LAYOUT)
    q, k, v = (torch.randn(2, heads, pattern.length, width, device=DEVICE) for heads in (4, 2, 2))
    for tensor in (k, v):
        tensor *= torch.randn_like(tensor[..., :1]).exp()
        tensor[0, 0, 36] = 0
        tensor[1, 0, 37, :8] = torch.tensor([127, -126.5, 0.5, 1.5, -2.5, 0.49, -0.51, 3], device=DEVICE)
        tensor[1, 0, 37, 8:] = 0
        tensor[0, 1, 38] *= 1e-38  # counts as zeros in bfloat16 and float32
    q, k, v = (tensor.to(dtype) for tensor in (q, k, v))
    got, wanted = (KVCache(pattern, 2, 2, width, torch.int8, DEVICE) for _ in range(2))
    for cache, backend in ((got, "triton"), (wanted, "reference")):
        cache.prefill(k[:, :, :35], v[:, :, :35])
        now = (tensor[:, :, 35:41] for tensor in (q, k, v))
        out = decode_attention(*now, cache, 35, backend=backend)
        whole = truth(q, k, v, pattern, eight_bit=True)[:, :, 35:41]
        torch.testing.assert_close(out, whole.to(dtype), atol=2e-5, rtol=max(2e-5, torch.finfo(dtype).eps))
    for name in ("keys", "values", "scales"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name


def test_nan_and_infinity_in_eight_bits_reach_the_queries_that_see_them() -> None:
    pattern = Row(LAYOUT)
    for which, strange in ((1, torch.nan), (2, -torch.inf)):
        qkv = [torch.randn(1, 2, pattern.length, 16, device=DEVICE) for _ in range(3)]
        qkv[which][0, 1, 38, 4] = strange
        cache = KVCache(pattern, 1, 2, 16, torch.int8, DEVICE)
        cache.prefill(*(tensor[:, :, :38] for tensor in qkv[1:]))
        got = decode_attention(*(tensor[:, :, 38:46] for tensor in qkv), cache, 38, backend="triton")
        sees = pattern.mask()[38:46, 38]
        assert got[0, 1, sees].isnan().all()
        assert got[0, 1, ~sees].isfinite().all()
        assert got[0, 0].isfinite().all()


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


def truth(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    eight_bit: bool,
    softcap: float | None = None,
    padding: torch.Tensor | None = None,
) -> torch.Tensor:
    """In float64, of keys and values as eight bits have them where they are kept so; rounded to float32 in the end."""
    if eight_bit:
        k, v = (widen(*quantize(tensor), torch.float64) for tensor in (k, v))
    k, v = (tensor.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
    out = sparse_attention(q.double(), k, v, pattern, key_padding_mask=padding, softcap=softcap, backend="reference")
    return out.float()


def force_splits(monkeypatch: pytest.MonkeyPatch, splits: int, heads: int) -> None:
    """Tiles of 16 keys and so many programs that a step has `splits` splits, empty ones among them at first."""
    settings = {"KEYS": 16, "programs": splits * heads, "num_warps": 1, "num_stages": 1}
    monkeypatch.setattr(triton_kernel.launch, "settings_for", lambda *_: settings)
