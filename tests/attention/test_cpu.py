"""The native CPU kernels against the float64 reference: every pattern, dtype and instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch

from dalle_kernels import sparse_attention
from dalle_kernels.attention import cpu, reference
from dalle_kernels.attention.contract import Grads, Inputs, Kept, Needs
from dalle_kernels.backends import native
from dalle_kernels.backends.contract import Call
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

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LAYOUT = TokenLayout(text_length=20, grid=(13, 9))
RANDOM = torch.rand(130, 130, generator=torch.Generator().manual_seed(1))
PATTERNS = [
    Row(LAYOUT),
    Column(LAYOUT),
    AxialRow(LAYOUT),
    Causal(LAYOUT),
    Convolution(LAYOUT, kernel_size=5),
    Convolution(LAYOUT, kernel_size=3, boundary="clamp"),
    Convolution(LAYOUT, kernel_size=5, boundary="torus"),
    Convolution(LAYOUT, kernel_size=3, boundary="corner", dilation=2),
    Strided(150, 12),
    Fixed(150, 16, 2),
    MaskPattern(RANDOM < 0.2),
    MaskPattern(RANDOM < 0.01),  # leaves rows and columns without a visible pair
]
LAYOUTS = [
    TokenLayout(0, (8, 9)),
    TokenLayout(1, (5, 1)),
    TokenLayout(3, (1, 70)),
    TokenLayout(64, (8, 8)),
    TokenLayout(130, (2, 3)),
]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_native_library_is_there() -> None:
    assert native.absence() is None


def tensors(
    pattern: Pattern, batch: int, heads: int, width: int, dtype: torch.dtype, length: int | None = None
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(width)
    shape = (batch, heads, length or pattern.length, width)
    q, k, v, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    grad_lse = torch.randn(shape[:3], generator=generator)
    return q, k, v, grad, grad_lse


def run(module, q, k, v, grad, grad_lse, padding, scale, pattern, softcap=None):
    """out, lse, dq, dk, dv."""
    out, lse = module.forward(Inputs(q, k, v, padding, scale, pattern, softcap))
    kept = Kept(q, k, v, out, lse, padding, scale, pattern, softcap)
    return out, lse, *module.backward(Grads(grad, grad_lse), kept, Needs(True, True, True))


def check(pattern, q, k, v, grad, grad_lse, padding=None, scale=None, softcap=None) -> None:
    """Every result within twice the error of plain PyTorch in the same dtype, plus rounding."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = [t.double() for t in (q, k, v, grad, grad_lse)]
    exact = run(reference, *wide, padding, scale, pattern, softcap)
    plain = run(reference, q, k, v, grad, grad_lse, padding, scale, pattern, softcap)
    ours = run(cpu, q, k, v, grad, grad_lse, padding, scale, pattern, softcap)
    largest_lse = exact[1].masked_fill(exact[1] == -torch.inf, 0).abs().max().item()
    if softcap is not None:  # a score is capped as exactly as float32 holds it
        largest_lse = max(largest_lse, (scale * wide[0] @ wide[1].mT).abs().max().item())
    for name, mine, theirs, true in zip(("out", "lse", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        assert mine.dtype == theirs.dtype, name
        assert mine.shape == theirs.shape, name
        none = true == -torch.inf
        assert torch.equal(mine == -torch.inf, none), name
        error = (mine.double() - true).masked_fill(none, 0).abs().max().item()
        allowed = (theirs.double() - true).masked_fill(none, 0).abs().max().item()
        # A few roundings of float32; or that of the weights to bfloat16, which the plain path does not do.
        # (Those weights come from a shorter polynomial, which the log-sum-exp shows.)
        # The backward has its weights from the log-sum-exp, as exactly as float32 holds that.
        rounding = torch.finfo(torch.float32).eps * max(4, largest_lse)
        if q.dtype == torch.bfloat16:
            rounding = 1e-5 if name == "lse" else torch.finfo(torch.bfloat16).eps / 2
        size = true.masked_fill(none, 0).abs().max().item()
        assert error <= 2 * allowed + rounding * max(size, 1.0), f"{name}: {error} against {allowed}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: type(p).__name__)
def test_patterns(isa: str, pattern: Pattern, dtype: torch.dtype) -> None:
    check(pattern, *tensors(pattern, 2, 2, 64, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 16, 24, 32, 40, 80, 96, 128, 200, 256])
def test_widths(isa: str, width: int, dtype: torch.dtype) -> None:
    check(PATTERNS[0], *tensors(PATTERNS[0], 1, 3, width, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.text_length}+{layout.grid}")
def test_layouts(isa: str, layout: TokenLayout, dtype: torch.dtype) -> None:
    for pattern in (Row(layout), Column(layout), Convolution(layout, 3)):
        check(pattern, *tensors(pattern, 3, 1, 32, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 19, 63, 64, 65, 136])
def test_prefixes(isa: str, length: int, dtype: torch.dtype) -> None:
    for pattern in (Row(LAYOUT), Column(LAYOUT)):
        check(pattern, *tensors(pattern, 1, 2, 16, dtype, length))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [2, 20])
def test_padding(isa: str, heads: int, dtype: torch.dtype) -> None:
    """Padding at random, none, over whole tiles, and over everything; text long enough for full tiles."""
    layout = TokenLayout(130, (9, 9))
    generator = torch.Generator().manual_seed(2)
    padding = torch.rand(4, layout.length, generator=generator) < 0.3
    padding[1] = False
    padding[2, :140] = True
    padding[3] = True
    for pattern in (Row(layout), Column(layout)):
        check(pattern, *tensors(pattern, 4, heads, 16, dtype), padding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.3, -0.2, 0.0])
def test_scale(isa: str, scale: float, dtype: torch.dtype) -> None:
    layout = TokenLayout(70, (9, 9))
    check(Row(layout), *tensors(Row(layout), 1, 2, 32, dtype), scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.5, 50.0, 1e20])
