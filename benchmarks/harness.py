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
import ctypes
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dalle_kernels.backends import native

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


class UnavailableError(Exception):
    """A contender cannot run here; the message says why, and becomes its row."""


class TooSlowError(Exception):
    """A contender's first call took so long that timing it would hold up everything else."""


@dataclass
class Check:
    """How far an answer is from the truth, and how far it may be."""

    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False where the error is NaN


@dataclass
class Trial:
    """A contender made ready.

    Attributes:
        runs: what is timed, one callable for each rotating copy of the input.
        verify: computes the answer once more, outside the timing, and compares it with the truth.
        notes: further figures of the row, such as the time that building a block mask took.
        counts: what one run makes how many of; the row says them per second.
    """

    runs: Sequence[Callable[[], object]]
    verify: Callable[[], Check]
    notes: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """A name, and how to make it ready; `prepare` raises UnavailableError where it cannot run."""

    name: str
    prepare: Callable[[], Trial]


def when_installed(make: Callable[[], Any], contenders: Callable[[Any], Iterable[Contender]]) -> Iterator[Contender]:
    """The contenders for what `make` makes; where that cannot be imported, a row that says so."""
    try:
        made = make()
    except ImportError as error:
        reason = str(error)

        def prepare() -> Trial:
            raise UnavailableError(reason)

        yield Contender("dalle_kernels", prepare)
    else:
        yield from contenders(made)


@dataclass(frozen=True)
class Work:
    """What a cell's computation amounts to, whoever performs it."""

    flops: float = 0.0
    bytes: float = 0.0
    visible_pairs: int | None = None
    executed_pairs: int | None = None
    ceiling: str = "gemm"  # which ceiling bounds it: "gemm", or "copy" for what is bound by memory


@dataclass(frozen=True)
class Cell:
    """One computation on one input.

    Attributes:
        suite: the benchmark that it belongs to.
        case: what distinguishes it, printed and saved.
        dtype: of the input; picks the ceiling.
        work: see `Work`.
        contenders: made when the cell's turn comes, so that a list of cells costs nothing.
        series: cells that differ only in size share a series: a contender that gave up on one skips the larger ones.
        finish: adds to our row what follows from several rows.
    """

    suite: str
    case: dict[str, Any]
    dtype: torch.dtype
    work: Callable[[], Work]
    contenders: Callable[[], Iterable[Contender]]
    series: str = ""
    finish: Callable[[dict[str, dict[str, Any]]], dict[str, Any]] | None = None

    def __str__(self) -> str:
        return f"{self.suite}: " + ", ".join(f"{name} {value}" for name, value in self.case.items())


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        device: where.
        seconds: how long the rounds of one cell may take together.
        patience: a contender whose first call takes longer than this many seconds is not timed.
        only: names of contenders; empty for all. Ours is always there.
    """

    device: torch.device
    seconds: float = 4.0
    patience: float = 30.0
    only: tuple[str, ...] = ()


# --- Timing -----------------------------------------------------------------------------------------------------------


class _CpuTimer:
    """Milliseconds of one call. Short calls are repeated within a sample until it lasts long enough to be read."""

    def __init__(self, runs: Sequence[Callable[[], object]], shortest_ms: float = 0.5) -> None:
        self._turn = itertools.cycle(runs)
        self.repeats = 1
        once = self.sample()
        self.repeats = max(1, min(1000, math.ceil(shortest_ms / max(once, 1e-4))))
        self.estimate = self.sample() * self.repeats

    def sample(self) -> float:
        start = time.perf_counter()
        for _ in range(self.repeats):
            next(self._turn)()
        return (time.perf_counter() - start) * 1e3 / self.repeats


class _GpuTimer:
    """Milliseconds of one call by CUDA events, round a CUDA graph of all copies where it can be captured."""

    def __init__(self, runs: Sequence[Callable[[], object]], shortest_ms: float = 0.5) -> None:
        self._turn = itertools.cycle(runs)
        self._graph: torch.cuda.CUDAGraph | None = None
        for run in runs:  # warm up, on the stream of the capture
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                for run in runs:
                    run()
            self._graph, self._calls = graph, len(runs)
        except RuntimeError:  # something in it waits for the host: timed call by call instead
            torch.cuda.synchronize()
            self._calls = 1
        self.repeats = 1
        self.sample()
        self.repeats = max(1, min(1000, math.ceil(shortest_ms / max(self.sample() * self._calls, 1e-4))))
        self.estimate = self.sample() * self.repeats * self._calls

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def sample(self) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(self.repeats):
            if self._graph is not None:
                self._graph.replay()
            else:
                next(self._turn)()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / (self.repeats * self._calls)


def _timer(runs: Sequence[Callable[[], object]], device: torch.device) -> _CpuTimer | _GpuTimer:
    return _GpuTimer(runs) if device.type == "cuda" else _CpuTimer(runs)


def interleave(timers: dict[str, _CpuTimer | _GpuTimer], seconds: float) -> Iterator[dict[str, list[float]]]:
    """Samples of each, in turn; yields all of them after every round. At least three rounds, at most fifty."""
    samples: dict[str, list[float]] = {name: [] for name in timers}
    slowest = max((timer.estimate for timer in timers.values()), default=0.0)
    # Contenders that are much faster than the slowest take a few samples a round: they can afford it.
    turns = {name: max(1, min(5, int(slowest / max(timer.estimate, 1e-6)))) for name, timer in timers.items()}
    names, begun = list(timers), time.perf_counter()
    for number in range(50):
        shift = number % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            for _ in range(turns[name]):
                samples[name].append(timers[name].sample())
        yield samples
        if number >= 2 and time.perf_counter() - begun > seconds:
            return


def quantile(samples: Sequence[float], share: float) -> float:
    """The nearest-rank quantile."""
    return sorted(samples)[min(len(samples) - 1, int(share * len(samples)))]


# --- Memory -----------------------------------------------------------------------------------------------------------


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call needs at its highest beyond what was there before; None where that cannot be told."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if platform.system() != "Linux":
        return None
    with contextlib.suppress(OSError, AttributeError):
        if native.NATIVE is not None:
            native.NATIVE.release_kept()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, so that it counts when it is used
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew from here
        before = _status_bytes("VmRSS")
        run()
        return max(_status_bytes("VmHWM") - before, 0)
    return None


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def cache_bytes(device: torch.device) -> int:
    """The last-level cache: what rotating buffers must exceed."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KM]?)", path.read_text().strip()).groups()  # type: ignore[union-attr]
        sizes.append(int(number) * {"": 1, "K": 2**10, "M": 2**20}[unit])
    return max(sizes) or 2**25


