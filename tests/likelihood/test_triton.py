"""The likelihood's kernels in Triton against float64: in Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from dalle_kernels import logit_laplace_nll
from dalle_kernels.backends.contract import Call
from dalle_kernels.likelihood import triton as triton_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def plain(x: torch.Tensor, mu: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """-log f in the dtype of its arguments."""
    return math.log(2) + log_b + x.log() + (1 - x).log() + (x.logit() - mu).abs() / log_b.exp()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_and_backward(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pixels = (0.8 * torch.rand(2, 3, 25, 17, device=DEVICE) + 0.1).to(dtype)
    # As a decoder leaves them: halves of the channels of one tensor.
    mu, log_b = torch.randn(2, 6, 25, 17, device=DEVICE).to(dtype).chunk(2, 1)
    weight = torch.randn_like(pixels, dtype=torch.float32)

    def run(kind: torch.dtype, backend: str) -> list[torch.Tensor]:
        inputs = [tensor.detach().to(kind).requires_grad_() for tensor in (mu, log_b)]
        if backend == "plain":
            nll = plain(pixels.to(kind), *inputs)
        else:
            nll = logit_laplace_nll(pixels.to(kind), *inputs, backend=backend)
        return [nll, *torch.autograd.grad((nll * weight.to(nll.dtype)).sum(), inputs)]

    results = zip(run(dtype, "triton"), run(torch.float64, "reference"), run(dtype, "plain"), strict=True)
    for got, exact, rounded in results:
        error, plain_error = (got.double() - exact).abs(), (rounded.double() - exact).abs().max()
        assert (error <= 2 * plain_error + 2 * torch.finfo(got.dtype).eps * exact.abs()).all()


def test_a_pixel_on_its_location_has_no_gradient_to_it() -> None:
    half = torch.full((5,), 0.5, device=DEVICE)
    mu, log_b = torch.zeros(5, device=DEVICE, requires_grad=True), torch.zeros(5, device=DEVICE)
    logit_laplace_nll(half, mu, log_b, backend="triton").sum().backward()
    assert mu.grad is not None
    assert torch.equal(mu.grad, torch.zeros_like(mu))


def test_layouts_are_kept() -> None:
    torch.manual_seed(0)
    x, mu, log_b = (
        torch.full((2, 3, 4, 5), value, device=DEVICE).to(memory_format=torch.channels_last).requires_grad_(learnt)
        for value, learnt in ((0.4, False), (0.2, True), (-0.3, True))
    )
    nll = logit_laplace_nll(x, mu, log_b, backend="triton")
    dmu, dlog_b = torch.autograd.grad(nll.sum(), (mu, log_b))
    assert nll.stride() == dmu.stride() == dlog_b.stride() == x.stride()


def test_nothing_to_do() -> None:
    empty = torch.zeros(0, 3, device=DEVICE)
    assert logit_laplace_nll(empty, empty, empty, backend="triton").shape == (0, 3)


def test_what_is_refused() -> None:
    assert triton_kernel.refuse(Call(torch.device(DEVICE), torch.bfloat16, 1)) is None
    assert "float64" in triton_kernel.refuse(Call(torch.device(DEVICE), torch.float64, 1))
