"""The one harness: checks answers, then times contenders side by side, and writes what it saw.

A benchmark is a list of cells. A cell is one computation on one input, with contenders that all perform it; the first
contender is ours, and every ratio refers to it. For each cell the harness

1. makes each contender ready and calls it once: whatever that raises becomes the contender's row;
2. compares its answer with the truth: a wrong answer is a row that says so, and is not timed;
3. times those that remain in turn, round after round, so that drifting clocks and neighbours hit all alike, each on
   rotating copies of its input where the cell is bound by memory;
4. prints and saves the cell's rows before the next cell begins.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from statistics import median
from typing import Any

import torch

from benchmarks.harness.ceilings import Ceiling, ceiling_of
from benchmarks.harness.cells import Cell, Contender, Options, TooSlowError, Trial, UnavailableError, Work
from benchmarks.harness.machine import commit, label, machine, versions
from benchmarks.harness.memory import peak_memory
from benchmarks.harness.records import Recorder
from benchmarks.harness.timing import GpuTimer, Timer, interleave, quantile, timer_of


class Bench:
    """Runs cells on one device, prints and records them."""

    def __init__(self, options: Options, recorder: Recorder, command: str = "", say: Callable[[str], None] = print):
        self.options, self.recorder, self.say = options, recorder, say
        self.run_id = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        self.command = command
        self.interrupted = False
        self._begun = time.perf_counter()
        self._done = self._expected = 0
        self._given_up: dict[tuple[str, str], str] = {}

    def begin(self) -> None:
        """Records on what machine, with what, at which commit."""
        facts = {
            "kind": "run",
            "run": self.run_id,
            "command": self.command,
            "machine": machine(self.options.device),
            "versions": versions(),
            "commit": commit(),
        }
        self.recorder.add([facts])
        self.say(f"{label(facts['machine'])}, commit {facts['commit']}")

    def expect(self, cells: int) -> None:
        """How many cells all calls of `run` will have together, for the progress line."""
        self._expected = cells

    def run(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """Every cell in turn. Ctrl-C ends the run and keeps what was measured, the current cell's rounds included."""
        rows: list[dict[str, Any]] = []
        total = max(self._expected, self._done + len(cells))
        for cell in cells:
            spent = time.perf_counter() - self._begun
            left = f", about {spent / self._done * (total - self._done):.0f} s left" if self._done else ""
            self._progress(f"[{self._done + 1}/{total}{left}] {cell}")
            rows += self._cell(cell)
            self._done += 1
            if self.interrupted:
                self.say("interrupted: what was measured is kept")
                break
        self._progress("")
        return rows

    def _cell(self, cell: Cell) -> list[dict[str, Any]]:
        work = cell.work()
        rows: list[dict[str, Any]] = []
        trials: dict[str, Trial] = {}
        timers: dict[str, Timer] = {}
        device = self.options.device
        # One stream for everything: autograd runs a backward pass on its forward's stream, and so captures it.
        stream = torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else contextlib.nullcontext()
        samples: dict[str, list[float]] = {}
        with stream:
            for number, contender in enumerate(cell.contenders()):
                if number and self.options.only and contender.name not in self.options.only:
                    continue
                row: dict[str, Any] = {"contender": contender.name}
                rows.append(row)
                try:
                    self._ready(cell, contender, row, trials, timers)
                except KeyboardInterrupt:
                    self.interrupted = True
                    break
            ceiling = ceiling_of(work.ceiling, cell.dtype, device)
            if timers and (work.flops or work.bytes):
                for name, run in ceiling.runs.items():
                    timers[f"ceiling: {name}"] = timer_of([run], device)
            try:
                # After an interruption one short turn of those that are ready is still worth having.
                for taken in interleave(timers, 0.0 if self.interrupted else self.options.seconds):
                    samples = taken
            except KeyboardInterrupt:
                self.interrupted = True
        bounds = [median(taken) for name, taken in samples.items() if name.startswith("ceiling: ")]
        for row in rows:
            taken = samples.get(row["contender"], [])
            if taken:
                self._figures(row, taken, work, ceiling, min(bounds, default=None))
                for name, count in trials[row["contender"]].counts.items():
                    row[f"{name}_per_s"] = count / row["ms"] * 1e3
            elif "status" not in row:
                row |= {"status": "interrupted", "reason": "before it was timed"}
        ours = rows[0].get("ms") if rows else None
        for row in rows:
            if ours and "ms" in row:
                row["ratio"] = row["ms"] / ours
        if cell.finish is not None and rows:
            rows[0] |= cell.finish({row["contender"]: row for row in rows if "ms" in row})
        common = {"kind": "row", "run": self.run_id, "suite": cell.suite, "case": cell.case}
        pairs = {"visible_pairs": work.visible_pairs, "executed_pairs": work.executed_pairs}
        records = [common | pairs | {"flops": work.flops, "bytes": work.bytes} | row for row in rows]
        self.recorder.add(records)
        self._print(cell, work, rows)
        trials.clear()
        timers.clear()
        torch._dynamo.reset()  # compiled functions of this cell are not wanted again
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return records

    def _ready(
        self,
        cell: Cell,
        contender: Contender,
        row: dict[str, Any],
        trials: dict[str, Trial],
        timers: dict[str, Timer],
    ) -> None:
        """Prepares, calls once, checks, sizes up; or writes into `row` why not."""
        key = (cell.series, contender.name)
        device = self.options.device
        if cell.series and key in self._given_up:
            row |= {"status": "skipped", "reason": f"gave up at a smaller size: {self._given_up[key]}"}
            return
        try:
            trial = contender.prepare()
            start = time.perf_counter()
            trial.runs[0]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            row["first_call_s"] = time.perf_counter() - start
            row |= trial.notes
            check = trial.verify()
            row |= {"error": check.error, "allowed_error": check.allowed}
            if not check.passed:
                row |= {"status": "wrong", "reason": f"error {check.error:.2g}, allowed {check.allowed:.2g}"}
                return
            start = time.perf_counter()
            if trial.elsewhere:
                trial.runs[0]()
            else:
                row["peak_bytes"] = peak_memory(trial.runs[0], device)
            if time.perf_counter() - start > self.options.patience:
                raise TooSlowError(f"one call took {time.perf_counter() - start:.0f} s")
            timer = timer_of(trial.runs, device)
            if isinstance(timer, GpuTimer):
                row["cuda_graph"] = timer.captured
            trials[contender.name], timers[contender.name] = trial, timer
        except UnavailableError as reason:
            row |= {"status": "skipped", "reason": str(reason)}
        except (TooSlowError, MemoryError, torch.OutOfMemoryError) as error:
            self._give_up(key, row, error)
        except Exception as error:  # a contender's failure of any kind is its row, and never ends the run
            if "memory" in str(error).lower():
                self._give_up(key, row, error)
            else:
                row |= {"status": "failed", "reason": _first_line(error)}

    def _give_up(self, key: tuple[str, str], row: dict[str, Any], error: Exception) -> None:
        status = "too slow" if isinstance(error, TooSlowError) else "out of memory"
        self._given_up[key] = status
        row |= {"status": status, "reason": _first_line(error)}

    def _figures(
        self, row: dict[str, Any], samples: list[float], work: Work, ceiling: Ceiling, bound: float | None
    ) -> None:
        ms = median(samples)
        row |= {
            "status": "ok",
            "ms": ms,
            "p20_ms": quantile(samples, 0.2),
            "p80_ms": quantile(samples, 0.8),
            "samples": len(samples),
        }
        if work.flops:
            row["tflops"] = work.flops / ms / 1e9
        if work.bytes:
            row["gbs"] = work.bytes / ms / 1e6
        rate = row.get("gbs") if work.ceiling == "copy" else row.get("tflops")
        if bound is not None and rate:
            row |= {"ceiling": ceiling.name, "ceiling_rate": ceiling.rate(bound)}
            row["ceiling_fraction"] = rate / row["ceiling_rate"]

    def _print(self, cell: Cell, work: Work, rows: Sequence[dict[str, Any]]) -> None:
        self._progress("")
        pairs = f"; {work.visible_pairs:,} visible pairs" if work.visible_pairs else ""
        if work.executed_pairs:
            pairs += f", {work.executed_pairs:,} executed in tiles"
        flops = f"; {work.flops / 1e9:.3g} GFLOP" if work.flops else ""
        self.say(f"\n{cell}{pairs}{flops}")
        bound = next((row for row in rows if "ceiling_rate" in row), None)
        unit = "GB/s" if work.ceiling == "copy" else "TFLOP/s"
        if bound is not None:
            self.say(f"{bound['ceiling']} beside it: {bound['ceiling_rate']:.3g} {unit}")
        self.say(f"{'ratio':>8} {'ms':>9} {'p20':>9} {'p80':>9} {unit:>8} {'ceiling':>8} {'peak MB':>8}  contender")
        absent: dict[str, list[str]] = {}
        for row in rows:
            if row["status"] == "skipped":
                absent.setdefault(row["reason"], []).append(row["contender"])
            else:
                self.say(format_row(row, work))
        for reason, names in absent.items():
            self.say(f"{'-':>8} skipped, {reason}: {'; '.join(names)}")

    def _progress(self, text: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\r\033[K" + text[:150])
        elif text:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()


def format_row(row: dict[str, Any], work: Work) -> str:
    """One line of a cell's table, ratio first."""
    if row["status"] != "ok":
        return f"{'-':>8} {row['status'] + ': ' + row['reason']:<63}  {row['contender']}"
    rate = row.get("gbs") if work.ceiling == "copy" else row.get("tflops")
    peak = row.get("peak_bytes")
    columns = [
        f"{row['ratio']:>7.2f}x" if "ratio" in row else f"{'-':>8}",
        f"{row['ms']:>9.4g}",
        f"{row['p20_ms']:>9.4g}",
        f"{row['p80_ms']:>9.4g}",
        f"{rate:>8.3g}" if rate else f"{'-':>8}",
        f"{row['ceiling_fraction']:>7.0%} " if "ceiling_fraction" in row else f"{'-':>8}",
        f"{peak / 1e6:>8.1f}" if peak is not None else f"{'-':>8}",
    ]
    notes = [f"{row['first_call_s']:.1f} s first call"] if row.get("first_call_s", 0) > 1 else []
    notes += [f"{row['block_mask_ms']:.0f} ms block mask"] if "block_mask_ms" in row else []
    notes += [row["note"]] if "note" in row else []
    notes += [f"{value:.3g} {name[:-6]} a second" for name, value in row.items() if name.endswith("_per_s")]
    if "attention_share" in row:
        notes.append(f"attention is {row['attention_share']:.0%} of the step")
    return " ".join(columns) + f"  {row['contender']}" + (f"  ({', '.join(notes)})" if notes else "")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r"(/[\w.+-]+){2,}/", "", lines[0])  # no machine's paths in records
    return f"{type(error).__name__}: {text}"[:200]
