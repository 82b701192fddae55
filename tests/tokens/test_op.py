"""The likelihood of tokens against a loop over rows in float64, its derivatives, compilation, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

from dalle_kernels import token_nll


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    return torch.randn(2, 3, 7, dtype=dtype, requires_grad=True), torch.randint(7, (2, 3))


def test_it_is_the_logarithm_of_a_share() -> None:
    logits, tokens = inputs()
    for row, token, nll in zip(logits.view(-1, 7), tokens.view(-1), token_nll(logits, tokens).view(-1), strict=True):
        weights = [math.exp(x) for x in row.tolist()]
        assert nll.item() == pytest.approx(-math.log(weights[token] / sum(weights)))


def test_gradcheck_and_opcheck() -> None:
    logits, tokens = inputs()
    assert torch.autograd.gradcheck(lambda x: token_nll(x, tokens), (logits,))
    for dtype in (torch.float64, torch.bfloat16):
        x, tokens = inputs(dtype)
        rows = x.detach().view(-1, 7).requires_grad_()
        opcheck(torch.ops.dalle_kernels.token_nll_forward.default, (rows, tokens.view(-1), "auto"))


def test_torch_compile_makes_one_graph() -> None:
    logits, tokens = inputs(torch.float32)
    compiled = torch.compile(lambda *args: token_nll(*args).sum(), fullgraph=True)
    (got,) = torch.autograd.grad(compiled(logits, tokens), logits)
    torch.testing.assert_close(got, torch.autograd.grad(token_nll(logits, tokens).sum(), logits)[0])


def test_bad_input_is_refused() -> None:
    logits, tokens = inputs()
    with pytest.raises(ValueError, match=r"logits, tokens: got shapes \(2, 3, 7\), \(2, 2\)"):
        token_nll(logits, tokens[:, :2])
    with pytest.raises(TypeError, match=r"tokens: got torch.int32, wanted torch.int64"):
        token_nll(logits, tokens.int())
    with pytest.raises(IndexError, match="tokens: got 7, wanted 0 to 6"):
        token_nll(logits, torch.full_like(tokens, 7))
