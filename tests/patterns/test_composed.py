"""Patterns made of patterns: each against the same on dense masks."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_kernels import (
    AxialRow,
    Causal,
    Column,
    Convolution,
    Fixed,
    KVCache,
    MaskPattern,
    Neighborhood,
    Packed,
    Pattern,
    Row,
    Schedule,
    Strided,
    TokenLayout,
    sparse_attention,
)

LAYOUT = TokenLayout(3, (4, 5))
torch.manual_seed(0)
ALIKE: list[Pattern] = [
    Causal(LAYOUT),
    Row(LAYOUT),
    Column(LAYOUT),
    AxialRow(LAYOUT),
    Convolution(LAYOUT, 3, "torus"),
    Strided(23, 4),
    Fixed(23, 5, 2),
    MaskPattern(torch.rand(23, 23) < 0.3),
    Neighborhood(LAYOUT, 3),
]
patterns = st.sampled_from(ALIKE)


def check(pattern: Pattern, mask: torch.Tensor) -> None:
    assert torch.equal(pattern.mask(), mask)
    assert pattern.visible_pairs == int(mask.sum())
    for length in (1, 5, pattern.length):
        assert torch.equal(pattern.mask(length), mask[:length, :length])
        for query, _ in pattern.pairs(length):
            assert len(set(query.tolist())) == query.size  # no query twice in one array
    assert Pattern.parse(pattern.spec) == pattern
    assert hash(Pattern.parse(pattern.spec)) == hash(pattern)
    assert pickle.loads(pickle.dumps(pattern)) == pattern
    assert Schedule.build(pattern, (32, 32)).visible_pairs == int(mask.sum())


@settings(max_examples=60, deadline=None)
@given(patterns, patterns)
def test_either_and_both(first: Pattern, second: Pattern) -> None:
    check(first | second, first.mask() | second.mask())
    check(first & second, first.mask() & second.mask())


@settings(max_examples=30, deadline=None)
@given(patterns, st.integers(0, 4), st.integers(0, 4))
def test_later_in_a_longer_sequence(pattern: Pattern, before: int, after: int) -> None:
    mask = torch.zeros(before + 23 + after, before + 23 + after, dtype=torch.bool)
    mask[before : before + 23, before : before + 23] = pattern.mask()
    check(pattern.shifted(before, before + 23 + after), mask)


@settings(max_examples=30, deadline=None)
@given(st.lists(patterns, min_size=1, max_size=3))
def test_side_by_side(several: list[Pattern]) -> None:
    packed = Packed(several)
    check(packed, torch.block_diag(*(pattern.mask().int() for pattern in several)).bool())
    whole: Pattern = several[0].shifted(0, packed.length)
    for pattern, offset in zip(several[1:], packed.offsets[1:], strict=True):
        whole = whole | pattern.shifted(offset, packed.length)
    assert torch.equal(whole.mask(), packed.mask())


def test_packed_pictures_attend_as_they_would_alone() -> None:
    wide, high = Row(TokenLayout(5, (3, 8))), Convolution(TokenLayout(2, (9, 4)), 3)
    packed = Packed((wide, high))
    leaves = [torch.randn(2, 2, packed.length, 16).requires_grad_() for _ in range(3)]
    together = sparse_attention(*leaves, packed)
    parts = [slice(0, wide.length), slice(wide.length, packed.length)]
    alone = torch.cat(
        [
            sparse_attention(*(leaf[:, :, part] for leaf in leaves), pattern)
            for part, pattern in zip(parts, (wide, high), strict=True)
        ],
        2,
    )
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(together)
    for got, wanted in zip(
        torch.autograd.grad(together, leaves, grad), torch.autograd.grad(alone, leaves, grad), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_packed_sequence_can_be_decoded() -> None:
    pattern = Packed((Row(LAYOUT), Column(LAYOUT)))
    # What the first sequence held is forgotten when the second begins: the longer of both is enough.
    assert KVCache(pattern, 1, 1, 8).keys.shape[2] < pattern.length


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    q = torch.randn(1, 1, 30, 16)
    out = sparse_attention(q, q, q, Row(LAYOUT).shifted(4, 30))
    assert out[:, :, :4].eq(0).all()
    assert out[:, :, 27:].eq(0).all()
    torch.testing.assert_close(out[:, :, 4:27], sparse_attention(*[q[:, :, 4:27]] * 3, Row(LAYOUT)))


def test_what_does_not_fit_is_refused() -> None:
    short = Row(TokenLayout(0, (2, 2)))
    with pytest.raises(ValueError, match="4 and 23 tokens"):
        short | ALIKE[0]
    with pytest.raises(TypeError, match="wanted a Pattern"):
        ALIKE[0] & 3  # type: ignore[operator]
    with pytest.raises(ValueError, match="total: got 5"):
        short.shifted(2, 5)
    with pytest.raises(ValueError, match="offset: got -1"):
        short.shifted(-1)
    with pytest.raises(ValueError, match="patterns"):
        Packed(())
    with pytest.raises(TypeError, match="wanted a Pattern"):
        Packed([short, None])  # type: ignore[list-item]


def test_a_matrix_takes_the_grid_of_what_it_is_joined_to() -> None:
    """It is drawn on that grid, and walked in the orders that a grid offers."""
    layout = TokenLayout(0, (32, 32))
    columns = Column(layout).mask()
    for joined in (MaskPattern(columns) & Causal(layout), Causal(layout) & MaskPattern(columns)):
        assert joined.layout_or_none == layout
        assert joined.grid_or_none == Row(layout).grid_or_none
        assert Schedule.build(joined).executed_pairs < Schedule.build(MaskPattern(columns)).executed_pairs
    assert (MaskPattern(columns) | MaskPattern(columns)).grid_or_none is None
    assert (Row(layout) | Row(TokenLayout(512, (16, 32)))).grid_or_none is None
