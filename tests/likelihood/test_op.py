"""The logit-Laplace likelihood against its density, its derivatives, compilation, bad input."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.library import opcheck

from dalle_kernels import logit_laplace_nll
from dalle_kernels.backends import native
from dalle_kernels.likelihood.contract import Grads, Kept, Needs


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    mu, log_b = (torch.randn(2, 3, 5, dtype=dtype, requires_grad=True) for _ in range(2))
    return torch.rand(2, 3, 5, dtype=dtype) * 0.8 + 0.1, mu, log_b


def test_it_is_the_density_of_the_paper() -> None:
    x, mu, log_b = inputs()
    density = (-(x.logit() - mu).abs() / log_b.exp()).exp() / (2 * log_b.exp() * x * (1 - x))
    torch.testing.assert_close(logit_laplace_nll(x, mu, log_b), -density.log())


def test_the_density_integrates_to_one() -> None:
    x = torch.linspace(0, 1, 200_002, dtype=torch.float64)[1:-1]
    nll = logit_laplace_nll(x, torch.full_like(x, 0.3), torch.full_like(x, -0.5))
    assert abs(float((-nll).exp().mean()) - 1) < 1e-4


def test_gradcheck_and_opcheck() -> None:
    x, mu, log_b = inputs()
    assert torch.autograd.gradcheck(lambda m, b: logit_laplace_nll(x, m, b), (mu, log_b))
    for dtype in (torch.float64, torch.bfloat16):
        opcheck(torch.ops.dalle_kernels.logit_laplace_forward.default, (*inputs(dtype), "auto"))


def test_torch_compile_makes_one_graph() -> None:
    x, mu, log_b = inputs(torch.float32)
    compiled = torch.compile(lambda *args: logit_laplace_nll(*args).sum(), fullgraph=True)
    got = torch.autograd.grad(compiled(x, mu, log_b), (mu, log_b))
    for one, other in zip(got, torch.autograd.grad(logit_laplace_nll(x, mu, log_b).sum(), (mu, log_b)), strict=True):
        torch.testing.assert_close(one, other)


def test_bad_input_is_refused() -> None:
    x, mu, log_b = inputs()
    with pytest.raises(ValueError, match=r"mu: got shape \(2, 3, 4\), wanted \(2, 3, 5\)"):
        logit_laplace_nll(x, mu[..., :4], log_b)
    with pytest.raises(TypeError, match=r"log_b: got torch.float32, wanted torch.float64"):
        logit_laplace_nll(x, mu, log_b.float())


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.usefixtures("poisoned_memory")
def test_a_gradient_that_nobody_asked_for_is_not_made(backend: str) -> None:
    """The other has the bits that it has beside it; every layout."""
    if backend == "cpu" and (absent := native.absence()):
        pytest.skip(absent)
    if backend == "triton":
        pytest.importorskip("triton")
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    module = importlib.import_module(f"dalle_kernels.likelihood.{backend}")
    for turn in ((0, 1, 2), (2, 0, 1)):
        pixels, mu, log_b = (tensor.detach().permute(turn).to(device) for tensor in inputs(torch.float32))
        grads = Grads(torch.randn_like(pixels))
        whole = module.backward(grads, Kept(pixels, mu, log_b), Needs(True, True))
        for place, needs in enumerate((Needs(True, False), Needs(False, True))):
            got = module.backward(grads, Kept(pixels, mu, log_b), needs)
            assert torch.equal(got[place], whole[place])
            assert got[1 - place] is None or got[1 - place].numel() == 0
