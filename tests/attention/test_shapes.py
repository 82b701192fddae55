"""Heads shared by a group, values of another width, any widths: against repeated, dense attention in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_kernels import Convolution, Neighborhood, Pattern, Row, TokenLayout, explain, sparse_attention

PATTERNS: list[Pattern] = [
    Row(TokenLayout(5, (4, 6))),
    Convolution(TokenLayout(0, (5, 5)), 3, "clamp"),
    Neighborhood((5, 6), 3),
]


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, padding: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    shared = q.shape[1] // k.shape[1]
    k, v = (tensor.repeat_interleave(shared, 1) for tensor in (k, v))
    visible = pattern.mask(q.shape[2])
    if padding is not None:
        visible = visible & ~padding[:, None, None, :]
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ v, scores.logsumexp(-1)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(PATTERNS),
    st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3), (3, 3)]),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["auto", "reference"]),
)
def test_shapes(
    pattern: Pattern, heads: tuple[int, int], width: int, wide: int, padded: bool, strided: bool, backend: str
) -> None:
    torch.manual_seed(width * 41 + wide)
    many, few = heads
    length = pattern.length - 2

    def randn(number: int, size: int) -> torch.Tensor:
        if strided:  # tokens before heads, as projections leave them
            return torch.randn(2, length, number, size, dtype=torch.float64).transpose(1, 2)
        return torch.randn(2, number, length, size, dtype=torch.float64)

    leaves = [tensor.requires_grad_() for tensor in (randn(many, width), randn(few, width), randn(few, wide))]
    padding = None
    if padded:
        padding = torch.zeros(2, length, dtype=torch.bool)
        padding[1, 2:5] = True
    truth = exact(*leaves, pattern, padding)
    grads = torch.randn_like(truth[0]), torch.randn_like(truth[1])
    wanted = [*truth, *torch.autograd.grad(truth, leaves, grads)]
    narrow = [leaf.detach().float().requires_grad_() for leaf in leaves]
    q, k, v = narrow
    out = sparse_attention(q, k, v, pattern, key_padding_mask=padding, return_lse=True, backend=backend)
    assert out[0].shape == (2, many, length, wide)
    assert out[1].shape == (2, many, length)
    got = [*out, *torch.autograd.grad(out, narrow, [grad.float() for grad in grads])]
    for one, true in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), true, rtol=2e-5, atol=1e-5)


def test_kernels_serve_any_width() -> None:
    q = torch.randn(1, 2, 29, 33)
    assert explain(sparse_attention, q, q, q, PATTERNS[0]).backend == "cpu"
    low = q.bfloat16()
    got = sparse_attention(low, low, low, PATTERNS[0])
    wanted = sparse_attention(*[low.double()] * 3, PATTERNS[0])
    torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=2e-2)
    assert got.stride() == q.stride()


def test_grouped_heads_compile() -> None:
    q, k, v = torch.randn(2, 4, 29, 16), torch.randn(2, 2, 29, 16), torch.randn(2, 2, 29, 24)

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return sparse_attention(*tensors, PATTERNS[0])

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (((1, 4, 29, 16), (1, 3, 29, 16), (1, 3, 29, 16)), "k: got shape"),
        (((1, 4, 29, 16), (1, 0, 29, 16), (1, 0, 29, 16)), "k: got shape"),
        (((1, 4, 29, 16), (1, 2, 28, 16), (1, 2, 28, 16)), "q: got 29 tokens, wanted 1 to 28"),
        (((1, 4, 29, 16), (1, 2, 29, 24), (1, 2, 29, 24)), "k: got shape"),
        (((1, 4, 29, 16), (2, 2, 29, 16), (2, 2, 29, 16)), "k: got shape"),
        (((1, 4, 29, 16), (1, 2, 29, 16), (1, 4, 29, 16)), "v: got shape"),
        (((1, 4, 29, 16), (1, 2, 29, 16), (1, 2, 29, 0)), "v: got shape"),
    ],
)
def test_what_does_not_fit_is_refused(shapes: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sparse_attention(*(torch.zeros(shape) for shape in shapes), PATTERNS[0])