def copies_beyond_cache(bytes_per_copy: float, device: torch.device) -> int:
    """How many rotating copies of an input make a working set of twice the last-level cache."""
    return max(1, min(64, math.ceil(2 * cache_bytes(device) / max(bytes_per_copy, 1))))


def limit_memory() -> None:
    """Makes an allocation beyond the machine's memory an error of the contender, not the end of the process."""
    if platform.system() != "Linux":
        return
    import resource

    available = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    if available:
        limit = _status_bytes("VmSize") + int(available[1]) * 1024 * 9 // 10
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


# --- Ceilings ---------------------------------------------------------------------------------------------------------


def measure_ceilings(device: torch.device, dtypes: Sequence[torch.dtype]) -> dict[str, float]:
    """The best rate of a large matrix product by dtype (TFLOP/s) and of a large copy (GB/s), here and now."""
    ceilings: dict[str, float] = {}
    side = 8192 if device.type == "cuda" else 1536
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        products: list[Callable[[], object]] = [lambda a=a, b=b: a @ b]
        if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
            # torch.mm calls MKL, which takes a slow path on processors that are not Intel's; oneDNN does not.
            products.append(lambda a=a, b=b: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
        rates = [2 * side**3 / _best(product, device) / 1e9 for product in products]
        ceilings[f"gemm {dtype_name(dtype)}"] = max(rates)
        ceilings[f"torch.mm {dtype_name(dtype)}"] = rates[0]
    size = (2**31 if device.type == "cuda" else max(2**28, 8 * cache_bytes(device))) // 4
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    ceilings["copy"] = 2 * size * 4 / _best(lambda: target.copy_(source), device) / 1e6
    return ceilings


def _best(run: Callable[[], object], device: torch.device) -> float:
    timer = _timer([run], device)
    return min(timer.sample() for _ in range(5))


# --- Who and where ----------------------------------------------------------------------------------------------------


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def machine_name(device: torch.device) -> str:
    """The processor's or the GPU's name, as the system gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if platform.system() == "Linux":
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    facts: dict[str, Any] = {"name": machine_name(device), "cores": len(os.sched_getaffinity(0))}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"capability": f"{properties.major}.{properties.minor}", "memory_bytes": properties.total_memory}
        fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
        query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
            facts |= dict(zip(fields, (part.strip() for part in answer.splitlines()[0].split(",")), strict=False))
        return facts
    facts |= {
        "threads": torch.get_num_threads(),
        "instruction_set": native.instruction_set(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if platform.system() == "Linux":
        text = Path("/proc/cpuinfo").read_text()
        for name in ("vendor_id", "cpu family", "model", "cpu MHz"):
            if found := re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE):
                facts[name] = found[1].strip()
    facts["last_level_cache_bytes"] = cache_bytes(device)
    return facts


def label(machine: dict[str, Any]) -> str:
    """The machine's name, of a processor with the instruction set that the kernels use: clouds call different
    processors by one name."""
    return ", ".join(filter(None, (machine["name"], machine.get("instruction_set"))))


def slug(text: str) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def versions() -> dict[str, str]:
    """Of everything whose version could change a figure."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "flash-attn", "natten", "dalle-pytorch", "cut-cross-entropy", "liger-kernel"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def commit() -> str:
    """The commit that is measured, with "+" where tracked files (results aside) differ; "unknown" if unversioned."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def default_output(device: torch.device) -> Path:
    """One file per machine and date."""
    return RESULTS / f"{slug(label(machine(device)))}-{datetime.now(UTC):%Y-%m-%d}.jsonl"


# --- Records ----------------------------------------------------------------------------------------------------------


class Recorder:
    """Appends records to a JSON lines file; each addition replaces the file as a whole, so it is never half a line."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        if self.path is None or not records:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self.path.read_text() if self.path.exists() else ""
        temporary = self.path.with_suffix(".partial")
        temporary.write_text(before + "".join(json.dumps(record) + "\n" for record in records))
        temporary.replace(self.path)


def read_records(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Every record of these files, in order."""
    return [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.strip()]


# --- The run ----------------------------------------------------------------------------------------------------------


class Bench:
    """Runs cells on one device, prints and records them."""

    def __init__(self, options: Options, recorder: Recorder, command: str = "", say: Callable[[str], None] = print):
        self.options, self.recorder, self.say = options, recorder, say
        self.run_id = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        self.command = command
        self.ceilings: dict[str, float] = {}
        self.interrupted = False
        self._given_up: dict[tuple[str, str], str] = {}

    def begin(self, dtypes: Sequence[torch.dtype]) -> None:
        """Measures the ceilings and records on what machine, with what, at which commit."""
        self._progress("measuring the ceilings")
        self.ceilings = measure_ceilings(self.options.device, dtypes)
        facts = {
            "kind": "run",
            "run": self.run_id,
            "command": self.command,
            "machine": machine(self.options.device),
            "versions": versions(),
            "commit": commit(),
            "ceilings": self.ceilings,
        }
        self.recorder.add([facts])
        rates = ", ".join(
            f"{name} {rate:.3g} {'GB/s' if name == 'copy' else 'TFLOP/s'}" for name, rate in self.ceilings.items()
        )
        self.say(f"{label(facts['machine'])}, commit {facts['commit']}; ceilings: {rates}")

    def run(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """Every cell in turn. Ctrl-C ends the run and keeps what was measured, the current cell's rounds included."""
        rows: list[dict[str, Any]] = []
        begun = time.perf_counter()
        for number, cell in enumerate(cells):
            spent = time.perf_counter() - begun
            left = f", about {spent / number * (len(cells) - number):.0f} s left" if number else ""
            self._progress(f"[{number + 1}/{len(cells)}{left}] {cell}")
            rows += self._cell(cell)
            if self.interrupted:
                self.say("interrupted: what was measured is kept")
                break
        self._progress("")
        return rows

    def _cell(self, cell: Cell) -> list[dict[str, Any]]:
        work = cell.work()
        rows: list[dict[str, Any]] = []
        trials: dict[str, Trial] = {}
        timers: dict[str, _CpuTimer | _GpuTimer] = {}
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
            try:
                # After an interruption one short turn of those that are ready is still worth having.
                for taken in interleave(timers, 0.0 if self.interrupted else self.options.seconds):
                    samples = taken
            except KeyboardInterrupt:
                self.interrupted = True
        for row in rows:
            taken = samples.get(row["contender"], [])
            if taken:
                self._figures(row, taken, cell, work)
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
        timers: dict[str, _CpuTimer | _GpuTimer],
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
            row["peak_bytes"] = peak_memory(trial.runs[0], device)
            if time.perf_counter() - start > self.options.patience:
                raise TooSlowError(f"one call took {time.perf_counter() - start:.0f} s")
            timer = _timer(trial.runs, device)
            if isinstance(timer, _GpuTimer):
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

    def _figures(self, row: dict[str, Any], samples: list[float], cell: Cell, work: Work) -> None:
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
        ceiling = self.ceilings.get("copy" if work.ceiling == "copy" else f"gemm {dtype_name(cell.dtype)}")
        rate = row.get("gbs") if work.ceiling == "copy" else row.get("tflops")
        if ceiling and rate:
            row["ceiling_fraction"] = rate / ceiling

    def _print(self, cell: Cell, work: Work, rows: Sequence[dict[str, Any]]) -> None:
        self._progress("")
        pairs = f"; {work.visible_pairs:,} visible pairs" if work.visible_pairs else ""
        if work.executed_pairs:
            pairs += f", {work.executed_pairs:,} executed in tiles"
        flops = f"; {work.flops / 1e9:.3g} GFLOP" if work.flops else ""
        self.say(f"\n{cell}{pairs}{flops}")
        unit = "GB/s" if work.ceiling == "copy" else "TFLOP/s"
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
