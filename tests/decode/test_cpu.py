"""Native decoding on the CPU against the float64 reference, position by position, through a rolling cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dalle_kernels.attention import reference as attention
from dalle_kernels.attention.contract import Inputs
from dalle_kernels.backends.contract import Call
from dalle_kernels.decode import cpu
from dalle_kernels.decode.cache import KVCache
from dalle_kernels.decode.contract import Inputs as Step
from dalle_kernels.patterns.layout import TokenLayout
from dalle_kernels.patterns.patterns import (
    AxialRow,
    Causal,
    Column,
    Convolution,
    Fixed,
    MaskPattern,
    Pattern,
    Row,
    Strided,
)

LAYOUT = TokenLayout(text_length=20, grid=(7, 9))
PATTERNS = [
    Row(LAYOUT),
    Column(LAYOUT),
    AxialRow(LAYOUT),
    Causal(LAYOUT),
    Convolution(LAYOUT, kernel_size=5),
    Convolution(LAYOUT, kernel_size=3, boundary="corner", dilation=2),
    Row(TokenLayout(0, (1, 40))),
    Strided(60, 7),
    Fixed(60, 8, 2),
    MaskPattern(torch.rand(50, 50, generator=torch.Generator().manual_seed(1)).tril() > 0.7),  # some see no key
]


def decode(
    pattern: Pattern, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, start: int
) -> torch.Tensor:
    """Every position from `start` on in turn, in a cache of NaN: a slot that is read before it is written shows."""
    batch, heads, length, width = q.shape
    cache = KVCache(pattern, batch, heads, width, dtype=q.dtype)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    cache.prefill(k[:, :, :start], v[:, :, :start])
    outs = []
    for i in range(start, length):
        new = (t[:, :, i : i + 1] for t in (q, k, v))
        outs.append(cpu.forward(cache.inputs(*new, i, scale)).out)
    return torch.cat(outs, 2)


def check(
    pattern: Pattern,
    batch: int,
    heads: int,
    width: int,
    dtype: torch.dtype,
    scale: float = 0.3,
    start: int = 0,
) -> None:
    generator = torch.Generator().manual_seed(width)
    shape = (batch, heads, pattern.length, width)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    exact, _ = attention.forward(Inputs(q.double(), k.double(), v.double(), None, scale, pattern))
    plain, _ = attention.forward(Inputs(q, k, v, None, scale, pattern))
    ours = decode(pattern, q, k, v, scale, start)
    exact, plain = exact[:, :, start:], plain[:, :, start:]
    assert ours.dtype == dtype
    error, allowed = ((x.double() - exact).abs().max().item() for x in (ours, plain))
    assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * exact.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: type(p).__name__)
def test_patterns(isa: str, pattern: Pattern, dtype: torch.dtype) -> None:
    check(pattern, 2, 2, 64, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 5, 8, 16, 20, 24, 32, 33, 40, 80, 96, 100, 128, 250, 256])
def test_widths(isa: str, width: int, dtype: torch.dtype) -> None:
    check(PATTERNS[4], 1, 3, width, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_keys_and_few_heads(isa: str, dtype: torch.dtype) -> None:
    """Enough keys that one head is cut into parts, and more than a block of them."""
    check(Causal(TokenLayout(300, (10, 40))), 1, 1, 16, dtype, start=690)
    check(Causal(TokenLayout(10, (10, 40))), 4, 5, 8, dtype, scale=20.0, start=400)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 40])
def test_bits_do_not_depend_on_threads(isa: str, heads: int, dtype: torch.dtype) -> None:
    pattern, before = Causal(TokenLayout(300, (6, 40))), torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(pattern, 1, heads, 32, dtype=dtype)
    cache.keys.copy_(torch.randn(cache.keys.shape, generator=generator))
    cache.values.copy_(torch.randn(cache.keys.shape, generator=generator))
    q, k, v = (torch.randn(1, heads, 1, 32, generator=generator).to(dtype) for _ in range(3))
    outs = []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            outs.append(cpu.forward(cache.inputs(q, k, v, 539, 0.2)).out)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def shared(
    pattern: Pattern,
    prompts: int,
    copies: int,
    heads: int,
    width: int,
    prompt: int,
    dtype: torch.dtype,
    **options: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tokens after a shared prompt: ours, in float64, and plain PyTorch's in `dtype`; [B, H, S - prompt, D]."""
    scale, chunk = options.get("scale", 0.3), int(options.get("chunk", 1))
    generator = torch.Generator().manual_seed(width + copies)
    shape = (prompts * copies, heads, pattern.length, width)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    for tensor in (k, v):
        tensor[:, :, :prompt] = tensor[::copies, :, :prompt].repeat_interleave(copies, 0)
    exact, _ = attention.forward(Inputs(q.double(), k.double(), v.double(), None, scale, pattern))
    plain, _ = attention.forward(Inputs(q, k, v, None, scale, pattern))
    cache = KVCache(pattern, prompts, heads, width, dtype=dtype, copies=copies)
    cache.prefill(k[::copies, :, :prompt], v[::copies, :, :prompt])
    outs = []
    for first in range(prompt, pattern.length, chunk):
        new = (t[:, :, first : first + chunk] for t in (q, k, v))
        outs.append(cpu.forward(cache.inputs(*new, torch.tensor(first), scale)).out)
    return torch.cat(outs, 2), exact[:, :, prompt:], plain[:, :, prompt:]


