"""`Prefix` against its definition, written out cell by cell, and through the kernels against float64."""

from __future__ import annotations

import pytest
import torch

from dalle_kernels import Pattern, Prefix, Schedule, TokenLayout, sparse_attention
from tests.oracles import attention

LAYOUTS = [TokenLayout(*entry) for entry in [(5, (4, 6)), (0, (5, 5)), (1, (1, 9)), (70, (9, 8))]]


def dense(layout: TokenLayout) -> torch.Tensor:
    mask = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    for i in range(layout.length):
        for j in range(layout.length):
            mask[i, j] = j < layout.text_length or (layout.text_length <= j <= i)
    return mask


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_masks_prefixes_counts_and_spec(layout: TokenLayout) -> None:
    pattern, wanted = Prefix(layout), dense(layout)
    assert torch.equal(pattern.mask(), wanted)
    assert pattern.visible_pairs == int(wanted.sum())
    for length in {1, 2, 4, 7, layout.length}:
        if length <= layout.length:
            assert torch.equal(pattern.mask(length), wanted[:length, :length])
    assert Pattern.parse(pattern.spec) == pattern


def test_through_a_schedule_and_attention() -> None:
    layout = LAYOUTS[-1]
    assert Schedule.build(Prefix(layout)).visible_pairs == int(dense(layout).sum())
    q, k, v = torch.randn(3, 1, 2, layout.length, 8, dtype=torch.float64)
    wanted, _ = attention(q, k, v, dense(layout))
    torch.testing.assert_close(sparse_attention(q.float(), k.float(), v.float(), Prefix(layout)), wanted.float())
