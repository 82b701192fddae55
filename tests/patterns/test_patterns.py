"""Patterns against definitions written independently, and the counts that the design states."""

from __future__ import annotations

import gc
import pickle

import numpy as np
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
    MaskPattern,
    Pattern,
    Row,
    Strided,
    TokenLayout,
    dalle_pattern_schedule,
)
from tests.oracles import every_pattern, mask_of

PAPER = TokenLayout(256, (32, 32))

LAYOUTS = [TokenLayout(*entry) for entry in [(5, (4, 6)), (0, (5, 5)), (1, (1, 9)), (3, (9, 1)), (2, (7, 3))]]


@pytest.mark.parametrize(
    ("pattern", "pairs"),
    [
        (Causal(PAPER), 819_840),
        (Row(PAPER), 328_304),
        (Column(PAPER), 311_936),
        (Convolution(PAPER, 11, "raster"), 352_209),
        (Convolution(PAPER, 11, "clamp"), 347_394),
        (Convolution(PAPER, 11, "torus"), 357_504),
        (Convolution(PAPER, 11, "corner"), 383_249),
        (AxialRow(PAPER), 311_936),
    ],
    ids=str,
)
def test_visible_pairs_of_the_paper_layout(pattern: Pattern, pairs: int) -> None:
    assert pattern.visible_pairs == pairs
    assert int(pattern.mask().sum()) == pairs


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3, 11])
def test_masks_follow_their_definitions(layout: TokenLayout, kernel_size: int) -> None:
    for pattern in every_pattern(layout, kernel_size):
        if not isinstance(pattern, MaskPattern):
            assert torch.equal(pattern.mask(), mask_of(pattern)), pattern


@settings(deadline=None, max_examples=40)
@given(
    text=st.integers(0, 6),
    grid=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    kernel_size=st.sampled_from([1, 3, 5, 9]),
    boundary=st.sampled_from(["raster", "clamp", "torus", "corner"]),
)
def test_convolutions_follow_their_definitions(
    text: int, grid: tuple[int, int], kernel_size: int, boundary: str
) -> None:
    pattern = Convolution(TokenLayout(text, grid), kernel_size, boundary)  # type: ignore[arg-type]
    assert torch.equal(pattern.mask(), mask_of(pattern))
    assert pattern.visible_pairs == int(mask_of(pattern).sum())


def test_a_mask_pattern_is_its_mask() -> None:
    mask = torch.rand(37, 37) < 0.4
    pattern = MaskPattern(mask)
    assert torch.equal(pattern.mask(), mask)
    assert pattern == MaskPattern(mask.clone())
    assert hash(pattern) == hash(MaskPattern(mask.numpy()))
    assert pattern != MaskPattern(~mask)


def test_no_query_stands_twice_in_one_array_of_pairs() -> None:
    for pattern in every_pattern(TokenLayout(4, (6, 5)), 5):
        for query, key in pattern.pairs(pattern.length):
            assert len(set(query.tolist())) == query.size == key.size


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_prefix_is_the_corner_of_the_whole(layout: TokenLayout) -> None:
    for pattern in every_pattern(layout):
        for length in {1, layout.text_length or 1, layout.length - 1}:
            assert torch.equal(pattern.mask(length), pattern.mask()[:length, :length]), pattern


def test_a_spec_tells_the_whole_pattern() -> None:
    patterns = every_pattern(TokenLayout(2, (3, 4)))
    assert all(Pattern.parse(pattern.spec) == pattern for pattern in patterns)
    assert len({pattern.spec for pattern in patterns}) == len(patterns)
    with pytest.raises(ValueError, match="pattern: got 'nonsense'"):
        Pattern.parse("nonsense")


def test_the_papers_schedule_of_patterns() -> None:
    patterns = dalle_pattern_schedule(64, PAPER)
    kinds = [type(pattern).__name__ for pattern in patterns]
    assert (kinds.count("Row"), kinds.count("Column"), kinds.count("Convolution")) == (47, 16, 1)
    assert [layer for layer, kind in enumerate(kinds, 1) if kind == "Column"] == list(range(2, 64, 4))
    assert kinds[-1] == "Convolution"
    assert sum(pattern.visible_pairs for pattern in patterns) == 20_773_473
    assert 64 * Causal(PAPER).visible_pairs == 52_469_760


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenLayout(-1), "text_length: got -1"),
        (lambda: TokenLayout(4, (0, 3)), r"grid: got \(0, 3\)"),
        (lambda: Convolution(PAPER, 4), "kernel_size: got 4"),
        (lambda: Convolution(PAPER, 3, "mirror"), "boundary: got 'mirror'"),  # type: ignore[arg-type]
        (lambda: Convolution(PAPER, 3, dilation=2), "dilation: got 2"),
        (lambda: Strided(10, 0), "stride: got 0"),
        (lambda: Fixed(10, 3, 4), "summary: got 4, wanted at most the stride, 3"),
        (lambda: MaskPattern(torch.ones(3, 4, dtype=torch.bool)), r"mask: got bool of shape \(3, 4\)"),
        (lambda: MaskPattern(torch.ones(3, 3)), "mask: got float32"),
        (lambda: Row(PAPER).mask(1281), "length: got 1281 tokens, wanted 1 to 1280"),
        (lambda: dalle_pattern_schedule(0, PAPER), "layers: got 0"),
    ],
)
def test_bad_patterns_are_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError, match="layout: got tuple, wanted a TokenLayout"):
        Row((3, 3))  # type: ignore[arg-type]


def test_masks_are_found_as_long_as_an_equal_one_lives() -> None:
    mask = torch.eye(5, dtype=torch.bool)
    mask[4, 0] = True
    first, second = MaskPattern(mask), MaskPattern(mask)
    assert second == first
    del first
    gc.collect()
    assert Pattern.parse(second.spec) == second


def test_a_pickled_mask_is_found() -> None:
    mask = torch.eye(6, dtype=torch.bool)
    mask[5, 1] = True
    pickled = pickle.dumps(MaskPattern(mask))
    gc.collect()
    copy = pickle.loads(pickled)
    assert torch.equal(copy.mask(), mask)
    assert Pattern.parse(copy.spec) == copy


def test_numbers_may_be_numpys() -> None:
    layout = TokenLayout(1, (3, 3))
    assert Convolution(layout, np.int64(3)) == Convolution(layout, 3)  # type: ignore[arg-type]
    assert Convolution(layout, np.int64(3)).spec == Convolution(layout, 3).spec  # type: ignore[arg-type]
