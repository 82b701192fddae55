"""The suite of several processes: a team's steps are the run's, figures follow from rows, memory is all processes'."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dalle_reference.transformer import DalleTransformer, TransformerConfig

from benchmarks import planning
from benchmarks.streaming import seen, tree_bytes
from benchmarks.suites import scaling
from benchmarks.suites.team import Team, Training, pictures

MODEL = {"vocab_text": 64, "text_length": 5, "grid": (3, 4), "vocab_image": 64, "layers": 1, "heads": 2, "head_dim": 16}


def test_a_team_makes_the_steps_that_it_is_told_to() -> None:
    team = Team(2, Training(MODEL, {"powersgd_rank": 1}, batch=4))
    (first,) = team.steps(1)
    torch.manual_seed(0)
    model = DalleTransformer(TransformerConfig(**MODEL))
    assert first == pytest.approx(model.loss(*pictures((3, 4), 64, 64, 0, range(4))).total.item(), abs=1e-5)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert team.gradient_bytes() == whole
    assert len(team.steps(3, save=True)) == 3
    assert 2 * whole < team.gradient_bytes() < 4 * whole  # the second is whole too, the others are compressed
    team.close()


def test_figures_follow_from_the_rows() -> None:
    rows = {name: {"ms": ms} for name, ms in (("one", 200.0), ("two", 100.0), ("shared", 103.0))}
    found = scaling.step_figures(rows, "one", "two", "shared", "other")
    assert (found["speed_up"], found["sharing"]) == (2.0, pytest.approx(0.03))
    assert scaling.step_figures({"one": {"ms": 1.0}}, "one", "two", "shared") == {}
    saving = scaling.checkpoint_figures({"alone": {"ms": 1000.0}, "with": {"ms": 1100.0}}, steps=10)
    assert (saving["checkpoint_ms"], saving["checkpoint_share"]) == (pytest.approx(100), pytest.approx(100 / 50_000))


def test_the_input_pipeline_reads_what_was_written(tmp_path: Path) -> None:
    cell = scaling.input_cell(pictures=24, side=16, resolution=8)
    ours = {contender.name: contender for contender in cell.contenders()}["dalle_kernels, 0 workers"].prepare()
    ours.runs[0]()
    assert ours.verify().passed
    assert ours.counts == {"pictures": 24}


@pytest.mark.skipif(sys.platform != "linux", reason="processes' memory is read as Linux has it")
def test_memory_is_that_of_all_processes() -> None:
    alone = tree_bytes(os.getpid())
    holds = "import sys; held = bytearray(b'x') * 50_000_000; print(flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", holds], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    assert tree_bytes(os.getpid()) > alone + 45e6
    child.communicate()


def test_a_plan_is_a_section_of_the_page() -> None:
    lines = planning.table(2, preset="demo", memory=2e8, batch=8)
    assert lines[0] == "## 2 GPUs"
    assert any("--parallel fsdp --recompute none --accumulate 1" in line for line in lines)


def test_growth_is_seen_after_the_start() -> None:
    flat, growing = [1, 5, *[100] * 48], [1, 5, *range(100, 148)]
    assert seen(flat) == (100, 0.0, 50)
    assert seen(growing).peak == 147
    assert 0.2 < seen(growing).growth < 0.5
