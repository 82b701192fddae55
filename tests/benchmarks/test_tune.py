"""The tuner: keeps what is there unless a candidate is right and clearly faster, and changes no other call's row."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton

from benchmarks.kernels import tune
from dalle_kernels.backends import launch
from dalle_kernels.codebook import triton_tiles
from dalle_kernels.codebook.vq import triton as triton_vq

KERNEL = "decode_forward"


class Call:
    """A kernel's call as stubs have it: an answer, or what it fails with, and a time."""

    def __init__(self, ms: float, answer: object = None) -> None:
        self.ms, self.answer = ms, answer

    def __call__(self) -> object:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


def measured(call) -> float:  # type: ignore[no-untyped-def]
    return call.ms


def row(arch: int, width: int, warps: int, bits: int = 16) -> dict:
    return {"kernel": KERNEL, "arch": arch, "bits": bits, "width": width, "settings": {"num_warps": warps}}


def warps_of(arch: int, width: int, bits: int = 16) -> int:
    return launch.settings_for(KERNEL, arch, bits, width)["num_warps"]


def task_of(calls: Mapping[int, Call], width: int = 256, arch: int = 90) -> tune.Task:
    """Candidates by num_warps; 4 is today's."""
    candidates = [{"num_warps": warps} for warps in calls if warps != 4]
    return tune.Task(KERNEL, 16, width, candidates, lambda: calls[warps_of(arch, width)])


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[dict]], Path]]:
    """Puts rows in a file of their own, which the library and the tuner take for `launch.json`."""
    path = tmp_path / "launch.json"

    def use(rows: list[dict]) -> Path:
        tune.write(rows, path)
        monkeypatch.setattr(launch, "TABLE", path)
        launch.forget()
        return path

    yield use
    monkeypatch.undo()
    launch.forget()


@pytest.mark.parametrize(
    ("times", "wanted"), [({1: 3, 2: 1, 4: 2, 8: 1.5}, 2), ({1: 3, 2: 1.99, 4: 2, 8: 5}, None), ({4: 2, 8: 1}, 8)]
)
def test_only_a_clear_gain_changes_the_settings(table, times: dict[int, float], wanted: int | None) -> None:  # type: ignore[no-untyped-def]
    kept = {"num_warps": 4, "KEYS": 64}
    table([{**row(80, 256, 4), "settings": kept}])
    found = tune.tune(task_of({warps: Call(ms) for warps, ms in times.items()}), 90, 0.02, measured)
    assert found == (None if wanted is None else {**kept, "num_warps": wanted}, [], None)


@pytest.mark.parametrize(
    ("rows", "added"),
    [
        # Of an older architecture both: a row of this one alone would take width 64 with it.
        ([row(80, 64, 2), row(80, 256, 4)], [row(90, 64, 2), row(90, 256, 1)]),
        # The row that is replaced served width 64 too, as this architecture's only one.
        ([row(80, 64, 2), row(80, 256, 8), row(90, 256, 4)], [row(90, 64, 4), row(90, 256, 1)]),
        # A row of its own needs no copy, and neither does one that would say the same.
        ([row(80, 256, 4), row(90, 64, 2)], [row(90, 64, 2), row(90, 256, 1)]),
        ([row(80, 64, 1), row(80, 256, 4)], [row(90, 256, 1)]),
        # What another architecture tells apart is a call of its own here too.
        ([row(80, 64, 4), row(80, 256, 4), row(120, 128, 2)], [row(90, 128, 4), row(90, 256, 1)]),
        # The copy for 128 would take width 64, which the new row alone leaves as it was.
        ([row(80, 64, 1), row(80, 128, 2), row(80, 256, 4)], [row(90, 64, 1), row(90, 128, 2), row(90, 256, 1)]),
    ],
)
def test_a_new_row_changes_what_serves_no_other_call(table, rows: list[dict], added: list[dict]) -> None:  # type: ignore[no-untyped-def]
    others = [row(80, 256, 16, bits=32), row(100, 64, 16)]
    path = table([*rows, *others])
    every = [(arch, width, bits) for arch in (80, 90, 100) for width in range(1, 257) for bits in (16, 32)]
    before = {call: warps_of(*call) for call in every}
    assert tune.run([task_of({1: Call(1), 4: Call(2)})], 90, 0.02, measured) == 0
    assert [one for one in json.loads(path.read_text()) if one["arch"] == 90] == added
    changed = {call for call in every if warps_of(*call) != before[call]}
    largest = max([one["width"] for one in rows if one["width"] < 256])
    assert changed <= {(arch, width, 16) for arch in (90, 100) for width in range(largest + 1, 257)}
    assert (90, 256, 16) in changed
    assert (100, 64, 16) not in changed


