"""The tuner: keeps what is there unless a candidate is clearly faster, and rewrites one row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tune
from dalle_kernels import launch
from dalle_kernels.codebook import triton_gumbel, triton_vq


def task_of(times: dict[int, float]) -> tune.Task:
    """Candidates by num_warps; a "call" is the time that its settings would take."""

    def prepare():  # type: ignore[no-untyped-def]
        warps = launch.settings_for("attention_forward", 90, 16, 64)["num_warps"]
        return lambda: times[warps]

    return tune.Task("attention_forward", 16, 64, tune.product(num_warps=(1, 2, 8)), prepare)


def measured(call) -> float:  # type: ignore[no-untyped-def]
    return call()


@pytest.mark.parametrize(("times", "wanted"), [({1: 3, 2: 1, 4: 2, 8: 1.5}, 2), ({1: 3, 2: 1.99, 4: 2, 8: 5}, 4)])
def test_only_a_clear_gain_changes_the_settings(times: dict[int, float], wanted: int) -> None:
    assert launch.settings_for("attention_forward", 90, 16, 64)["num_warps"] == 4
    settings = tune.tune(task_of(times), 90, 0.02, measured)
    assert settings["num_warps"] == wanted
    assert settings["query_tile"] == launch.settings_for("attention_forward", 90, 16, 64)["query_tile"]


def test_rewrites_one_row(tmp_path: Path) -> None:
    rows = [dict(row) for row in launch.rows()]
    replaced = tune.replace_row(rows, "attention_forward", 90, 16, 64, {"num_warps": 2})
    assert len(replaced) == len(rows)
    assert sum(one != other for one, other in zip(replaced, rows, strict=True)) == 1
    added = tune.replace_row(rows, "attention_forward", 120, 16, 64, {"num_warps": 2})
    assert len(added) == len(rows) + 1
    path = tmp_path / "launch.json"
    tune.write(added, path)
    assert json.loads(path.read_text()) == added


def test_table_is_found_by_architecture_and_width() -> None:
    assert launch.settings_for("attention_forward", 120, 16, 64) == launch.settings_for(
        "attention_forward", 100, 16, 33
    )
    with pytest.raises(ValueError, match="no row for kernel 'attention_forward' at architecture 70"):
        launch.settings_for("attention_forward", 70, 16, 64)
    for row in launch.rows():
        found = launch.settings_for(row["kernel"], row["arch"], row["bits"], row["width"])
        assert found == row["settings"]


def test_every_row_of_the_table_has_a_task() -> None:
    tasks = {(task.kernel, task.bits, task.width): task for task in tune.all_tasks()}
    assert tasks.keys() == {(row["kernel"], row["bits"], row["width"]) for row in launch.rows()}
    for task in tasks.values():
        settings = launch.settings_for(task.kernel, 90, task.bits, task.width)
        assert all(change.keys() <= settings.keys() for change in task.candidates), task.kernel


def test_candidates_reach_every_plan() -> None:
    seen = []

    def prepare():  # type: ignore[no-untyped-def]
        cpu = torch.device("cpu")
        return lambda: seen.append(
            (
                triton_gumbel.plan("gumbel_forward", cpu, torch.bfloat16, 256, 128)["num_warps"],
                triton_vq._plan(cpu, torch.bfloat16, 128)["num_warps"],
            )
        )

    for kernel in ("gumbel_forward", "vq_forward"):
        task = tune.Task(kernel, 16, 128, tune.product(num_warps=(1, 2)), prepare)
        tune.tune(task, 90, 0.02, lambda call: call() or 1.0)
    assert seen == [(8, 8), (1, 8), (2, 8), (8, 8), (8, 1), (8, 2)]