@pytest.mark.parametrize("scale", [None, -0.2, 0.0, 5.0])
def test_softcap(isa: str, scale: float | None, softcap: float, dtype: torch.dtype) -> None:
    """Full tiles, lists, and padding in both."""
    layout = TokenLayout(130, (9, 9))
    padding = torch.rand(2, layout.length, generator=torch.Generator().manual_seed(2)) < 0.3
    for pattern in (Row(layout), Column(layout)):
        inputs = tensors(pattern, 2, 1, 32, dtype)
        check(pattern, *inputs, scale=scale, softcap=softcap)
        check(pattern, *inputs, padding, scale, softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: type(p).__name__)
def test_softcap_of_every_pattern(isa: str, pattern: Pattern, dtype: torch.dtype) -> None:
    check(pattern, *tensors(pattern, 1, 2, 40, dtype), softcap=2.0)


def test_the_error_of_the_hyperbolic_tangent(isa: str) -> None:
    """A query that sees one key has its capped score for a log-sum-exp: tanh of float32s of every size."""
    alone = MaskPattern(torch.eye(4096, dtype=torch.bool))
    words = torch.arange(0x0080_0000, 0x7F80_0000, 0x7F00_0000 // (16 * 4096 - 1), dtype=torch.int32)[: 16 * 4096]
    x = torch.cat([words.view(torch.float32)[: 8 * 4096], torch.linspace(-12, 12, 8 * 4096)]).view(16, 1, 4096, 1)
    q, k = torch.nn.functional.pad(x, (0, 7)), torch.ones(16, 1, 4096, 8)
    _, lse = cpu.forward(Inputs(q, k, k, None, 1.0, alone, 1.0))
    exact = x[..., 0].double().tanh()
    assert ((lse - exact).abs() <= 2.6e-7 * exact.abs()).all()
    assert lse[exact == 0].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores(isa: str, dtype: torch.dtype) -> None:
    """Scores in the hundreds: a softmax that forgot its maximum would overflow."""
    q, k, v, grad, grad_lse = tensors(PATTERNS[0], 1, 2, 32, dtype)
    check(PATTERNS[0], q * 20, k * 20, v, grad, grad_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(isa: str, dtype: torch.dtype) -> None:
    """Transposed, sliced, shared and expanded inputs give what contiguous ones do."""
    pattern, width = PATTERNS[1], 40
    length = pattern.length
    packed = torch.randn(2, length, 3, 3, width + 3).to(dtype)[..., 1 : width + 1]
    q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
    grad = torch.randn(1, 1, length, width).to(dtype).expand(2, 3, -1, -1)
    check(pattern, q, k, v, grad, torch.randn(2, 3, length))
    check(pattern, q, q, q, grad, torch.randn(2, 3, length))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 3, 17])
