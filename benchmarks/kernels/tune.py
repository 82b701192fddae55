"""Measures the launch settings of Triton kernels on the GPU that is here, and rewrites its rows of `launch.json`.

    python -m benchmarks tune                              # every kernel whose room has candidates
    python -m benchmarks tune --kernel attention_forward --width 64 --bits 16

Each `tune_*.py` here contributes a function `tasks()` of `Task`s. A candidate's answer is compared with that of
the settings that serve the call today, on the same inputs, before it is timed. One that is wrong or fails (it does not
compile, does not fit, cannot be launched) is passed over and listed with the reason.

A row is written, for the architecture of this GPU, only where a candidate is faster than today's settings by
`--margin`, and as soon as its task is done. Rows of older architectures stay. What serves other widths on this
architecture stays too: a new row would also serve narrower calls that had a row of an older architecture or shared the
row replaced, so their settings are copied to rows of their own. (Newer architectures without a row for the call follow
the new one.)

An error after which the GPU's context answers nothing ends the run, with what was found until then written. The exit
status is 1 then, and where today's own settings fail. Run `python -m benchmarks aot --write` afterwards: it tells
whether a new row spills registers.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton

from dalle_kernels.backends import launch

Settings = Mapping[str, int]

# By the size of an input's element. Results are rounded to it, and so are factors of products inside (at 16 bits), so
# a few units in the last place; 32 bits allow for sums of thousands of terms in another order, but not for one product
# of tf32 where there should be three.
TOLERANCE = {16: 2.0**-6, 32: 2.0**-12}


class Task(NamedTuple):
    """One row of the table and how to time it.

    Attributes:
        kernel, bits, width: the row's key besides the architecture.
        candidates: settings to try, each a change of the row that serves now.
        prepare: makes inputs on the GPU and returns the call to time; called once per candidate, each time after the
            same seed for torch's generators. The call returns its answer: tensors, None, or sequences of these.
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
        yield from importlib.import_module(f"benchmarks.kernels.{path.stem}").tasks()


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of `call` on the GPU, after a warm-up that also compiles it."""
    return statistics.median(triton.testing.do_bench(call, warmup=50, rep=200, return_mode="all"))


class Found(NamedTuple):
    """What tuning a task came to.

    Attributes:
        settings: of the fastest candidate; None where none is clearly faster than today's settings.
        passed_over: the changes that failed or gave a wrong answer, each with the reason.
        stopped: the error that the GPU answers every call with by now; None where it can go on.
    """

    settings: Settings | None
    passed_over: list[tuple[Settings, str]]
    stopped: Exception | None


class WrongAnswerError(Exception):
    """A candidate computes something else than the settings of today do."""


def tune(task: Task, arch: int, margin: float, time: Callable[[Callable[[], object]], float]) -> Found:
    """The candidate of `task` that beats today's settings by `margin` (0.02 is two percent) and every other candidate.

    Raises:
        Exception: whatever today's settings fail with, as there is nothing to compare with then.
    """
    today = dict(launch.settings_for(task.kernel, arch, task.bits, task.width))
    with _prepared(task, today) as call:
        answer = call()
        best, best_time = None, time(call) * (1 - margin)
    passed_over: list[tuple[Settings, str]] = []
    for change in task.candidates:
        settings = {**today, **change}
        try:
            with _prepared(task, settings) as call:
                if complaint := difference(call(), answer, TOLERANCE[task.bits]):
                    raise WrongAnswerError(complaint)
                taken = time(call)
        # Compilers and drivers have many ways to refuse a bad setting. What is wrong with the task itself does not end
        # here: it came up with today's settings.
        except Exception as error:
            passed_over.append((change, _reason(error)))
            print(f"  {change}: passed over, {passed_over[-1][1]}", flush=True)
            if stopped := poison():
                return Found(best, passed_over, stopped)
            continue
        print(f"  {change}: {taken:.4f} ms", flush=True)
        if taken < best_time:
            best, best_time = settings, taken
    return Found(best, passed_over, None)


def poison() -> Exception | None:
    """The error that the CUDA context answers everything with, if it does: after a bad access nothing works again."""
    found: Exception | None = None
    if torch.cuda.is_initialized():
        for _ in range(2):  # the first may only report what was left by the failure itself
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                found = error
            else:
                return None
    return found


def _reason(error: Exception) -> str:
    """One line; of a long message its ends, as compilers put source or commands in between."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: " + (text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}")


