"""Patterns to look at, and what they cost before anything runs."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dalle_kernels import (
    Column,
    Convolution,
    Fixed,
    MaskPattern,
    Neighborhood,
    Packed,
    Pattern,
    Row,
    Schedule,
    TokenLayout,
    simulate,
)
from dalle_kernels.patterns import picture

LAYOUT = TokenLayout(3, (4, 5))
PATTERNS = [
    Row(LAYOUT),
    Convolution(LAYOUT, 3, "torus"),
    Neighborhood((40,), 5),
    Neighborhood((3, 4, 5), (1, 3, 2)),
    Neighborhood(LAYOUT, 3, dilation=1),
    Fixed(23, 5, 2),
    MaskPattern(torch.rand(9, 9) < 0.5),
    Packed((Row(LAYOUT), Column(LAYOUT))),
    Row(LAYOUT) | Column(LAYOUT),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_what_is_shown_is_the_mask_s_row(pattern: Pattern) -> None:
    for query in (0, pattern.length // 2, pattern.length - 1):
        keys = picture.keys_of(pattern, query)
        assert keys.tolist() == pattern.mask()[query].nonzero().flatten().tolist()
        lines = pattern.show(query).splitlines()
        assert f"{pattern.visible_pairs:,} visible pairs" in lines[1]
        drawn = "".join(line for line in lines[3:] if not line.startswith("layer")).replace(" ", "")
        wanted = np.where(pattern.mask()[query].numpy(), "#", ".")
        wanted[query] = "Q"
        assert drawn == "".join(wanted)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_figures_are_written_whole(pattern: Pattern, tmp_path: Path) -> None:
    assert pattern.plot(tmp_path / "pattern.png") == tmp_path / "pattern.png"
    assert [path.name for path in tmp_path.iterdir()] == ["pattern.png"]
    assert (tmp_path / "pattern.png").stat().st_size > 5000


def test_long_sequences_are_drawn_without_a_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = Row(TokenLayout(16, (64, 64)))
    monkeypatch.setattr(Row, "mask", lambda *_: pytest.fail("a mask was made"))
    assert pattern.plot(tmp_path / "large.png").stat().st_size > 5000


def test_a_query_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for query in (-1, 23, 2.0):
        with pytest.raises(ValueError, match="query: got"):
            Row(LAYOUT).show(query)  # type: ignore[arg-type]


def test_schedules_say_their_counts() -> None:
    said = repr(Schedule.build(Row(TokenLayout(256, (32, 32)))))
    assert "105 tiles of 64 x 64, 328,304 visible of 430,080 executed pairs" in said


@pytest.mark.parametrize(
    "text",
    [
        "Neighborhood((64, 64), 13)",
        "Row(TokenLayout(8, (6, 6))) | Convolution(TokenLayout(8, (6, 6)), 3, boundary='clamp')",
        "Packed((Row(TokenLayout(2, (3, 3))), Column(layout=TokenLayout(0, (2, 2)))))",
        "Strided(64, 8) & Fixed(64, 8, 2)",
        "Strided(16, 8).shifted(2, 20)",
    ],
)
def test_expressions_make_patterns(text: str) -> None:
    import dalle_kernels

    assert simulate.parse(text) == eval(text, vars(dalle_kernels))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "Row(",
        "open('x')",
        "__import__('os').getcwd()",
        "Row",
        "Row(3)",
        "Strided(8)",
        "Strided(8, 0)",
        "Row | 3",
    ],
)
def test_everything_else_is_refused_in_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main([text]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.strip().splitlines()) == 1


def test_a_plot_without_matplotlib_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert simulate.main(["Row(TokenLayout(0, (2, 2)))", "--plot", str(tmp_path / "row.png")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("pip install matplotlib")


def test_the_figures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert (
        simulate.main(["Row(TokenLayout(256, (32, 32)))", "--query", "700", "--plot", str(tmp_path / "row.png")]) == 0
    )
    said = capsys.readouterr().out
    assert "328,304 of 819,840 causal ones" in said
    assert "430,080 in whole tiles (76% of them visible)" in said
    assert "105 of 64 x 64" in said
    assert "2.50x over dense causal attention" in said
    assert "query 700 sees:" in said
    assert (tmp_path / "row.png").exists()
