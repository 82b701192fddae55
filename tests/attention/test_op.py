"""The door to sparse attention: the reference against an independent oracle, derivatives, compilation, bad input."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

from dalle_kernels import Causal, Column, Convolution, MaskPattern, Pattern, Row, TokenLayout, explain, sparse_attention
from tests.oracles import attention, every_pattern

LAYOUT = TokenLayout(5, (4, 6))


def inputs(
    pattern: Pattern, batch: int = 2, heads: int = 3, width: int = 16, dtype=torch.float64
) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    torch.manual_seed(1)
    shape = (batch, heads, pattern.length, width)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("pattern", every_pattern(LAYOUT), ids=str)
def test_forward_and_gradients_agree_with_the_oracle(pattern: Pattern) -> None:
    q, k, v = inputs(pattern)
    padding = torch.rand(2, pattern.length) < 0.2
    grad_out, grad_lse = torch.randn_like(q), torch.randn_like(q[..., 0])
    out, lse = sparse_attention(q, k, v, pattern, 0.3, padding, return_lse=True, backend="reference")
    wanted, wanted_lse = attention(q, k, v, pattern.mask(), 0.3, padding)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)
    seen = lse.isfinite()  # the oracle's log-sum-exp of nothing has no useful derivative
    got = torch.autograd.grad([out, lse], [q, k, v], [grad_out, grad_lse * seen], retain_graph=True)
    want = torch.autograd.grad(
        [wanted, wanted_lse.where(seen, 0)], [q, k, v], [grad_out, grad_lse * seen], retain_graph=True
    )
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("pattern", [Row(LAYOUT), Convolution(LAYOUT, 3, "torus")], ids=str)
def test_gradcheck(pattern: Pattern) -> None:
    q, k, v = inputs(pattern, batch=1, heads=2, width=3)
    padding = torch.zeros(1, pattern.length, dtype=torch.bool)
    padding[0, 2] = True

    def both(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return sparse_attention(*tensors, pattern, key_padding_mask=padding, return_lse=True)

    assert torch.autograd.gradcheck(both, (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    pattern = Column(LAYOUT)
    q, k, v = inputs(pattern, dtype=dtype)
    padding = torch.zeros(2, pattern.length, dtype=torch.bool)
    scale = torch.tensor(0.2, dtype=torch.float64)
    for mask in (None, padding):
        opcheck(
            torch.ops.dalle_kernels.attention_forward.default, (q, k, v, mask, scale, pattern.spec, None, 0, "auto")
        )
    with torch.no_grad():
        out, lse = torch.ops.dalle_kernels.attention_forward(q, k, v, None, scale, pattern.spec, None, 0, "auto")
        arguments = (out, lse, q, k, v, out, lse, None, scale, pattern.spec, None, 0, [True, False, True], "auto")
    detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    opcheck(torch.ops.dalle_kernels.attention_backward.default, detached)


def test_torch_compile_makes_one_graph() -> None:
    pattern = Row(LAYOUT)
    tensors = inputs(pattern, dtype=torch.float32)

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sparse_attention(q * 2, k, v, pattern).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    got = torch.autograd.grad(compiled(*tensors), tensors)
    for one, other in zip(got, torch.autograd.grad(loss(*tensors), tensors), strict=True):
        torch.testing.assert_close(one, other)


def test_strides_and_aliases() -> None:
    pattern = Row(LAYOUT)
    fused = torch.randn(2, pattern.length, 3, 4, 16)  # [B, S, qkv, H, D], as one projection gives it
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    wanted = attention(q, k, v, pattern.mask())[0]
    torch.testing.assert_close(sparse_attention(q, k, v, pattern), wanted)
    wide = torch.randn(2, 4, 16, pattern.length).mT  # the last dimension is not contiguous
    torch.testing.assert_close(
        sparse_attention(wide, wide, wide, pattern), attention(wide, wide, wide, pattern.mask())[0]
    )
    alike = torch.randn(1, 2, pattern.length, 16, requires_grad=True)
    got = torch.autograd.grad(sparse_attention(alike, alike, alike, pattern).square().sum(), alike)
    want = torch.autograd.grad(attention(alike, alike, alike, pattern.mask())[0].square().sum(), alike)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_prefix_of_the_sequence() -> None:
    pattern = Convolution(LAYOUT, 5)
    q, k, v = (tensor[:, :, :-1] for tensor in inputs(pattern, dtype=torch.float32))
    wanted = attention(q, k, v, pattern.mask()[:-1, :-1])[0]
    torch.testing.assert_close(sparse_attention(q, k, v, pattern), wanted)


def test_autocast_casts_as_scaled_dot_product_attention_does() -> None:
    pattern = Causal(LAYOUT)
    q, k, v = inputs(pattern, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse_attention(q, k, v.to(torch.bfloat16), pattern)
        theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v.to(torch.bfloat16), is_causal=True)
    assert out.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(out, theirs, rtol=0.02, atol=0.02)
    (dq,) = torch.autograd.grad(out.float().sum(), q)
    assert dq.dtype == torch.float32


def test_a_query_without_keys() -> None:
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    mask[3] = False
    q, k, v = (torch.randn(1, 1, 8, 16, requires_grad=True) for _ in range(3))
    out, lse = sparse_attention(q, k, v, MaskPattern(mask), return_lse=True)
    assert not out[0, 0, 3].any()
    assert lse[0, 0, 3] == -torch.inf
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert not dq[0, 0, 3].any()
    assert dk.isfinite().all()
    assert dv.isfinite().all()


Q = torch.zeros(2, 3, LAYOUT.length, 16)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], Q, Q), {}, TypeError, "q: got list, wanted a torch.Tensor"),
        ((Q[0], Q, Q), {}, ValueError, r"q: got shape \(3, 29, 16\), wanted 4 dimensions"),
        ((Q.long(), Q, Q), {}, TypeError, "q: got torch.int64, wanted float16"),
        (
            (Q, Q[..., :8], Q),
            {},
            ValueError,
            r"k: got shape \(2, 3, 29, 8\), wanted \(2, G, 29, 16\), G a divisor of 3",
        ),
        ((Q, Q, Q[:, :, :-1]), {}, ValueError, r"v: got shape \(2, 3, 28, 16\)"),
        ((Q, Q, Q.double()), {}, TypeError, "v: got torch.float64, wanted torch.float32 as q has"),
        ((Q, Q.to("meta"), Q), {}, ValueError, "k: got a tensor on meta, wanted cpu"),
        ((Q.repeat(1, 1, 2, 1),) * 3, {}, ValueError, "q: got 58 tokens, wanted 1 to 29"),
        ((Q, Q, Q), {"pattern": "row"}, TypeError, "pattern: got str, wanted a Pattern"),
        ((Q, Q, Q), {"scale": float("nan")}, ValueError, "scale: got nan"),
        ((Q, Q, Q), {"key_padding_mask": torch.zeros(2, 3)}, ValueError, "key_padding_mask: got torch.float32"),
        ((Q, Q, Q), {"backend": "best"}, ValueError, "backend: got 'best', wanted 'auto' or one of"),
        ((Q, Q, Q), {"backend": "cuda"}, ValueError, "backend: 'cuda' cannot serve this sparse_attention call"),
    ],
)
def test_bad_input_is_refused(arguments, options, error, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        sparse_attention(*arguments, **{"pattern": Row(LAYOUT), **options})


def test_a_second_derivative_is_an_error() -> None:
    q = Q.clone().requires_grad_()
    out = sparse_attention(q, q, q, Row(LAYOUT))
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_forward: asked for a second derivative"):
        (out.sum() + gradient.square().sum()).backward()


def test_the_graph_keeps_its_mask_alive() -> None:
    q = torch.randn(1, 1, 5, 16, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    masks = (MaskPattern(torch.rand(5, 5, generator=generator) < 0.5) for _ in range(400))
    out = sparse_attention(q, q, q, next(masks))
    for mask in masks:  # more than any cache of ours remembers
        sparse_attention(q.detach(), q.detach(), q.detach(), mask)
    out.sum().backward()
    assert q.grad is not None


def test_explain_answers_for_the_call() -> None:
    float64 = explain(sparse_attention, Q.double(), Q.double(), Q.double(), Row(LAYOUT))
    assert float64.backend == "reference"
    assert set(float64.refusals) == {"cpu", "triton", "cuda"}
    assert str(float64).startswith("sparse_attention: reference\n")
    with pytest.raises(ValueError, match="function: got"):
        explain(print, Q)


LOADS = """
import sys
import torch
import dalle_kernels
q, out = torch.load(sys.argv[2])
torch.testing.assert_close(torch.export.load(sys.argv[1]).module()(q), out)
"""


def test_an_exported_mask_is_found_by_another_process(tmp_path: Path) -> None:
    torch.manual_seed(9)
    pattern = MaskPattern(torch.rand(12, 12) < 0.5)

    class Layer(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return sparse_attention(q, q, q, pattern)

    q = torch.randn(1, 2, 12, 16)
    torch.export.save(torch.export.export(Layer(), (q,)), tmp_path / "layer.pt2")
    torch.save((q, Layer()(q)), tmp_path / "tensors.pt")
    command = [sys.executable, "-c", LOADS, str(tmp_path / "layer.pt2"), str(tmp_path / "tensors.pt")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_mask_is_read_from_its_spec() -> None:
    for length in (1, 7, 16, 65):
        mask = torch.rand(length, length, generator=torch.Generator().manual_seed(length)) < 0.5
        spec = MaskPattern(mask).spec
        gc.collect()
        assert Pattern.parse(spec).mask().equal(mask)
    assert len(MaskPattern(Causal(TokenLayout()).mask()).spec) < 8192
