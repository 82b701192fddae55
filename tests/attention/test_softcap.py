"""Soft caps at the doors: derivatives, compilation, export, autocast, decoding, and who refuses them."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch.library import opcheck

from dalle_kernels import (
    Causal,
    Column,
    Convolution,
    KVCache,
    Pattern,
    Row,
    TokenLayout,
    decode_attention,
    explain,
    sparse_attention,
)
from dalle_kernels.attention import cuda
from dalle_kernels.backends.contract import Call
from dalle_kernels.decode import cuda as decode_cuda
from tests.oracles import attention, every_pattern

LAYOUT = TokenLayout(5, (4, 6))
CAP = torch.tensor(0.8, dtype=torch.float64)


def inputs(dtype: torch.dtype = torch.float64, width: int = 16) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 3, LAYOUT.length, width, dtype=dtype, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("pattern", every_pattern(LAYOUT), ids=str)
def test_the_reference_agrees_with_the_oracle(pattern: Pattern) -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 3, pattern.length, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    padding = torch.rand(2, pattern.length) < 0.2
    out, lse = sparse_attention(q, k, v, pattern, 1.5, padding, return_lse=True, backend="reference", softcap=2.0)
    wanted, wanted_lse = attention(q, k, v, pattern.mask(), 1.5, padding, softcap=2.0)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)
    seen = lse.isfinite()
    grads = [torch.randn_like(q), torch.randn_like(lse) * seen]
    got = torch.autograd.grad([out, lse], [q, k, v], grads)
    want = torch.autograd.grad([wanted, wanted_lse.where(seen, 0)], [q, k, v], grads)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_gradcheck() -> None:
    q, k, v = (tensor[:1, :1, :, :3].detach().requires_grad_() for tensor in inputs())

    def both(*tensors: torch.Tensor) -> Any:
        return sparse_attention(*tensors, Row(LAYOUT), return_lse=True, softcap=0.9)

    assert torch.autograd.gradcheck(both, (q, k, v), check_forward_ad=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype)
    scale, spec = torch.tensor(0.2, dtype=torch.float64), Column(LAYOUT).spec
    arguments = (q, k, v, None, scale, spec, CAP, 0, "auto")
    opcheck(torch.ops.dalle_kernels.attention_forward.default, arguments)
    with torch.no_grad():
        out, lse = torch.ops.dalle_kernels.attention_forward(*arguments)
    kept = (
        out,
        lse,
        q.detach(),
        k.detach(),
        v.detach(),
        out,
        lse,
        None,
        scale,
        spec,
        CAP,
        0,
        [True, False, True],
        "auto",
    )
    opcheck(torch.ops.dalle_kernels.attention_backward.default, kept)


def test_one_graph_for_every_cap() -> None:
    tensors, graphs, pattern = inputs(torch.float32), 0, Row(LAYOUT)

    def counting(module: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    @torch.compile(fullgraph=True, backend=counting)
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softcap: float) -> torch.Tensor:
        return sparse_attention(2 * q, k, v, pattern, softcap=softcap)

    for softcap in (0.5, 3.0, 50.0, 7.0):
        got = attend(*tensors, softcap)
        q, k, v = tensors
        want = sparse_attention(2 * q, k, v, pattern, softcap=softcap)
        torch.testing.assert_close(got, want)
        for one, other in zip(*(torch.autograd.grad(out.sum(), tensors) for out in (got, want)), strict=True):
            torch.testing.assert_close(one, other)
    assert graphs <= 2  # the first number is a constant of its graph, those after it are not


def test_export_and_autocast() -> None:
    pattern = Row(LAYOUT)

    class Layer(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return sparse_attention(q, q, q, pattern, softcap=0.8)

    q = inputs(torch.float32)[0].detach()
    assert torch.equal(torch.export.export(Layer(), (q,)).module()(q), Layer()(q))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Layer()(q), Layer()(q.bfloat16()))


def test_grouped_heads_and_another_width() -> None:
    q, k, v = inputs()
    few, wide = k[:, :1], torch.cat([v, v], -1)[:, :1]
    got = sparse_attention(q, few, wide, Row(LAYOUT), softcap=0.8)
    want = attention(q, few, wide, Row(LAYOUT).mask(), softcap=0.8)[0]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copies", [1, 20])
@pytest.mark.parametrize("pattern", [Row(LAYOUT), Convolution(LAYOUT, 3), Causal(TokenLayout(300, (5, 40)))], ids=str)
def test_decoding(pattern: Pattern, copies: int, dtype: torch.dtype) -> None:
    """Tokens one by one and several at once, alone and of many copies that share their prompt."""
    torch.manual_seed(3)
    prompt = pattern.length - 6
    q, k, v = (torch.randn(2 * copies, 2, pattern.length, 16, dtype=dtype) for _ in range(3))
    for tensor in (k, v):
        tensor[:, :, :prompt] = tensor[::copies, :, :prompt].repeat_interleave(copies, 0)
    wanted = attention(*(t.double() for t in (q, k, v)), pattern.mask(), 0.9, softcap=2.0)[0][:, :, prompt:]
    cache = KVCache(pattern, 2, 2, 16, dtype=dtype, copies=copies)
    cache.prefill(*(tensor[::copies, :, :prompt] for tensor in (k, v)))
    outs = [
        decode_attention(*(t[:, :, i:j] for t in (q, k, v)), cache, i, 0.9, softcap=2.0)
        for i, j in [(prompt, prompt + 1), (prompt + 1, prompt + 3), (prompt + 3, pattern.length)]
    ]
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(torch.cat(outs, 2).double(), wanted, rtol=tolerance, atol=tolerance)
    assert (torch.cat(outs, 2) - sparse_attention(q, k, v, pattern, 0.9)[:, :, prompt:]).abs().max() > 0.05


def test_decoding_compiles_and_checks() -> None:
    pattern, q = Row(LAYOUT), inputs(torch.float32)[0].detach()
    cache = KVCache(pattern, 2, 3, 16)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(new: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return decode_attention(new, new, new, cache, position, softcap=0.8)

    with torch.no_grad():
        outs = [step(q[:, :, i : i + 1], torch.tensor(i)) for i in range(3)]
    torch.testing.assert_close(torch.cat(outs, 2), sparse_attention(q, q, q, pattern, softcap=0.8)[:, :, :3])
    with pytest.raises(ValueError, match=r"softcap: got 0\.0, wanted a number from 1e-20 to 1e20, or None"):
        decode_attention(q[:, :, :1], q[:, :, :1], q[:, :, :1], cache, 3, softcap=0.0)


@pytest.mark.parametrize("softcap", [0, -1.0, float("nan"), float("inf"), 1e21, "50", torch.tensor(50.0)])
def test_bad_caps_are_refused(softcap: Any) -> None:
    with pytest.raises(ValueError, match=r"softcap: got .*, wanted a number from 1e-20 to 1e20, or None"):
        sparse_attention(*inputs(), Row(LAYOUT), softcap=softcap)


def test_any_real_number_is_a_cap() -> None:
    tensors = inputs()
    want = sparse_attention(*tensors, Row(LAYOUT), softcap=2.0)
    assert torch.equal(sparse_attention(*tensors, Row(LAYOUT), softcap=2), want)
    assert torch.equal(sparse_attention(*tensors, Row(LAYOUT), softcap=Fraction(2)), want)


def test_cuda_refuses_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cuda, decode_cuda):
        monkeypatch.setattr(module.cuda_library, "refuse", lambda *_: None)
        call = Call(torch.device("cuda"), torch.bfloat16, 64, ("logit soft cap",))
        assert module.refuse(call) == "it has no logit soft cap"
    q = inputs(torch.float32)[0].detach()
    assert explain(sparse_attention, q, q, q, Row(LAYOUT), softcap=3.0).refusals["cuda"]
    with pytest.raises(ValueError, match="'cuda' cannot serve this sparse_attention call"):
        sparse_attention(q, q, q, Row(LAYOUT), softcap=3.0, backend="cuda")