def check_shared(*arguments: Any, **options: float) -> None:
    ours, exact, plain = shared(*arguments, **options)
    error, allowed = ((x.double() - exact).abs().max().item() for x in (ours, plain))
    assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * exact.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copies", [2, 8, 15, 16, 17, 33, 64, 71, 136])
def test_as_many_copies_as_fill_products_and_more(isa: str, copies: int, dtype: torch.dtype) -> None:
    """Odd numbers of keys, several blocks of them, products of 16, 32 and 64 queries and what is left of them."""
    check_shared(Row(TokenLayout(197, (2, 3))), 2, copies, 1, 64, 197, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 8, 16, 20, 24, 40, 57, 96, 128, 250, 256])
def test_widths_of_shared_prompts(isa: str, width: int, dtype: torch.dtype) -> None:
    check_shared(Row(TokenLayout(71, (2, 3))), 1, 20, 2, width, 73, dtype, scale=1.7)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("pattern", PATTERNS[:-1], ids=lambda p: type(p).__name__)
def test_patterns_of_shared_prompts(isa: str, pattern: Pattern, chunk: int) -> None:
    check_shared(pattern, 2, 9, 2, 16, pattern.length // 2, torch.float32, chunk=chunk)


def test_shared_prompts_of_few_heads_are_cut(isa: str) -> None:
    check_shared(Causal(TokenLayout(700, (1, 3))), 1, 12, 1, 16, 700, torch.float32)


def test_bits_of_shared_prompts_do_not_depend_on_threads(isa: str) -> None:
    before, outs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            outs.append(shared(Row(TokenLayout(300, (2, 3))), 1, 70, 3, 32, 300, torch.float32)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_nan_in_a_shared_prompt_reaches_the_queries_that_see_it(isa: str) -> None:
    pattern, copies = Row(TokenLayout(90, (2, 3))), 20
    for place, tensor in ((70, 0), (71, 1)):
        cache = KVCache(pattern, 2, 1, 16, copies=copies)
        kv = torch.randn(2, 2, 1, 90, 16)
        kv[tensor, 1, 0, place, 3] = torch.nan
        cache.prefill(*kv)
        new = torch.randn(3, 2 * copies, 1, 1, 16)
        out = cpu.forward(cache.inputs(*new, 90, 0.2)).out
        assert out[:copies].isfinite().all()
        assert out[copies:].isnan().any(-1).all()


def test_strides(isa: str) -> None:
    """Projections come as [B, 1, 3, H, D]; a cache may be a part of a larger tensor."""
    pattern, batch, heads, width = PATTERNS[0], 2, 3, 24
    whole = torch.zeros(2, batch, 40, heads, width + 8)
    keys, values = (t.transpose(1, 2)[..., :width] for t in whole)
    packed = torch.randn(batch, 1, 3, heads, width)
    q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
    out = cpu.forward(Step(q, k, v, keys, values, 0, pattern, 0.2)).out
    torch.testing.assert_close(out, v, rtol=0, atol=1e-6)
    assert torch.equal(whole[0, :, 0, :, :width], k[:, :, 0])
    assert torch.equal(whole[1, :, 0, :, :width], v[:, :, 0])
    assert not whole[:, :, 1:].any()
    assert not whole[..., width:].any()


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (Call(torch.device("cpu"), torch.float16, 64), "float16"),
        (Call(torch.device("cpu"), torch.float32, 264), "up to 256, not 264"),
        (Call(torch.device("meta"), torch.float32, 64), "meta"),
    ],
)
def test_refusals_say_why(call: Call, word: str) -> None:
    assert word in (cpu.refuse(call) or "")
