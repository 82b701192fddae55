"""Every competitor computes what we compute: on a small case its answer and gradients equal ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.competitors.adapter import Lookup, Problem
from benchmarks.competitors.attention import Attention, attention_competitors, mask_mod
from benchmarks.competitors.codebook import (
    gumbel_competitors,
    laplace_competitors,
    vq_best_competitors,
    vq_competitors,
)
from benchmarks.competitors.cross_entropy import linear_cross_entropies
from benchmarks.competitors.decode import Decode, decode_competitors
from benchmarks.competitors.sampling import sampling_competitors
from benchmarks.harness import UnavailableError
from benchmarks.suites import neighborhood
from benchmarks.suites.attention import dense_attention
from dalle_kernels import (
    AxialRow,
    Causal,
    Column,
    Convolution,
    KVCache,
    Pattern,
    Row,
    TokenLayout,
    decode_attention,
    gumbel_lookup,
    logit_laplace_nll,
    sample_tokens,
    sparse_attention,
    vq_lookup,
)
from dalle_kernels.noise import GUMBEL_STREAM, SAMPLING_STREAM, VQ_STREAM, gumbel_noise

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
LAYOUT = TokenLayout(64, (16, 16))
PATTERNS = [
    Row(LAYOUT),
    Column(LAYOUT),
    AxialRow(LAYOUT),
    Causal(LAYOUT),
    Convolution(LAYOUT, 3),
    Convolution(LAYOUT, 3, "clamp"),
    Convolution(LAYOUT, 3, "corner"),
]


def made(make: Callable[[], object]) -> object:
    """What `make` gives; a skip that names the reason where the competitor cannot run."""
    try:
        return make()
    except UnavailableError as reason:
        pytest.skip(str(reason))


def by_name(found: list) -> dict:  # type: ignore[type-arg]
    return {"argvalues": found, "ids": [entry.name for entry in found]}


# Compiling takes seconds each, so the compiled ones see the two patterns that differ most.
CASES = [
    (competitor, pattern)
    for competitor in attention_competitors()
    for pattern in (PATTERNS if "Flex" not in competitor.name else PATTERNS[1:2])
    if not competitor.dense or pattern == PATTERNS[0]
]


@pytest.mark.parametrize(("competitor", "pattern"), CASES, ids=lambda value: getattr(value, "name", str(value)))
def test_attention(competitor: Attention, pattern: Pattern) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if "FlashAttention" in competitor.name else torch.float32
    problem = Problem(pattern, 2, 2, 32, dtype, DEVICE)
    function = made(lambda: competitor.make(problem)).function  # type: ignore[attr-defined]
    q, k, v, grad = (torch.randn(2, 2, pattern.length, 32, device=DEVICE, dtype=dtype) for _ in range(4))
    answers = competitor.answers(pattern)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    with torch.no_grad():
        torch.testing.assert_close(function(q, k, v), sparse_attention(q, k, v, answers), **close)
    try:
        with_gradient = competitor.make(Problem(pattern, 2, 2, 32, dtype, DEVICE, backward=True)).function
    except UnavailableError:
        return  # a competitor without a backward pass
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    got = torch.autograd.grad(with_gradient(*leaves), leaves, grad)
    wanted = torch.autograd.grad(sparse_attention(*leaves, answers), leaves, grad)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("permuted", [False, True])
def test_mask_mod_is_the_pattern(pattern: Pattern, permuted: bool) -> None:
    order = None
    if permuted:
        cells = torch.arange(256).reshape(16, 16)
        order = torch.cat([torch.arange(64), 64 + cells.T.flatten()])
    index = torch.arange(pattern.length)
    rule = mask_mod(pattern, torch.device("cpu"), order)
    none = torch.zeros((), dtype=torch.int64)
    got = rule(none, none, index[:, None], index[None, :])
    wanted = pattern.mask() if order is None else pattern.mask()[order][:, order]
    assert torch.equal(got, wanted)


def test_the_benchmark_s_own_dense_attention() -> None:
    torch.manual_seed(0)
    pattern = PATTERNS[4]
    tensors = [torch.randn(pattern.length, 16, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    *leaves, grad = tensors
    out = sparse_attention(*(tensor[None, None] for tensor in leaves), pattern, backend="reference")
    wanted = torch.autograd.grad(out, leaves, grad[None, None])
    detached = [tensor.detach() for tensor in tensors]
    torch.testing.assert_close(dense_attention(detached, pattern, False, chunk=100)[0], out[0, 0].detach())
    for one, other in zip(dense_attention(detached, pattern, True, chunk=100), wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("competitor", **by_name(decode_competitors()))
def test_decode(competitor: Decode) -> None:
    torch.manual_seed(0)
    pattern = Causal(LAYOUT) if competitor.dense else Row(LAYOUT)
    problem, last = Problem(pattern, 2, 2, 32, torch.float32, DEVICE), pattern.length - 1
    function = made(lambda: competitor.make(problem, last)).function  # type: ignore[attr-defined]
    keys, values = (torch.randn(2, 2, pattern.length, 32, device=DEVICE) for _ in range(2))
    q, k, v = (torch.randn(2, 2, 1, 32, device=DEVICE) for _ in range(3))
    cache = KVCache(pattern, 2, 2, 32, device=DEVICE)
    cache.prefill(keys[:, :, :last], values[:, :, :last])
    wanted = decode_attention(q, k, v, cache, last)
    with torch.no_grad():
        torch.testing.assert_close(function(q, k, v, keys, values), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("competitor", **by_name(gumbel_competitors()))
def test_gumbel(competitor: Lookup, hard: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(24, 64, device=DEVICE, requires_grad=True)
    codebook = torch.randn(64, 16, device=DEVICE, requires_grad=True)
    grads = [torch.randn(24, 16, device=DEVICE), torch.randn(24, device=DEVICE)]
    noise = gumbel_noise(torch.tensor(5, device=DEVICE), 24, 64, GUMBEL_STREAM)
    got = competitor.make().function(logits, codebook, 0.7, hard, noise)
    wanted = gumbel_lookup(logits, codebook, 0.7, hard, seed=5)
    assert torch.equal(got[1], wanted[1])
    for one, other in ((got[0], wanted[0]), (got[2], wanted[2])):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad([got[0], got[2]], [logits, codebook], grads),
        torch.autograd.grad([wanted[0], wanted[2]], [logits, codebook], grads),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("competitor", gumbel_competitors()[::2], ids=["exponential", "uniform"])
def test_gumbel_competitors_draw_gumbel_noise(competitor: Lookup) -> None:
    torch.manual_seed(0)
    logits = torch.zeros(512, 8, device=DEVICE)
    logits[:, 0] = 1.0
    _, indices, _ = competitor.make().function(logits, torch.eye(8, device=DEVICE), 1.0, False)
    share = (indices == 0).double().mean().item()
    wanted = torch.softmax(logits[0], 0)[0].item()
    assert abs(share - wanted) < 5 * (wanted * (1 - wanted) / 512) ** 0.5


@pytest.mark.parametrize("competitor", **by_name(vq_competitors()))
def test_vq(competitor: Lookup) -> None:
    torch.manual_seed(0)
    features = torch.randn(40, 16, device=DEVICE, requires_grad=True)
    codebook = torch.randn(32, 16, device=DEVICE, requires_grad=True)
    grads = [torch.randn(40, 16, device=DEVICE), torch.randn(40, device=DEVICE)]
    got, wanted = competitor.make().function(features, codebook), vq_lookup(features, codebook)
    assert torch.equal(got[1], wanted[1])
    torch.testing.assert_close(got[0], wanted[0])
    torch.testing.assert_close(got[2], wanted[2], rtol=1e-4, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad([got[0], got[2]], [features, codebook], grads),
        torch.autograd.grad([wanted[0], wanted[2]], [features, codebook], grads),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [None, 0.9])
@pytest.mark.parametrize("competitor", **by_name(vq_best_competitors()))
def test_vq_best(competitor: Lookup, temperature: float | None) -> None:
    torch.manual_seed(0)
    features, codebook = torch.randn(40, 16, device=DEVICE), torch.randn(32, 16, device=DEVICE)
    noise = None if temperature is None else gumbel_noise(torch.tensor(5, device=DEVICE), 40, 32, VQ_STREAM)
    for k in (1, 3):
        got = competitor.make().function(features, codebook, k, temperature, noise)
        assert torch.equal(got, vq_lookup(features, codebook, k=k, temperature=temperature, seed=5)[1])


@pytest.mark.parametrize("competitor", **by_name(laplace_competitors()))
def test_laplace(competitor: Lookup) -> None:
    torch.manual_seed(0)
    pixels = torch.rand(100, device=DEVICE) * 0.8 + 0.1
    mu, log_b = torch.randn(2, 100, device=DEVICE)
    got = competitor.make().function(pixels, mu, log_b)
    torch.testing.assert_close(got, logit_laplace_nll(pixels, mu, log_b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (7, None), (None, 0.6), (20, 0.8)])
@pytest.mark.parametrize("competitor", **by_name(sampling_competitors()))
def test_sampling(competitor: Lookup, top_k: int | None, top_p: float | None, guided: bool) -> None:
    if "compiled" in competitor.name and not (guided and top_k == 20):
        pytest.skip("one compilation shows it")
    torch.manual_seed(0)
    logits, unconditional = 3 * torch.randn(2, 64, 50, device=DEVICE)
    scale = 2.0 if guided else 1.0
    noise = gumbel_noise(torch.tensor(3, device=DEVICE), 64, 50, SAMPLING_STREAM)
    function = competitor.make().function
    got = function(logits, unconditional if guided else None, scale, 0.8, top_k, top_p, noise)
    wanted = sample_tokens(logits, 0.8, top_k, top_p, 3, unconditional if guided else None, scale)
    assert torch.equal(got, wanted)
    drawn = function(logits, unconditional if guided else None, scale, 0.8, 1, None)  # its own draw, of one candidate
    assert torch.equal(drawn, sample_tokens(logits, 0.8, 1, None, 3, unconditional if guided else None, scale))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="they need a GPU")
@pytest.mark.parametrize("loss", **by_name(linear_cross_entropies()))
def test_linear_cross_entropy(loss: Lookup) -> None:
    torch.manual_seed(0)
    function = made(loss.make).function  # type: ignore[attr-defined]
    hidden: Tensor = torch.randn(256, 128, device=DEVICE, dtype=torch.bfloat16)
    weight: Tensor = torch.randn(512, 128, device=DEVICE, dtype=torch.bfloat16) * 0.1
    bias, targets = torch.randn(512, device=DEVICE, dtype=torch.bfloat16), torch.randint(512, (256,), device=DEVICE)
    wanted = torch.nn.functional.cross_entropy((hidden.double() @ weight.double().T + bias.double()), targets)
    torch.testing.assert_close(function(hidden, weight, bias, targets).double(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backward", [False, True])
def test_neighborhoods_agree(backward: bool) -> None:
    cell = neighborhood.cell(torch.device("cpu"), (9, 10), (3, 5), 2, 16, torch.float32, backward)
    ran = []
    for contender in cell.contenders():
        try:
            ready = contender.prepare()
        except UnavailableError:
            continue
        assert ready.verify().passed, contender.name
        ran.append(contender.name)
    assert {"dalle_kernels", "SDPA mask", "SDPA dense", "einsum over gathered windows"} <= set(ran)
    assert ("FlexAttention, blocks of cells" in ran) is not backward
