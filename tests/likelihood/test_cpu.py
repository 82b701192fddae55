"""The native likelihood against float64, for every instruction set that this processor has."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

from dalle_kernels import explain, logit_laplace_nll
from dalle_kernels.backends import native
from dalle_kernels.likelihood import cpu
from dalle_kernels.likelihood.contract import Inputs


def plain(x: torch.Tensor, mu: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """-log f in the dtype of its arguments."""
    return math.log(2) + log_b + x.log() + (1 - x).log() + (x.logit() - mu).abs() / log_b.exp()


def results(kind: torch.dtype, backend: str, x: torch.Tensor, *parameters: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.detach().to(kind).requires_grad_() for tensor in parameters]
    x = x.to(kind)
    nll = plain(x, *leaves) if backend == "plain" else logit_laplace_nll(x, *leaves, backend=backend)
    weight = torch.linspace(-1, 1, nll.numel()).view(nll.shape)
    return [nll, *torch.autograd.grad((nll * weight.to(nll.dtype)).sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["halves", "channels last", "every other", "short"])
def test_forward_and_backward(isa: str, layout: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = (5,) if layout == "short" else (2, 3, 41, 33)
    x = (0.8 * torch.rand(shape, generator=generator) + 0.1).to(dtype)
    mu, log_b = torch.randn(2, *shape, generator=generator).to(dtype)
    if layout == "halves":  # of the channels of one tensor, as a decoder leaves them
        mu, log_b = torch.cat([mu, log_b], 1).chunk(2, 1)
    elif layout == "channels last":
        x, mu, log_b = (tensor.to(memory_format=torch.channels_last) for tensor in (x, mu, log_b))
    elif layout == "every other":
        x, mu, log_b = (tensor.repeat_interleave(2, -1)[..., ::2] for tensor in (x, mu, log_b))
    kinds = ((dtype, "cpu"), (torch.float64, "reference"), (dtype, "plain"))
    for got, exact, rounded in zip(*(results(*kind, x, mu, log_b) for kind in kinds), strict=True):
        error, plain_error = (got.double() - exact).abs(), (rounded.double() - exact).abs().max()
        assert (error <= 2 * plain_error + 2 * torch.finfo(got.dtype).eps * exact.abs()).all()


def test_the_ends_of_the_range(isa: str) -> None:
    x = torch.tensor([1e-42, 1e-38, 1e-20, 1e-3, 0.5, 1 - 1e-3, 1 - 2**-24])
    mu = torch.tensor([[0.0], [30.0], [-1e4], [0.0], [0.0], [0.0]]).expand(6, 7).contiguous()
    log_b = torch.tensor([[0.0], [-30.0], [30.0], [-80.0], [80.0], [-88.0]]).expand(6, 7).contiguous()
    pixels = x.expand(6, 7).contiguous()
    got = logit_laplace_nll(pixels, mu, log_b, backend="cpu")
    want = logit_laplace_nll(*(tensor.double() for tensor in (pixels, mu, log_b)), backend="reference").float()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_outside_the_range_it_is_nan_as_in_the_definition(isa: str) -> None:
    x = torch.tensor([-0.5, 0.0, 1.0, 2.0, math.nan, 0.5, 0.5])
    mu, log_b = torch.zeros(2, 7)
    mu[5] = log_b[6] = math.nan
    assert logit_laplace_nll(x, mu, log_b, backend="cpu").isnan().all()
    assert logit_laplace_nll(x, mu, log_b, backend="reference").isnan().all()


def test_a_pixel_on_its_location_has_no_gradient_to_it(isa: str) -> None:
    _, dmu, dlog_b = results(torch.float32, "cpu", torch.full((21,), 0.5), torch.zeros(21), torch.zeros(21))
    assert torch.equal(dmu, torch.zeros(21))
    torch.testing.assert_close(dlog_b, torch.linspace(-1, 1, 21))


def test_the_number_of_threads_changes_nothing(isa: str) -> None:
    torch.manual_seed(0)
    x, (mu, log_b) = 0.8 * torch.rand(3, 70_001) + 0.1, torch.randn(2, 3, 70_001)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(results(torch.float32, "cpu", x, mu, log_b))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for run in found[1:] for one, other in zip(found[0], run, strict=True))


def test_it_serves_by_default_and_keeps_layouts() -> None:
    x = torch.full((2, 3, 4, 5), 0.4).to(memory_format=torch.channels_last)
    answer = explain(logit_laplace_nll, x, x, x)
    assert (answer.backend, answer.detail) == ("cpu", native.instruction_set())
    assert cpu.forward(Inputs(x, x, x)).nll.stride() == x.stride()
    opcheck(torch.ops.dalle_kernels.logit_laplace_forward.default, (x, x.clone(), x.clone(), "cpu"))
    assert logit_laplace_nll(*(torch.zeros(3, 0, 3, 2)), backend="cpu").shape == (0, 3, 2)
