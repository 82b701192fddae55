"""Caches of eight bits, and query heads that share keys: against float64, and within the bound that KVCache states."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

from dalle_kernels import Column, Convolution, KVCache, MaskPattern, Pattern, Row, TokenLayout, decode_attention
from dalle_kernels.backends.contract import Call
from dalle_kernels.decode import cpu, cuda
from dalle_kernels.decode.eight_bit import quantize, widen
from tests.decode.test_cache import cut, refused
from tests.oracles import attention, every_pattern

LAYOUT = TokenLayout(5, (4, 6))
CAUSAL = [pattern for pattern in every_pattern(LAYOUT) if not isinstance(pattern, MaskPattern)]
HERE = Call(torch.device("cpu"), torch.float32, 16, ("eight-bit caches", "grouped heads"))
BACKENDS = ["reference", *(["cpu"] if cpu.refuse(HERE) is None else [])]

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tokens(
    length: int,
    rows: int = 2,
    heads: int = 3,
    groups: int = 1,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> QKV:
    """Rows of all magnitudes, some with one number far beyond the others."""
    generator = torch.Generator().manual_seed(seed)

    def rows_of(heads: int) -> torch.Tensor:
        shape = (rows, heads, length, width)
        x = torch.randn(shape, generator=generator) * torch.randn(shape[:3], generator=generator).exp()[..., None]
        x[..., 3] *= torch.where(torch.rand(shape[:3], generator=generator) < 0.2, 20.0, 1.0)
        return x.to(dtype)

    return rows_of(heads * groups), rows_of(heads), rows_of(heads)


def decode(
    qkv: QKV, pattern: Pattern, backend: str, start: int = 0, chunk: int = 1, scale: float = 0.25, **options: int
) -> tuple[torch.Tensor, KVCache]:
    """Every token from `start` on; slots that nobody wrote have a scale of NaN."""
    q, k, v = qkv
    copies = options.get("copies", 1)
    cache = KVCache(pattern, len(q) // copies, k.shape[1], q.shape[-1], dtype=torch.int8, **options)
    if start or copies > 1:
        cache.prefill(*(tensor[::copies, :, :start] for tensor in (k, v)))
    held = cache.scales if start == 0 or copies > 1 else None
    if held is not None:
        held.fill_(torch.nan)
    outs = [
        decode_attention(*cut(qkv, i, min(i + chunk, q.shape[2])), cache, i, scale, backend=backend)
        for i in range(start, q.shape[2], chunk)
    ]
    return torch.cat(outs, 2), cache


def truth(qkv: QKV, pattern: Pattern, scale: float = 0.25, rounded: bool = False) -> torch.Tensor:
    """In float64, with the keys and values as they are or as eight bits have them."""
    q, k, v = (tensor.double() for tensor in qkv)
    if rounded:
        k, v = (widen(*quantize(tensor), torch.float64) for tensor in qkv[1:])
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
    return attention(q, k, v, pattern.mask(), scale)[0]


def assert_close(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    """As near as the same sum in plain PyTorch comes, and its own rounding."""
    slack = 64 * torch.finfo(torch.float32).eps + (torch.finfo(dtype).eps if dtype != torch.float32 else 0)
    assert got.dtype == dtype
    assert (got.double() - wanted).abs().max() <= slack * wanted.abs().max()


def test_a_row_is_rounded_to_whole_steps_of_its_greatest_magnitude() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        rows = tokens(200, dtype=dtype)[1]
        steps, scale = quantize(rows)
        assert (steps.dtype, scale.dtype) == (torch.int8, torch.float32)
        most = rows.double().abs().amax(-1)
        torch.testing.assert_close(scale.double(), most / 127, rtol=1e-7, atol=0)
        error = (widen(steps, scale, torch.float64) - rows.double()).abs().amax(-1)
        assert (error <= most / 254 * (1 + 3e-5)).all()
        assert steps.abs().max() == 127
        assert bool((steps.abs().amax(-1) == 127).all())


def test_rows_that_have_no_steps() -> None:
    tiny = torch.finfo(torch.float32).tiny
    rows = torch.zeros(7, 8, dtype=torch.float64)
    rows[1, 2], rows[2, 5], rows[3, 0], rows[4, 1], rows[5, 2] = (
        torch.nan,
        -torch.inf,
        1e39 * 127,
        120 * tiny,
        130 * tiny,
    )
    rows[6] = torch.tensor([127, -126.5, 0.5, 1.5, -2.5, 0.49, -0.51, 3], dtype=torch.float64)
    steps, scale = quantize(rows)
    assert scale[:5].isnan().tolist() == [False, True, True, True, False]
    assert not steps[:5].any()
    assert scale[[0, 4]].tolist() == [0, 0]
    assert (steps[5, 2], steps[6].tolist()) == (127, [127, -126, 0, 2, -2, 0, -1, 3])


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", CAUSAL, ids=str)
def test_every_pattern(pattern: Pattern, backend: str, chunk: int) -> None:
    qkv = tokens(pattern.length)
    for start in (0, 9):
        got, _ = decode(qkv, pattern, backend, start, chunk)
        assert_close(got, truth(qkv, pattern, rounded=True)[:, :, start:], torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prompt", [1, 5, 14])
def test_the_error_is_within_the_bound_of_the_docstring(backend: str, prompt: int) -> None:
    worst = 0.0
    for seed in range(6):
        for pattern in (Row(LAYOUT), Column(LAYOUT), Convolution(LAYOUT, 3)):
            scale = (-0.3, 0.05, 1.0)[seed % 3]
            qkv = tokens(pattern.length, seed=seed)
            got, _ = decode(qkv, pattern, backend, prompt, scale=scale)
            seen = pattern.mask()[prompt:]
            q, k, v = (tensor.double().abs() for tensor in qkv)
            # The greatest magnitude that each query sees.
            key, value = ((t.amax(-1)[:, :, None] * seen).amax(-1) for t in (k, v))
            bound = value * (1 + abs(scale) * q[:, :, prompt:].sum(-1) * key) / 254
            error = (got.double() - truth(qkv, pattern, scale)[:, :, prompt:]).abs().amax(-1)
            assert (error <= bound * (1 + 1e-4) + 1e-5 * value).all()
            worst = max(worst, float((error / bound).max()))
    assert worst > 0.05  # the bound says something


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [4, 8, 13, 16, 24, 40, 64, 90, 96, 256])
def test_widths_and_dtypes(isa: str, width: int, dtype: torch.dtype) -> None:
    pattern = Convolution(TokenLayout(20, (7, 9)), 5)
    qkv = tokens(pattern.length, width=width, dtype=dtype)
    got, cache = decode(qkv, pattern, "cpu", scale=width**-0.5)
    assert_close(got, truth(qkv, pattern, width**-0.5, rounded=True), dtype)
    _, same = decode(qkv, pattern, "reference", scale=width**-0.5)
    for name in ("keys", "values", "scales"):
        assert torch.equal(getattr(cache, name), getattr(same, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copies", [2, 8, 17, 33, 71])
def test_candidates_of_one_prompt(isa: str, copies: int, dtype: torch.dtype) -> None:
    pattern, prompt = Row(TokenLayout(150, (2, 3))), 151
    for width in (16, 21, 40):
        q, k, v = tokens(pattern.length, rows=2 * copies, heads=1, width=width, dtype=dtype)
        for tensor in (k, v):
            tensor[:, :, :prompt] = tensor[::copies, :, :prompt].repeat_interleave(copies, 0)
        got, cache = decode((q, k, v), pattern, "cpu", prompt, copies=copies)
        assert_close(got, truth((q, k, v), pattern, rounded=True)[:, :, prompt:], dtype)
        slots, kept = cache.keys.shape[2], cache.shared_keys.shape[2]  # type: ignore[union-attr]
        assert cache.nbytes == 2 * (width + 4) * (2 * copies * slots + 2 * kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_prompts_of_every_kind(backend: str) -> None:
    copies, prompt = 3, 8
    for pattern in CAUSAL:
        q, k, v = tokens(pattern.length, rows=2 * copies)
        for tensor in (k, v):
            tensor[:, :, :prompt] = tensor[::copies, :, :prompt].repeat_interleave(copies, 0)
        for chunk in (1, 4):
            got, _ = decode((q, k, v), pattern, backend, prompt, chunk, copies=copies)
            assert_close(got, truth((q, k, v), pattern, rounded=True)[:, :, prompt:], torch.float32)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no kernels for this processor")
@pytest.mark.parametrize("copies", [1, 12])
def test_a_soft_cap_over_eight_bits_and_shared_keys(copies: int) -> None:
    pattern, outs = Row(TokenLayout(40, (2, 3))), []
    q, k, v = tokens(46, rows=12, heads=2, groups=2, width=24)
    for backend in BACKENDS:
        cache = KVCache(pattern, 12 // copies, 2, 24, dtype=torch.int8, copies=copies)
        cache.prefill(*(tensor[::copies, :, :40] for tensor in (k, v)))
        outs.append(decode_attention(*cut((q, k, v), 40, 46), cache, 40, 0.5, backend=backend, softcap=3.0))
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


def test_bits_do_not_depend_on_threads(isa: str) -> None:
    pattern, before, outs = Row(TokenLayout(300, (2, 30))), torch.get_num_threads(), []
    qkv = tokens(pattern.length, rows=1, heads=1)
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            outs.append(decode(qkv, pattern, "cpu", 300)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_reach_the_queries_that_see_them(backend: str) -> None:
    pattern = Row(LAYOUT)
    for tensor in (1, 2):
        for strange in (torch.nan, torch.inf, -torch.inf):
            qkv = tokens(pattern.length)
            qkv[tensor][0, 1, 9, 4] = strange
            got, _ = decode(qkv, pattern, backend)
            sees = pattern.mask()[:, 9]
            assert got[0, 1, sees].isnan().all()
            assert got[0, 1, ~sees].isfinite().all()
            assert got[1].isfinite().all()
            assert got[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_going_back_other_rows_and_padding(backend: str) -> None:
    pattern = Column(LAYOUT)
    q, k, v = tokens(pattern.length, rows=3)
    cache, index = KVCache(pattern, 3, 3, 16, dtype=torch.int8, rewind=2), torch.tensor([2, 0, 2, 1])
    padding = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)) < 0.3
    cache.prefill(k[:, :, :8], v[:, :, :8], padding)
    decode_attention(*(torch.randn(3, 3, 3, 16) for _ in range(3)), cache, 8, backend=backend)
    cache.truncate(8)
    cache.reorder(index)
    chosen = q[index], k[index], v[index]
    hidden = torch.nn.functional.pad(padding, (0, 21))[index]
    keys, values = (widen(*quantize(tensor), torch.float64) for tensor in chosen[1:])
    wanted, _ = attention(chosen[0].double(), keys, values, pattern.mask(), 0.25, hidden)
    got = decode_attention(*cut(chosen, 8, 12), cache, 8, backend=backend)
    assert_close(got, wanted[:, :, 8:12], torch.float32)


def test_bytes_are_those_of_numbers_and_scales() -> None:
    pattern = Row(TokenLayout(256, (32, 32)))
    wide, narrow = (KVCache(pattern, 1, 2, 64, dtype=dtype) for dtype in (torch.float32, torch.int8))
    assert wide.nbytes == 2 * 2 * 289 * 64 * 4
    assert narrow.nbytes == 2 * 2 * 289 * (64 + 4)


def test_what_does_not_suit_an_eight_bit_cache() -> None:
    cache, one = KVCache(Row(LAYOUT), 2, 3, 16, dtype=torch.int8), torch.zeros(2, 3, 1, 16)
    refused(cache, lambda: decode_attention(one, one, one, cache, 3), "position: got 3, wanted 0")
    full, step = KVCache(Row(LAYOUT), 2, 3, 16, dtype=torch.int8, copies=2), torch.randn(4, 3, 1, 16)
    full.prefill(*torch.randn(2, 2, 3, 28, 16))
    decode_attention(step, step, step, full, 28)
    refused(full, lambda: decode_attention(step, step, step, full, 29), "position: got 29, wanted an int from 0 to 28")
    refused(
        full, lambda: decode_attention(step, step, step, full, 28), r"position: got 28, wanted 29, .* truncate\(28\)"
    )
    refused(full, lambda: decode_attention(one, one, one, full, 28), r"q: got shape \(2, .*, wanted \(4, 3, 1, 16\)")
    refused(full, lambda: full.prefill(one, one), "k: the cache holds 29 tokens already")
    refused(full, lambda: full.truncate(20), "position: got 20, wanted at least the 28 tokens of the prompt")
    with pytest.raises(TypeError, match=r"k: got torch.float64, wanted torch.float32 as the others have"):
        decode_attention(one, one.double(), one, cache, 0)
    with pytest.raises(TypeError, match=r"v: got torch.bfloat16, wanted torch.float32"):
        cache.prefill(one, one.bfloat16())
    with pytest.raises(TypeError, match=r"q: got torch\.int8, wanted float16, bfloat16"):
        decode_attention(*(torch.zeros(2, 3, 1, 16, dtype=torch.int8) for _ in range(3)), cache, 0)
    assert decode_attention(*(one.bfloat16() for _ in range(3)), cache, 0).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype: got torch\.int16, wanted a floating-point dtype or torch.int8"):
        KVCache(Row(LAYOUT), 1, 1, 8, dtype=torch.int16)
    held = cache.scales
    assert held is not None
    for wrong, message in ((held[:, :, :3], "cache.scales: got"), (held.double(), "cache.scales: got torch.float64")):
        cache.scales = wrong
        with pytest.raises(ValueError, match=message):
            decode_attention(one, one, one, cache, 1)
    cache.scales = None
    with pytest.raises(TypeError, match=r"cache\.keys: got torch\.int8, wanted int8 just where cache.scales is there"):
        decode_attention(one, one, one, cache, 1)


def test_cuda_refuses_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.cuda_library, "refuse", lambda *_: None)
    for extra in ("eight-bit caches", "grouped heads"):
        assert cuda.refuse(Call(torch.device("cuda"), torch.bfloat16, 64, (extra,))) == f"it has no {extra}"


def test_compiled_and_checked() -> None:
    pattern = Row(LAYOUT)
    qkv = tokens(pattern.length)
    compiled, eager = (KVCache(pattern, 2, 3, 16, dtype=torch.int8) for _ in range(2))

    @torch.compile(fullgraph=True)
    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return decode_attention(q, k, v, compiled, position)

    for position in range(4):
        got = step(*cut(qkv, position, position + 1), torch.tensor(position))
        assert torch.equal(got, decode_attention(*cut(qkv, position, position + 1), eager, position))
    step = *cut(qkv, 4, 5), eager.keys, eager.values, torch.tensor(4), pattern.spec, torch.tensor(0.25), None
    carried = None, None, None, None, eager.scales, None, eager.lengths
    opcheck(
        torch.ops.dalle_kernels.decode_forward.default,
        (*step, *carried, 0, 0, "auto"),
    )
    empty = KVCache(pattern, 2, 3, 16, dtype=torch.int8)
    opcheck(
        torch.ops.dalle_kernels.decode_prefill.default,
        (*cut(qkv, 0, 4)[1:], empty.keys, empty.values, None, empty.scales, None, None, pattern.spec, 0, 0),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [2, 4])
def test_query_heads_may_share_keys(groups: int, backend: str, dtype: torch.dtype) -> None:
    """One row and head, whose keys are cut into parts, and several; candidates of one prompt; several tokens."""
    for layout, rows, heads, copies, chunk in (
        (TokenLayout(200, (2, 3)), 1, 1, 1, 1),
        (LAYOUT, 2, 3, 1, 4),
        (TokenLayout(40, (2, 3)), 18, 2, 9, 1),
        (LAYOUT, 6, 2, 3, 2),
    ):
        pattern = Row(layout)
        q, k, v = tokens(layout.length, rows, heads, groups)
        prompt = layout.text_length - 1
        for tensor in (k, v):
            tensor[:, :, :prompt] = tensor[::copies, :, :prompt].repeat_interleave(copies, 0)
        cache = KVCache(pattern, rows // copies, heads, 16, dtype=dtype, copies=copies)
        cache.prefill(*(tensor[::copies, :, :prompt] for tensor in (k, v)))
        for i in range(prompt, layout.length - chunk, chunk):
            got = decode_attention(*cut((q, k, v), i, i + chunk), cache, i, 0.25, backend=backend)
            wanted = truth((q, k, v), pattern, rounded=dtype == torch.int8)[:, :, i : i + chunk]
            assert_close(got, wanted, torch.float32)
        refused(
            cache,
            lambda: decode_attention(*(t[:, 1:, :1] for t in (q, k, v)), cache, 0),  # noqa: B023
            rf"[qk]: got shape \({rows}, {heads * groups - 1}|k: got shape",
        )


def test_the_bound_follows_from_the_weights() -> None:
    """Scores that move by at most e move weights by at most 2 tanh(e / 2) in sum, and two groups of keys reach it."""
    e = 0.7
    share = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    before = torch.stack([share, 1 - share])
    after = torch.softmax(before.log() + torch.tensor([[e], [-e]]), 0)
    moved = (after - before).abs().sum(0)
    assert moved.max() <= 2 * math.tanh(e / 2) <= e
    assert moved.max() > 1.99 * math.tanh(e / 2)