def test_bits_do_not_depend_on_threads(isa: str, threads: None, heads: int, dtype: torch.dtype) -> None:
    layout = TokenLayout(200, (12, 12))
    for pattern in (Row(layout), Column(layout)):
        inputs = tensors(pattern, 1, heads, 32, dtype)
        results = []
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(run(cpu, *inputs, None, 0.2, pattern))
        for other in results[1:]:
            for first, second in zip(results[0], other, strict=True):
                assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def test_no_gradient_of_the_log_sum_exp(isa: str) -> None:
    q, k, v, grad, _ = tensors(PATTERNS[0], 1, 2, 32, torch.float32)
    out, lse = cpu.forward(Inputs(q, k, v, None, 0.2, PATTERNS[0]))
    without = cpu.backward(Grads(grad, None), Kept(q, k, v, out, lse, None, 0.2, PATTERNS[0]), Needs(True, True, True))
    zero = cpu.backward(
        Grads(grad, torch.zeros_like(lse)), Kept(q, k, v, out, lse, None, 0.2, PATTERNS[0]), Needs(True, True, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(without, zero, strict=True))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("width", [32, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_nobody_asked_for_are_not_made(
    isa: str, dtype: torch.dtype, width: int, softcap: float | None
) -> None:
    """Those asked for have the bits they have among all; v's, which needs neither v nor out, looks at neither."""
    pattern = PATTERNS[0]
    q, k, v, grad, grad_lse = tensors(pattern, 1, 2, width, dtype)
    padding = torch.arange(pattern.length)[None] % 7 == 2
    out, lse, *every = run(cpu, q, k, v, grad, grad_lse, padding, 0.3, pattern, softcap)
    for needs in map(Needs._make, product((True, False), repeat=3)):
        blind = needs == (False, False, True)
        seen = [torch.full_like(t, torch.nan) if blind else t for t in (v, out)]
        kept = Kept(q, k, *seen, lse, padding, 0.3, pattern, softcap)
        for gradient, whole, need in zip(cpu.backward(Grads(grad, grad_lse), kept, needs), every, needs, strict=True):
            assert (gradient is not None) == need
            if gradient is not None:
                assert torch.equal(gradient.view(torch.uint8), whole.view(torch.uint8))


@pytest.mark.parametrize("frozen", ["q", "k", "v", "qk"])
def test_what_is_frozen_is_not_asked_for(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Needs] = []
    backward = cpu.backward
    monkeypatch.setattr(cpu, "backward", lambda grads, kept, needs: asked.append(needs) or backward(grads, kept, needs))
    inputs = [
        t.requires_grad_(name not in frozen)
        for name, t in zip("qkv", tensors(PATTERNS[0], 1, 1, 16, torch.float32)[:3], strict=True)
    ]
    sparse_attention(*inputs, PATTERNS[0]).sum().backward()
    assert asked == [tuple(name not in frozen for name in "qkv")]
    assert all((t.grad is None) == (name in frozen) for name, t in zip("qkv", inputs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [300.0, 3e3, 1e5, 1e8])
def test_huge_scores(isa: str, size: float, dtype: torch.dtype) -> None:
    """Scores whose rounding is far more than 1: the forward keeps their differences, and no gradient explodes."""
    pattern = Causal(TokenLayout(16, (8, 8)))
    q, k, v, grad, _ = tensors(pattern, 1, 2, 128, dtype)
    q, k = (t * size for t in (q, k))
    scale = 128**-0.5
    out, lse = cpu.forward(Inputs(q, k, v, None, scale, pattern))
    want_out, want_lse = reference.forward(Inputs(q.double(), k.double(), v.double(), None, scale, pattern))
    torch.testing.assert_close(out.double(), want_out, rtol=1e-2, atol=1e-5)
    # What a sum of 128 products in float32 can lose.
    terms = (q.double().abs() @ k.double().abs().mT).amax(-1) * scale
    assert ((lse - want_lse).abs() <= 128 * torch.finfo(torch.float32).eps * terms).all()
    for name, gradient in zip(
        "qkv",
        cpu.backward(Grads(grad, None), Kept(q, k, v, out, lse, None, scale, pattern), Needs(True, True, True)),
        strict=True,
    ):
        bound = grad.double().abs().sum(-2).max() * (1 if name == "v" else 4 * 128 * size * v.double().abs().max())
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() <= bound, name


def test_nan_reaches_every_result_of_the_rows_that_see_it(isa: str) -> None:
    pattern = Causal(LAYOUT)
    q, k, v, *_ = tensors(pattern, 1, 1, 32, torch.float32)
    q[0, 0, 3], k[0, 0, -2] = torch.nan, torch.nan
    out, lse = cpu.forward(Inputs(q, k, v, None, 0.2, pattern))
    touched = torch.zeros(pattern.length, dtype=torch.bool)
    touched[[3, -2, -1]] = True
    assert torch.equal(lse[0, 0].isnan(), touched)
    assert torch.equal(out[0, 0].isnan().all(-1), touched)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (Call(torch.device("cpu"), torch.float64, 64), "float64"),
        (Call(torch.device("cpu"), torch.float32, 264), "256"),
        (Call(torch.device("meta"), torch.float32, 64), "meta"),
    ],
)
def test_refusals_say_why(call: Call, word: str) -> None:
    assert word in (cpu.refuse(call) or "")
