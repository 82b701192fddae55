"""The kernels of the likelihood of tokens in Triton against float64: in its interpreter, or on the GPU there is."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dalle_kernels import token_nll
from dalle_kernels.backends.contract import Call
from dalle_kernels.tokens import triton as triton_kernel
from dalle_kernels.tokens.contract import Grads, Kept, Needs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 5, 1024, 2 * triton_kernel.BLOCK + 7])
@pytest.mark.usefixtures("poisoned_memory")
def test_forward_and_backward(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(3, width, device=DEVICE)).to(dtype).requires_grad_()
    tokens = torch.tensor([0, width - 1, width // 2], device=DEVICE)
    weight = torch.tensor([1.0, -2.0, 0.5], device=DEVICE)
    exact = logits.detach().double().requires_grad_()
    wanted = token_nll(exact, tokens, backend="reference")
    got = token_nll(logits, tokens, backend="triton")
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=2e-6)
    (gradient,) = torch.autograd.grad((got * weight).sum(), logits)
    (truth,) = torch.autograd.grad((wanted * weight).sum(), exact)
    torch.testing.assert_close(gradient.double(), truth, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


@pytest.mark.usefixtures("poisoned_memory")
def test_what_is_ruled_out_has_no_share() -> None:
    logits = torch.full((1, 2500), -torch.inf, device=DEVICE)
    logits[0, 2000:2002] = 1.0
    tokens = torch.tensor([2001], device=DEVICE)
    assert token_nll(logits, tokens, backend="triton").item() == pytest.approx(0.6931472)


def test_nothing_to_do_and_what_is_refused() -> None:
    empty = torch.zeros(0, 3, device=DEVICE)
    assert token_nll(empty, torch.zeros(0, dtype=torch.int64, device=DEVICE), backend="triton").shape == (0,)
    row = torch.zeros(1, 3, device=DEVICE)
    kept = Kept(row, torch.zeros(1, dtype=torch.int64, device=DEVICE), row[:, 0])
    assert triton_kernel.backward(Grads(row[:, 0]), kept, Needs(False)) == (None,)
    assert triton_kernel.refuse(Call(torch.device(DEVICE), torch.bfloat16, 1)) is None
    assert "float64" in (triton_kernel.refuse(Call(torch.device(DEVICE), torch.float64, 1)) or "")
