"""Pictures drawn along a diagonal: the order against a simulation of its rule, and what is seen pair by pair."""

from __future__ import annotations

import pytest
import torch

from dalle_kernels import AxialRow, Causal, Column, Convolution, Pattern, Row, TokenLayout
from dalle_kernels.patterns.decode_table import DecodeTable
from dalle_kernels.patterns.drawing import Diagonal

TEXT, ROWS, COLUMNS = 3, 4, 5
LAYOUT = TokenLayout(TEXT, (ROWS, COLUMNS))
PATTERNS = [Causal(LAYOUT), Row(LAYOUT), Column(LAYOUT), AxialRow(LAYOUT), Convolution(LAYOUT, 3)]

Feed = tuple[int, int, int, int]


def simulated(window: int, known: int) -> list[Feed]:
    """(position, token, draws, round) of each token, by acting the rule out round by round."""
    feeds = [(p, p, TEXT + known if p == TEXT + known - 1 else -1, 0) for p in range(TEXT + known)]
    drawn, fresh, now = set(range(known + 1)), [known], 0
    while fresh:
        now += 1
        taken: list[Feed] = []
        for cell in fresh:
            row, column = divmod(cell, COLUMNS)
            has_stand_in = column == COLUMNS - 1 and cell + 1 in drawn
            taken.append((TEXT + cell, TEXT + cell, -1 if has_stand_in else TEXT + cell + 1, now))
        for row in range(1, ROWS):
            head, above = row * COLUMNS, [c for c in drawn if c // COLUMNS == row - 1]
            ahead = len(above)
            if head in drawn or ahead < window or ahead == COLUMNS or head <= known:
                continue
            taken.append((TEXT + head - 1, TEXT + max(above), TEXT + head, now))
        feeds += sorted(taken)
        fresh = sorted(draws - TEXT for _, _, draws, _ in taken if 0 <= draws - TEXT < ROWS * COLUMNS)
        drawn |= set(fresh)
    assert drawn == set(range(ROWS * COLUMNS))
    return feeds


@pytest.mark.parametrize("window", range(1, COLUMNS + 1))
@pytest.mark.parametrize("known", range(ROWS * COLUMNS))
def test_the_order_is_the_rule_acted_out(window: int, known: int) -> None:
    feeds = Diagonal(Row(LAYOUT), TEXT, COLUMNS, window, known).feeds
    assert list(zip(*(part.tolist() for part in feeds), strict=True)) == simulated(window, known)


@pytest.mark.parametrize("known", [0, 2, 5, 12, 20])
@pytest.mark.parametrize("window", range(1, COLUMNS + 1))
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_token_sees_what_its_position_sees_of_the_tokens_before_it(pattern: Pattern, window: int, known: int) -> None:
    diagonal = Diagonal(pattern, TEXT, COLUMNS, window, known)
    assert Pattern.parse(diagonal.spec) == diagonal
    position, token, *_ = (part.tolist() for part in diagonal.feeds)
    visible, wanted = pattern.mask(), torch.zeros(diagonal.length, diagonal.length, dtype=torch.bool)
    for query in range(diagonal.length):
        for key in range(query + 1):
            stands_in = position[key] != token[key]
            wanted[query, key] = visible[position[query], position[key]] and (not stands_in or key == query)
    assert torch.equal(diagonal.mask(), wanted)
    for length in (1, TEXT + known, diagonal.length - 1):
        assert torch.equal(diagonal.mask(length), wanted[:length, :length])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_window_of_a_whole_row_is_the_raster_order(pattern: Pattern) -> None:
    for known in (0, 7):
        diagonal = Diagonal(pattern, TEXT, COLUMNS, COLUMNS, known)
        assert diagonal.feeds.position.tolist() == list(range(LAYOUT.length))
        assert torch.equal(diagonal.mask(), pattern.mask())
        if isinstance(pattern, Causal):
            continue  # what it says with leading keys is said with pairs
        one, other = DecodeTable.build(diagonal), DecodeTable.build(pattern)
        for name in ("slot", "prefix", "offsets", "slots"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_rounds_are_fewer_and_slots_stay_few() -> None:
    layout = TokenLayout(256, (32, 32))
    for window, slots in ((32, 289), (16, 310), (8, 370)):
        diagonal = Diagonal(Row(layout), 256, 32, window)
        assert int(diagonal.feeds.round[-1]) == 31 * window + 32
        assert DecodeTable.build(diagonal).cache_length <= slots


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 1), "first: got 0, wanted an int from 1 to 23"),
        ((3, 24, 1), "columns: got 24, wanted an int from 1 to 23"),
        ((3, 5, 6), "window: got 6, wanted an int from 1 to 5"),
        ((3, 5, 0), "window: got 0"),
        ((3, 5, 5, 21), "known: got 21, wanted an int from 0 to 20"),
    ],
)
def test_what_a_picture_does_not_have_is_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Diagonal(Row(LAYOUT), *arguments)
