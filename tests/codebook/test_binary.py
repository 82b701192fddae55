"""Binary codes against the softmax over the whole codebook, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dalle_kernels.codebook.binary import binary_entropy, binary_latents, binary_quantize


def codebook(bits: int, scale: float) -> torch.Tensor:
    """[2^bits, bits], in the order of the indices."""
    return torch.tensor(list(itertools.product((-scale, scale), repeat=bits)), dtype=torch.float64)


def dense(features: torch.Tensor, scale: float, temperature: float) -> tuple[torch.Tensor, ...]:
    codes = codebook(features.shape[-1], scale)
    log_p = (-torch.cdist(features, codes).square() / temperature).log_softmax(-1)
    mean = log_p.exp().mean(0)
    return -(log_p.exp() * log_p).sum(-1).mean(), -torch.xlogy(mean, mean).sum(), mean


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (0.3, 0.05), (8**-0.5, 10.0)])
def test_entropies_and_their_gradients(bits: int, scale: float, temperature: float) -> None:
    torch.manual_seed(0)
    features = torch.randn(13, bits, dtype=torch.float64, requires_grad=True)
    got, wanted = binary_entropy(features, scale, temperature), dense(features, scale, temperature)
    weights = torch.randn(2**bits, dtype=torch.float64)
    for results in (got, wanted):
        assert len(results) == 3
    for result, true in zip(got, wanted, strict=True):
        torch.testing.assert_close(result, true, rtol=1e-10, atol=1e-12)
    for result, true in zip(got, wanted, strict=True):
        grads = [
            torch.autograd.grad((x * weights).sum() if x.dim() else x, features, retain_graph=True)[0]
            for x in (result, true)
        ]
        torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-12)


def test_float32_keeps_its_precision_with_large_scores() -> None:
    torch.manual_seed(1)
    features = 30 * torch.randn(200, 10)
    got, wanted = binary_entropy(features), dense(features.double(), 1.0, 1.0)
    torch.testing.assert_close(got.rows.double(), wanted[0], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(got.mean.double(), wanted[1], rtol=1e-5, atol=1e-9)


def test_a_uniform_codebook_of_2_to_the_20_has_its_gradient() -> None:
    """Each code's share is 2^-20: a floor of 1e-5 under the logarithm, as is in use, would leave no gradient."""
    torch.manual_seed(2)
    features = (0.01 * torch.randn(64, 20)).requires_grad_()
    result = binary_entropy(features)
    assert result.mean.item() == pytest.approx(20 * math.log(2), rel=1e-3)
    (gradient,) = torch.autograd.grad(result.mean, features)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_probabilities_that_underflow_leave_finite_gradients() -> None:
    features = torch.full((3, 20), 200.0).requires_grad_()
    (gradient,) = torch.autograd.grad(sum(binary_entropy(features)[:2]), features)
    assert gradient.isfinite().all()


def test_autocast_leaves_the_entropies_in_float32() -> None:
    features = torch.randn(50, 9)
    with torch.autocast("cpu", torch.bfloat16):
        got = binary_entropy(features, 0.5, 2.0)
    for one, other in zip(got, binary_entropy(features, 0.5, 2.0), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_masked_rows_do_not_count() -> None:
    torch.manual_seed(3)
    features = torch.randn(2, 7, 6)
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    for got, wanted in zip(binary_entropy(features, row_mask=mask), binary_entropy(features[mask]), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_nearest_code(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    features = torch.randn(3, 5, 7).to(dtype).requires_grad_()
    latents, indices = binary_quantize(features, 0.5)
    assert torch.equal(indices, torch.cdist(features.double().reshape(-1, 7), codebook(7, 0.5)).argmin(-1).view(3, 5))
    assert torch.equal(latents.double(), codebook(7, 0.5)[indices])
    assert torch.equal(binary_latents(indices, 7, 0.5), latents.float())
    grad = torch.randn_like(latents)
    assert torch.equal(torch.autograd.grad(latents, features, grad)[0], grad)


@pytest.mark.parametrize("function", [binary_quantize, binary_entropy])
def test_nan_is_refused_with_its_row(function: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> None:
    features = torch.randn(2, 3, 4)
    wanted = function(features)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    torch.testing.assert_close(tuple(compiled(features)), tuple(wanted))
    features[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="features: row 5 holds NaN, wanted numbers"):
        function(features)
    assert compiled(features)[0].isnan().any()


def test_without_numbers_to_look_at() -> None:
    with FakeTensorMode():
        features, indices = torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
        assert binary_quantize(features)[1].shape == (2, 3)
        assert binary_entropy(features).distribution.shape == (16,)
        assert binary_latents(indices, 4).shape == (2, 3, 4)
    compiled = torch.compile(binary_latents, backend="eager", fullgraph=True)
    assert compiled(torch.tensor([5]), 3).tolist() == [[1.0, -1.0, 1.0]]


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="1 to 20 bits"):
        binary_entropy(torch.randn(3, 21))
    with pytest.raises(ValueError, match="1 to 62 bits"):
        binary_quantize(torch.randn(3, 0))
    with pytest.raises(ValueError, match="no row"):
        binary_entropy(torch.randn(0, 4))
    with pytest.raises(ValueError, match="row_mask"):
        binary_entropy(torch.randn(3, 4), row_mask=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="scale: got 0"):
        binary_quantize(torch.randn(3, 4), 0)
    with pytest.raises(ValueError, match="temperature"):
        binary_entropy(torch.randn(3, 4), temperature=-1)
    with pytest.raises(TypeError, match="indices: got list, wanted"):
        binary_latents([5], 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bits: got 3\.5, wanted an int"):
        binary_latents(torch.tensor([5]), 3.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="indices: got 3 to 8"):
        binary_latents(torch.tensor([3, 8]), 3)
    with pytest.raises(TypeError, match="indices"):
        binary_latents(torch.tensor([3.0]), 3)
