"""Measures the launch settings of Triton kernels on the GPU that is here, and rewrites its rows of `launch.json`.

    python -m benchmarks.tune                              # every kernel whose room has candidates
    python -m benchmarks.tune --kernel attention_forward --width 64 --bits 16

Each `benchmarks/tune_*.py` contributes a function `tasks()` of `Task`s. A kernel keeps its row unless a candidate is
faster by `--margin`; candidates that do not compile or do not fit are passed over. The new rows are written for the
architecture of this GPU, and those of older architectures stay. Run `benchmarks.aot --write` afterwards: it tells
whether a new row spills registers.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton

from dalle_kernels import launch

Settings = Mapping[str, int]


class Task(NamedTuple):
    """One row of the table and how to time it.

    Attributes:
        kernel, bits, width: the row's key besides the architecture.
        candidates: settings to try, each a change of the row that serves now.
        prepare: makes inputs on the GPU and returns the call to time; called once per candidate.
    """

    kernel: str
    bits: int
    width: int
    candidates: Sequence[Settings]
    prepare: Callable[[], Callable[[], object]]


def product(**choices: Sequence[int]) -> list[dict[str, int]]:
    """Every combination of the choices."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def all_tasks() -> Iterator[Task]:
    for path in sorted(Path(__file__).parent.glob("tune_*.py")):
        yield from importlib.import_module(f"benchmarks.{path.stem}").tasks()


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of `call` on the GPU, after a warm-up that also compiles it."""
    return statistics.median(triton.testing.do_bench(call, warmup=50, rep=200, return_mode="all"))


def tune(
    task: Task, arch: int, margin: float, time: Callable[[Callable[[], object]], float] = milliseconds
) -> Settings:
    """The best settings of `task`: those of today unless a candidate beats them by `margin` (0.02 is two percent)."""
    today = dict(launch.settings_for(task.kernel, arch, task.bits, task.width))
    best, best_time = today, _time_with(task, today, time)
    limit = best_time * (1 - margin)
    for change in task.candidates:
        settings = {**today, **change}
        try:
            taken = _time_with(task, settings, time)
        except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError) as error:
            print(f"  {change}: {type(error).__name__}")
            continue
        print(f"  {change}: {taken:.4f} ms", flush=True)
        if taken < min(limit, best_time):
            best, best_time = settings, taken
    return best


def _time_with(task: Task, settings: Settings, time: Callable[[Callable[[], object]], float]) -> float:
    lookup = launch.settings_for

    def instead(kernel: str, arch: int, bits: int, width: int) -> Settings:
        return settings if kernel == task.kernel else lookup(kernel, arch, bits, width)

    with mock.patch.object(launch, "settings_for", instead):
        _forget_plans()
        try:
            return time(task.prepare())
        finally:
            _forget_plans()


def _forget_plans() -> None:
    """Empties what the library's launchers remember of their settings."""
    for name, module in list(sys.modules.items()):
        if name.startswith("dalle_kernels."):
            for value in vars(module).values():
                if getattr(value, "__module__", None) == name and hasattr(value, "cache_clear"):
                    value.cache_clear()


def replace_row(rows: list[dict], kernel: str, arch: int, bits: int, width: int, settings: Settings) -> list[dict]:
    """`rows` with this row in place of the one of the same key, or after the last of its kernel."""
    key = {"kernel": kernel, "arch": arch, "bits": bits, "width": width}
    row = {**key, "settings": dict(settings)}
    for index, old in enumerate(rows):
        if all(old[name] == value for name, value in key.items()):
            return [*rows[:index], row, *rows[index + 1 :]]
    after = max((index for index, old in enumerate(rows) if old["kernel"] == kernel), default=len(rows) - 1) + 1
    return [*rows[:after], row, *rows[after:]]


def write(rows: list[dict], path: Path = launch.TABLE) -> None:
    """Writes the table, one row a line."""
    temporary = path.with_suffix(".json.new")
    temporary.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n")
    temporary.rename(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kernel", default="", help="only kernels whose name holds this")
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--width", type=int, nargs="+", help="only rows of these widths")
    parser.add_argument("--margin", type=float, default=0.02, help="what a change must gain to be taken")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: there is no CUDA device here, and settings are only measured, never guessed", file=sys.stderr)
        return 2
    arch = launch.architecture(torch.device("cuda", torch.cuda.current_device()))
    for task in all_tasks():
        wanted = options.kernel in task.kernel and task.bits in options.bits
        if not wanted or (options.width and task.width not in options.width):
            continue
        print(f"{task.kernel}, sm_{arch}, {task.bits} bits, width {task.width}", flush=True)
        settings = tune(task, arch, options.margin)
        write(replace_row([dict(row) for row in launch.rows()], task.kernel, arch, task.bits, task.width, settings))
        launch.forget()
    return 0


if __name__ == "__main__":
    sys.exit(main())
