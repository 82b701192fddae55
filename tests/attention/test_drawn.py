"""Attention over all kinds of patterns and shapes at once, as hypothesis draws them, against dense float64 attention.

Masks come from the definitions written out in tests/oracles.py and tests/patterns, not from the patterns themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_kernels import Packed, Pattern, Schedule, TokenLayout, sparse_attention
from tests.oracles import attention, every_pattern, mask_of
from tests.patterns.test_neighborhood import dense, neighborhoods

LAYOUT = TokenLayout(3, (4, 5))
ALIKE: list[Pattern] = every_pattern(LAYOUT)[:-1]


class Seen(NamedTuple):
    pattern: Pattern
    mask: torch.Tensor


@st.composite
def simple(draw: st.DrawFn) -> Seen:
    if draw(st.booleans()):
        neighborhood = draw(neighborhoods())
        return Seen(neighborhood, dense(neighborhood))
    pattern = draw(st.sampled_from(ALIKE))
    return Seen(pattern, mask_of(pattern))


@st.composite
def composed(draw: st.DrawFn) -> Seen:
    kind = draw(st.sampled_from(["alone", "alone", "packed", "either", "both", "shifted"]))
    if kind == "packed":
        parts = draw(st.lists(simple(), min_size=1, max_size=3))
        mask = torch.block_diag(*(part.mask.int() for part in parts)).bool()
        return Seen(Packed([part.pattern for part in parts]), mask)
    if kind in ("either", "both"):
        first, second = (draw(st.sampled_from(ALIKE)) for _ in range(2))
        masks = mask_of(first), mask_of(second)
        if kind == "either":
            return Seen(first | second, masks[0] | masks[1])
        return Seen(first & second, masks[0] & masks[1])
    part = draw(simple())
    if kind == "alone":
        return part
    before, after = draw(st.integers(0, 70)), draw(st.integers(0, 9))
    mask = torch.nn.functional.pad(part.mask, (before, after, before, after))
    return Seen(part.pattern.shifted(before, len(mask)), mask)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_forward_and_gradients(data: st.DataObject) -> None:
    draw = data.draw
    pattern, mask = draw(composed())
    tokens = draw(st.integers(1, pattern.length))
    count = draw(st.sampled_from([tokens, draw(st.integers(1, tokens))]))
    start = draw(st.integers(0, tokens - count))
    (heads, groups), batch = draw(st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)])), draw(st.integers(1, 2))
    width, wide = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    scale, softcap = draw(st.sampled_from([None, -0.4, 1.0])), draw(st.sampled_from([None, 1.0, 50.0]))
    torch.manual_seed(draw(st.integers(0, 99)))
    padding = torch.rand(batch, tokens) < 0.3 if draw(st.booleans()) else None

    shapes = (heads, count, width), (groups, tokens, width), (groups, tokens, wide)
    truth = [torch.randn(batch, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    q, k, v = truth
    k, v = (tensor.repeat_interleave(heads // groups, 1) for tensor in (k, v))
    rows = mask[start : start + count, :tokens]
    out, lse = attention(q, k, v, rows, scale, padding, softcap)
    seen = lse.isfinite()
    wanted = [out, lse.where(seen, 0)]
    grads = torch.randn_like(out), torch.randn_like(lse) * seen
    wanted += torch.autograd.grad(wanted, truth, grads)

    leaves = [leaf.detach().float().requires_grad_() for leaf in truth]
    got = sparse_attention(
        *leaves,
        pattern,
        scale,
        padding,
        return_lse=True,
        softcap=softcap,
        query_start=start if count < tokens else None,
    )
    assert got[0].shape == (batch, heads, count, wide)
    assert torch.equal(got[1].isfinite(), seen)
    results = [got[0], got[1].where(seen, 0), *torch.autograd.grad(got, leaves, [grad.float() for grad in grads])]
    for name, one, other in zip(("out", "lse", "dq", "dk", "dv"), results, wanted, strict=True):
        torch.testing.assert_close(
            one.double(), other, rtol=1e-4, atol=5e-5, msg=lambda said, name=name: f"{name}: {said}"
        )

    schedule = Schedule.build(pattern, (32, 64), tokens, queries=(start, start + count))
    assert schedule.visible_pairs == int(rows.sum())