def difference(got: object, wanted: object, tolerance: float) -> str | None:
    """What is wrong with an answer, or None where it is that of today's settings up to rounding.

    An element may be off by `tolerance` times the sum of its own size, the typical size in its row (the last
    dimension) and that in the tensor: sums that cancel keep the rounding of their terms. Of integers, which are places
    of a maximum, one in a thousand may be another, where two are as large up to rounding.
    """
    if isinstance(wanted, torch.Tensor):
        if not isinstance(got, torch.Tensor) or (got.shape, got.dtype) != (wanted.shape, wanted.dtype):
            return f"got {_kind(got)}, wanted {_kind(wanted)}"
        if not wanted.numel():
            return None
        if not wanted.is_floating_point():
            share = (got != wanted).float().mean().item()
            return f"{share:.2%} of the integers differ" if share > 0.001 else None
        got, wanted = got.float(), wanted.float()
        square = wanted.square().nan_to_num(0.0, 0.0, 0.0)
        typical = square.mean(-1, keepdim=True).sqrt() + square.mean().sqrt() if wanted.dim() else square.sqrt()
        allowed = tolerance * (wanted.abs() + typical)
        alike = ((got - wanted).abs() <= allowed) & wanted.isfinite() | (got == wanted) | got.isnan() & wanted.isnan()
        if alike.all():
            return None
        off = ((got - wanted).abs() / allowed.clamp_min(torch.finfo(torch.float32).tiny))[~alike].max().item()
        return f"{(~alike).float().mean().item():.2%} of the elements are off, up to {off:.3g} times what is allowed"
    if isinstance(wanted, tuple | list):
        if not isinstance(got, tuple | list) or len(got) != len(wanted):
            return f"got {_kind(got)}, wanted {_kind(wanted)}"
        complaints = (difference(one, other, tolerance) for one, other in zip(got, wanted, strict=True))
        return next((f"result {index}: {what}" for index, what in enumerate(complaints) if what), None)
    return None if got is wanted else f"got {_kind(got)}, wanted {_kind(wanted)}"


def _kind(answer: object) -> str:
    if isinstance(answer, torch.Tensor):
        return f"{answer.dtype} {list(answer.shape)}"
    return f"{len(answer)} results" if isinstance(answer, tuple | list) else type(answer).__name__


@contextlib.contextmanager
def _prepared(task: Task, settings: Settings) -> Iterator[Callable[[], object]]:
    """The call of `task`, on the same inputs each time; inside, its kernel is launched with these settings."""
    lookup = launch.settings_for

    def instead(kernel: str, arch: int, bits: int, width: int) -> Settings:
        return settings if kernel == task.kernel else lookup(kernel, arch, bits, width)

    with mock.patch.object(launch, "settings_for", instead):
        _forget_plans()
        try:
            torch.manual_seed(0)
            yield task.prepare()
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
    """`rows` with this row in place of the one of the same key, before wider ones, or after the last of its kernel."""
    key = {"kernel": kernel, "arch": arch, "bits": bits, "width": width}
    row = {**key, "settings": dict(settings)}
    for index, old in enumerate(rows):
        if all(old[name] == value for name, value in key.items()):
            return [*rows[:index], row, *rows[index + 1 :]]
    of_kernel = [index for index, old in enumerate(rows) if old["kernel"] == kernel]
    wider = (
        index
        for index in of_kernel
        if (rows[index]["arch"], rows[index]["bits"]) == (arch, bits) and rows[index]["width"] > width
    )
    place = next(wider, max(of_kernel, default=len(rows) - 1) + 1)
    return [*rows[:place], row, *rows[place:]]


def with_settings(
    rows: Sequence[Mapping], kernel: str, arch: int, bits: int, width: int, settings: Settings
) -> list[dict]:
    """`rows` with these settings for one (bits, width) of an architecture, and what it had for every other."""
    before = [dict(row) for row in rows]
    after = replace_row(before, kernel, arch, bits, width, settings)
    # Calls between two widths of the table go by the upper one, so the table's widths stand for all. Widest first, as a
    # copy can in turn take over what is narrower.
    narrower = {
        row["width"] for row in before if (row["kernel"], row["bits"]) == (kernel, bits) and row["width"] < width
    }
    for other in sorted(narrower, reverse=True):
        served = launch.serving_row(before, kernel, arch, bits, other)
        now = launch.serving_row(after, kernel, arch, bits, other)
        if served is not None and now is not None and served["settings"] != now["settings"]:
            after = replace_row(after, kernel, arch, bits, other, served["settings"])
    return after


def write(rows: list[dict], path: Path | None = None) -> None:
    """Writes the table, `launch.json` unless told otherwise, one row a line."""
    path = launch.TABLE if path is None else path
    temporary = path.with_suffix(".json.new")
    temporary.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n")
    temporary.rename(path)


def run(tasks: Iterable[Task], arch: int, margin: float, time: Callable[[Callable[[], object]], float]) -> int:
    """Tunes the tasks one after another, and writes what each found before the next begins. Returns an exit status."""
    status = 0
    for task in tasks:
        print(f"{task.kernel}, sm_{arch}, {task.bits} bits, width {task.width}", flush=True)
        try:
            found = tune(task, arch, margin, time)
        except Exception as error:  # today's settings: the other kernels can still be tuned
            print(f"tune: {task.kernel} cannot be measured: {_reason(error)}", file=sys.stderr)
            found, status = Found(None, [], poison()), 1
        if found.settings is not None:
            write(with_settings(launch.rows(), task.kernel, arch, task.bits, task.width, found.settings))
            launch.forget()
            print(f"  written: {dict(found.settings)}", flush=True)
        if found.passed_over:
            print(f"  passed over: {len(found.passed_over)} of {len(task.candidates)} candidates", flush=True)
        if found.stopped:
            print(f"tune: the GPU answers no further call: {_reason(found.stopped)}", file=sys.stderr)
            return 1
    return status


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
    wanted = (
        task
        for task in all_tasks()
        if options.kernel in task.kernel
        and task.bits in options.bits
        and (not options.width or task.width in options.width)
    )
    return run(wanted, arch, options.margin, milliseconds)


if __name__ == "__main__":
    sys.exit(main())