def test_no_winner_leaves_the_file_alone(table) -> None:  # type: ignore[no-untyped-def]
    path = table([row(80, 64, 2), row(80, 256, 4)])
    path.write_text(before := json.dumps(json.loads(path.read_text())))  # in a layout that `write` never makes
    assert tune.run([task_of({1: Call(3), 4: Call(2)})], 90, 0.02, measured) == 0
    assert path.read_text() == before


def test_a_wrong_answer_is_passed_over_untimed(table, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    path = table([row(80, 256, 4)])
    right = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    wrong = right.clone()
    wrong[3, 5] += 1
    timed = []

    def time(call) -> float:  # type: ignore[no-untyped-def]
        timed.append(call.ms)
        return call.ms

    calls = {1: Call(1, (wrong, None)), 2: Call(1.5, (right * 1.001, None)), 4: Call(2, (right, None))}
    assert tune.run([task_of(calls)], 90, 0.02, time) == 0
    assert timed == [2, 1.5]
    assert json.loads(path.read_text())[-1] == row(90, 256, 2)
    assert "{'num_warps': 1}: passed over, WrongAnswerError: result 0: 0.20% of the elements" in capsys.readouterr().out


def test_what_counts_as_a_wrong_answer() -> None:
    torch.manual_seed(0)
    wanted = torch.randn(64, 128)
    fine, coarse = tune.TOLERANCE[32], tune.TOLERANCE[16]
    assert tune.difference(wanted + 1e-6, wanted, fine) is None
    assert tune.difference(wanted.bfloat16().float(), wanted, fine)
    assert tune.difference(wanted.bfloat16().nextafter(torch.zeros(()).bfloat16()), wanted.bfloat16(), coarse) is None
    assert tune.difference(wanted.bfloat16() * 1.1, wanted.bfloat16(), coarse)
    # One wrong row of many, small beside the others; NaN; an infinity out of place, and one in its place.
    small = wanted * torch.logspace(0, -2, 64)[:, None]
    assert tune.difference(small.index_fill(0, torch.tensor(63), 0.0), small, fine)
    assert tune.difference(wanted.index_fill(0, torch.tensor(1), torch.nan), wanted, coarse)
    infinite = wanted.index_fill(0, torch.tensor(2), torch.inf)
    assert tune.difference(infinite, wanted, coarse)
    assert tune.difference(wanted, infinite, coarse)
    assert tune.difference(infinite.clone(), infinite, fine) is None
    assert tune.difference(torch.empty(0), torch.empty(0), fine) is None
    places = torch.arange(8192)
    assert tune.difference(places.index_fill(0, torch.tensor(7), 0), places, fine) is None
    assert tune.difference(places.roll(1), places, fine)
    for got, other in (
        ((wanted,), (wanted, None)),
        (None, wanted),
        (wanted.double(), wanted),
        ((wanted, 1), (wanted, None)),
    ):
        assert tune.difference(got, other, coarse)


def errors() -> list[Exception]:
    """What bad settings were seen to fail with, or can."""
    resources = triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
    ptxas = triton.runtime.errors.PTXASError("Internal Triton PTX codegen error\n`ptxas` stderr:\nregisters")
    compilation = triton.compiler.errors.CompilationError("source", ast.Constant(1), "too large")
    plain = [RuntimeError("PassManager::run failed"), RuntimeError("Triton Error [CUDA]: invalid argument")]
    python = [ValueError("numel"), AssertionError(), IndexError("map::at"), torch.OutOfMemoryError("out of memory")]
    return [resources, ptxas, compilation, *plain, *python]


def test_candidates_that_fail_are_passed_over_and_listed(table, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    table([row(80, 256, 4)])
    calls = {4: Call(2), **{100 + index: Call(1, error) for index, error in enumerate(errors())}, 8: Call(1)}
    found = tune.tune(task_of(calls), 90, 0.02, measured)
    printed = capsys.readouterr().out
    assert found.settings == {"num_warps": 8}
    assert [change["num_warps"] for change, _ in found.passed_over] == list(range(100, 100 + len(errors())))
    for (_, reason), error in zip(found.passed_over, errors(), strict=True):
        assert reason.startswith(type(error).__name__)
        assert "\n" not in reason
        assert f"passed over, {reason}\n" in printed
    assert "registers" in found.passed_over[1][1]


def test_a_failure_while_timing_is_one_too(table) -> None:  # type: ignore[no-untyped-def]
    table([row(80, 256, 4)])

    def time(call) -> float:  # type: ignore[no-untyped-def]
        if call.ms == 1:
            raise RuntimeError("launch failed")
        return call.ms

    found = tune.tune(task_of({4: Call(2), 1: Call(1)}), 90, 0.02, time)
    assert found == (None, [({"num_warps": 1}, "RuntimeError: launch failed")], None)


def test_an_interrupt_goes_through(table) -> None:  # type: ignore[no-untyped-def]
    path = table([row(80, 256, 4)])
    before = path.read_text()
    with pytest.raises(KeyboardInterrupt):
        tune.run([task_of({4: Call(2), 1: Call(1, KeyboardInterrupt())})], 90, 0.02, measured)
    assert path.read_text() == before


def test_a_poisoned_context_ends_the_run_with_what_was_found_written(  # type: ignore[no-untyped-def]
    table, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table([row(80, 64, 4), row(80, 256, 4)])
    illegal = RuntimeError("CUDA error: an illegal memory access was encountered")
    happened: list[Call] = []

    class Poisoning(Call):
        def __call__(self) -> object:
            happened.append(self)
            raise illegal

    monkeypatch.setattr(tune, "poison", lambda: illegal if happened else None)
    first = task_of({1: Call(9), 4: Call(2, None), 8: Call(1)}, width=64)
    second = task_of({2: Call(1), 4: Call(2), 8: Poisoning(0.5), 16: Call(0.1)})
    never = task_of({4: Call(1, AssertionError("reached"))})
    assert tune.run([first, second, never], 90, 0.02, measured) == 1
    assert json.loads(path.read_text())[2:] == [row(90, 64, 8), row(90, 256, 2)]
    printed = capsys.readouterr()
    assert "the GPU answers no further call: RuntimeError: CUDA error: an illegal memory access" in printed.err
    assert "{'num_warps': 8}: passed over, RuntimeError: CUDA error" in printed.out


@pytest.mark.parametrize(("failures", "poisoned"), [(0, False), (1, False), (9, True)])
def test_only_an_error_that_stays_is_poison(monkeypatch: pytest.MonkeyPatch, failures: int, poisoned: bool) -> None:
    left = [RuntimeError("CUDA error: unspecified launch failure")] * failures

    def synchronize() -> None:
        if left:
            raise left.pop()

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert (tune.poison() is not None) == poisoned


def test_where_todays_settings_fail_the_others_are_still_tuned(table, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    path = table([row(80, 64, 4), row(80, 256, 4)])
    broken = task_of({4: Call(2, RuntimeError("no")), 1: Call(1)}, width=64)
    assert tune.run([broken, task_of({4: Call(2), 1: Call(1)})], 90, 0.02, measured) == 1
    assert json.loads(path.read_text())[2:] == [row(90, 64, 4), row(90, 256, 1)]
    assert "decode_forward cannot be measured: RuntimeError: no" in capsys.readouterr().err


def test_every_candidate_gets_the_same_inputs(table) -> None:  # type: ignore[no-untyped-def]
    task = tune.Task(KERNEL, 32, 256, [{"num_warps": 8}], lambda: Call(1, torch.randn(100)))
    table([row(80, 256, 4, bits=32)])
    assert tune.tune(task, 90, 0.02, measured).passed_over == []


def test_rewrites_one_row(tmp_path: Path) -> None:
    rows = [dict(one) for one in launch.rows()]
    replaced = tune.replace_row(rows, "attention_forward", 90, 16, 64, {"num_warps": 2})
    assert len(replaced) == len(rows)
    assert sum(one != other for one, other in zip(replaced, rows, strict=True)) == 1
    added = tune.replace_row(rows, "attention_forward", 89, 16, 64, {"num_warps": 2})
    assert len(added) == len(rows) + 1
    unordered = [row(90, 256, 1), row(90, 64, 2)]
    assert tune.replace_row(unordered, KERNEL, 90, 16, 64, {"num_warps": 8}) == [row(90, 256, 1), row(90, 64, 8)]
    path = tmp_path / "launch.json"
    tune.write(added, path)
    assert json.loads(path.read_text()) == added


def test_table_is_found_by_architecture_and_width() -> None:
    assert launch.settings_for("attention_forward", 89, 16, 64) == launch.settings_for("attention_forward", 80, 16, 33)
    with pytest.raises(ValueError, match="no row for kernel 'attention_forward' at architecture 70"):
        launch.settings_for("attention_forward", 70, 16, 64)
    for row in launch.rows():
        found = launch.settings_for(row["kernel"], row["arch"], row["bits"], row["width"])
        assert found == row["settings"]


def test_no_row_for_a_larger_width_takes_the_place_of_an_older_one() -> None:
    """Architecture comes before width: a row for wide calls comes with that architecture's own for narrower ones."""
    table = launch.rows()
    for row in table:
        kernel, bits, width = row["kernel"], row["bits"], row["width"]
        for arch in {other["arch"] for other in table if other["kernel"] == kernel and other["arch"] > row["arch"]}:
            serving = launch.serving_row(table, kernel, arch, bits, width)
            assert serving is not None
            assert serving["width"] == width, f"sm_{arch}: {serving} serves in the place of {row}"


def test_every_row_of_the_table_has_a_task() -> None:
    tasks = {(task.kernel, task.bits, task.width): task for task in tune.all_tasks()}
    assert tasks.keys() == {(row["kernel"], row["bits"], row["width"]) for row in launch.rows()}
    for task in tasks.values():
        known = launch.settings_for(task.kernel, 90, task.bits, task.width).keys() | {"full_tiles_at_once"}  # else 1
        assert all(change.keys() <= known for change in task.candidates), task.kernel


def test_no_call_of_the_table_changes_with_any_row_tuned() -> None:
    for task in tune.all_tasks():
        for arch in (80, 90, 100):
            after = tune.with_settings(launch.rows(), task.kernel, arch, task.bits, task.width, {"new": 1})
            for bits, width in launch.served(task.kernel):
                row = launch.serving_row(after, task.kernel, arch, bits, width)
                if (bits, width) == (task.bits, task.width):
                    assert row is not None
                    assert row["settings"] == {"new": 1}
                else:
                    assert row is not None
                    assert row["settings"] == launch.settings_for(task.kernel, arch, bits, width)


def test_candidates_reach_every_launch() -> None:
    seen = []

    def prepare():  # type: ignore[no-untyped-def]
        cpu = torch.device("cpu")
        return lambda: seen.append(
            (
                triton_tiles.constants("gumbel_forward", cpu, torch.bfloat16, 256, 128)["num_warps"],
                triton_vq._constants("vq_forward", cpu, torch.bfloat16, 128)["num_warps"],
            )
        )

    for kernel in ("gumbel_forward", "vq_forward"):
        task = tune.Task(kernel, 16, 128, tune.product(num_warps=(1, 2)), prepare)
        tune.tune(task, 90, 0.02, lambda call: 1.0)
    assert seen == [(8, 8), (1, 8), (2, 8), (8, 8), (8, 1), (8, 2)]
