"""Walks: every step finds its tile, loads never touch a slot in use, and text stays where it is."""

from __future__ import annotations

from itertools import pairwise

import pytest

from dalle_kernels import TokenLayout
from dalle_kernels.attention import cuda_walk
from dalle_kernels.attention.cuda_walk import START, makespan, parts_for, walk_for
from dalle_kernels.patterns.patterns import Causal, Column, Convolution, Pattern, Row
from dalle_kernels.patterns.schedule import schedule_for

LAYOUT = TokenLayout()
PATTERNS: list[Pattern] = [Row(LAYOUT), Column(LAYOUT), Convolution(LAYOUT), Causal(LAYOUT)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: type(pattern).__name__)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("slots", "ahead"), [(3, 2), (4, 2), (6, 2), (9, 2), (4, 3), (2, 1)])
@pytest.mark.parametrize("parts", [1, 3, 99])
def test_a_walk_is_sound(pattern: Pattern, transposed: bool, slots: int, ahead: int, parts: int) -> None:
    walk = walk_for(pattern, 128, 32, transposed, 1280, slots, ahead, parts)
    schedule = schedule_for(pattern, (32, 128) if transposed else (128, 32), 1280)
    tiles = schedule.query_tiles if transposed else schedule.key_tiles
    ids = schedule.query_mask_ids if transposed else schedule.mask_ids
    assert walk.steps[:, 0].equal(tiles)
    assert walk.steps[:, 2].equal(ids)
    borders = walk.part_tiles.tolist()
    assert borders[0] == 0
    assert borders[-1] == 10
    assert len(borders) == min(parts, 10) + 1
    assert borders == sorted(set(borders))
    offsets = walk.tile_steps.tolist()
    for first, last in pairwise(borders):
        steps = walk.steps[offsets[first] : offsets[last]].tolist()
        holds: dict[int, int] = {}
        for index, (tile, slot, _, loads) in enumerate(steps):
            assert 0 <= slot < slots
            if loads:
                assert slot not in [step[1] for step in steps[max(index - ahead, 0) : index]]
                holds[slot] = tile
            assert holds[slot] == tile


@pytest.mark.parametrize(
    ("heads", "at_a_time", "parts"),
    [
        (264, 264, 1),  # a whole round
        (528, 264, 1),
        (300, 264, 3),  # 36 heads would have the GPU to themselves for as long as all the others took
        (64, 264, 4),
        (16, 132, 8),  # nine parts each would be twelve blocks more than run at a time
        (8, 132, 9),
        (5000, 264, 1),
    ],
)
def test_heads_are_parted_so_that_the_last_round_is_full(heads: int, at_a_time: int, parts: int) -> None:
    assert parts_for(Row(LAYOUT), 128, 32, False, 1280, heads, at_a_time) == parts
    offsets = schedule_for(Row(LAYOUT), (128, 32), 1280).key_offsets.tolist()
    borders = walk_for(Row(LAYOUT), 128, 32, False, 1280, 6, 2, parts).part_tiles.tolist()
    costs = [START + offsets[last] - offsets[first] for first, last in pairwise(borders)]
    whole = makespan([START + offsets[-1]] * heads, at_a_time)
    assert makespan([cost for cost in costs for _ in range(heads)], at_a_time) <= whole


@pytest.mark.parametrize("heads", [100, 300, 992])
def test_a_long_sequence_s_parts_are_found_without_trying_all(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def counted(costs: list[int], at_a_time: int) -> int:
        tried.append(len(costs))
        return makespan(costs, at_a_time)

    monkeypatch.setattr(cuda_walk, "makespan", counted)
    pattern = Row(TokenLayout(256, (64, 64)))
    offsets = schedule_for(pattern, (128, 32), pattern.length).key_offsets.tolist()
    parts = parts_for(pattern, 128, 32, False, pattern.length, heads, 264)
    assert sum(tried) < 60_000  # blocks; all of 1 to 34 parts are 595 for each head
    ends = []
    for borders in (cuda_walk._share(offsets, number) for number in range(1, len(offsets))):
        costs = [START + offsets[last] - offsets[first] for first, last in pairwise(borders)]
        ends.append(makespan([cost for cost in costs for _ in range(heads)], 264))
    assert parts == 1 + ends.index(min(ends))


def test_makespan() -> None:
    assert makespan([3, 3, 2], 2) == 5
    assert makespan([3, 2, 2], 2) == 4
    assert makespan([1], 4) == 1


@pytest.mark.parametrize(("pattern", "loads"), [(Column(LAYOUT), 40), (Row(LAYOUT), 40), (Convolution(LAYOUT), 54)])
def test_twelve_slots_nearly_read_each_key_once(pattern: Pattern, loads: int) -> None:
    # 1280 keys are 40 tiles; twelve tiles of 32 keys and values of 64 are what two blocks of an H100 have each.
    assert walk_for(pattern, 128, 32, False, 1280, 12, 2, 1).loads == loads


def test_too_few_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="slots: got 2, wanted at least 3"):
        walk_for(Row(LAYOUT), 128, 32, False, 1280, 2, 2, 1)
