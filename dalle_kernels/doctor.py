"""Whether this installation is well: `python -m dalle_kernels.doctor`.

Says what is installed and what was built, which backend serves which operation here and why not the others, how far
each kernel's answer on this very machine lies from the reference in float64, and how its speed compares. The table is
made to be pasted into an issue. The exit status is 1 where an answer is wrong or a kernel that should serve fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F

import dalle_kernels
from dalle_kernels import Row, TokenLayout, explain, sparse_attention
from dalle_kernels.backends import native, self_check
from dalle_kernels.backends.cases import all_cases, judge
from dalle_kernels.backends.choice import BACKENDS


class Finding(NamedTuple):
    """What one backend made of one case."""

    case: str
    operation: str
    device: str
    dtype: str
    backend: str
    chosen: bool  # "auto" takes it
    status: str  # "right", "wrong", "failed" or "refused"
    detail: str  # the error and what was allowed, or the reason
    speed: float | None = None  # times as fast as the reference backend

    @property
    def bad(self) -> bool:
        return self.status in ("wrong", "failed")


# --- Judging ----------------------------------------------------------------------------------------------------------


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    begun = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begun) * 1e3


def ratio(ours: Callable[[], object], other: Callable[[], object], device: torch.device, rounds: int = 9) -> float:
    """How many times as long `other` takes: medians of calls in turn, after one of each."""
    samples: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for run, taken in zip((ours, other), samples, strict=True):
            spent = _milliseconds(run, device)
            if number:
                taken.append(spent)
    return median(samples[1]) / median(samples[0])


def examine(device: torch.device, dtypes: Sequence[torch.dtype], speed: bool = True) -> Iterator[Finding]:
    """Every backend's answer to every case on `device`, as it comes."""
    for case in all_cases():
        for dtype in dtypes[:1] if case.exact else dtypes:
            inputs = tuple(tensor.to(device, dtype) for tensor in case.inputs(case.width))
            told = explain(case.function, *case.arguments(inputs), **case.named)
            for backend in BACKENDS:
                reason = told.refusals.get(backend)
                serves = backend == told.backend or (reason is not None and reason.startswith("could serve"))
                name = str(dtype).removeprefix("torch.")
                operation = case.function.__name__
                seen = Finding(
                    case.name, operation, str(device), name, backend, backend == told.backend, "refused", reason or ""
                )
                if serves:
                    try:
                        right, detail = judge(case, case.width, device, dtype, backend)
                        seen = seen._replace(status="right" if right else "wrong", detail=detail)
                    except Exception as error:  # whatever a kernel throws is the finding
                        lines = str(error).splitlines() or [""]
                        failed = "wrong" if self_check.WRONG in lines[0] else "failed"
                        seen = seen._replace(status=failed, detail=f"{type(error).__name__}: {lines[0]}")
                elif reason is not None and reason.startswith(self_check.WRONG):
                    seen = seen._replace(status="wrong")
                if seen.status == "right" and speed and backend != "reference":
                    seen = seen._replace(
                        speed=ratio(
                            partial(case.run, inputs, backend),
                            partial(case.run, inputs, "reference"),
                            device,
                            rounds=3,
                        )
                    )
                yield seen


def against_sdpa(device: torch.device, dtype: torch.dtype) -> str:
    """One line: row attention over 256 text and 16 x 16 image tokens beside torch's own attention, dense and causal."""
    pattern = Row(TokenLayout(text_length=256, grid=(16, 16)))
    q, k, v = (torch.randn(1, 8, pattern.length, 64, device=device).to(dtype) for _ in range(3))
    ours = explain(sparse_attention, q, k, v, pattern)
    with torch.no_grad():
        times = ratio(
            lambda: sparse_attention(q, k, v, pattern),
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            device,
            rounds=25,
        )
    name = str(dtype).removeprefix("torch.")
    return (
        f"row attention, 512 tokens, 8 x 64, {name}, forward: {ours.backend} {times:.2f} times as fast as SDPA causal"
    )


# --- The report -------------------------------------------------------------------------------------------------------


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def environment() -> list[str]:
    """What is installed and what was built, a line each."""
    packages = ", ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "numpy"))
    lines = [
        f"dalle_kernels {dalle_kernels.__version__} on Python {platform.python_version()}, {platform.platform()}",
        packages,
        f"processor: {native.processor()}, {torch.get_num_threads()} threads",
    ]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        lines.append(f"GPU {index}: {torch.cuda.get_device_name(index)}, capability {major}.{minor}")
        lines += self_checks(torch.device("cuda", index))
    return [*lines, *native.report().splitlines()]


def self_checks(device: torch.device) -> list[str]:
    """What the self-check has found on `device`, a line each."""
    kept = self_check.kept(device)
    where = f"self-check: {self_check.mode()}; {len(kept)} verdicts in {self_check.folder()}"
    return [where, *(f"  {name}: {'right' if it.right else 'WRONG'}: {it.detail}" for name, it in kept.items())]


def long(seen: Finding) -> bool:
    """Whether the detail is a sentence, which the table has no room for."""
    return seen.status == "failed" or self_check.WRONG in seen.detail


def table(findings: Sequence[Finding]) -> list[str]:
    """The findings as lines of one table; what a backend refuses everywhere for one reason is one line below it."""
    rows = [("operation", "device", "dtype", "backend", "answer", "error", "speed")]
    refusals: dict[tuple[str, str, str], dict[str, None]] = {}  # in order, each once
    for seen in findings:
        if seen.status == "refused":
            refusals.setdefault((seen.backend, seen.device, seen.detail), {})[seen.case] = None
            continue
        speed = "" if seen.speed is None else f"{seen.speed:.1f}x"
        answer = seen.status.upper() if seen.bad else seen.status
        backend = seen.backend + ("*" if seen.chosen else "")
        detail = "see below" if long(seen) else seen.detail
        rows.append((seen.case, seen.device, seen.dtype, backend, answer, detail, speed))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append('* what "auto" takes; speed: times as fast as the reference backend on a problem this small')
    for (backend, device, reason), refused in refusals.items():
        every = len(refused) == len({seen.case for seen in findings if seen.device == device})
        lines.append(f"{backend} on {device}: {'' if every else '; '.join(refused) + ': '}{reason}")
    failures = [seen for seen in findings if long(seen)]
    return [*lines, *(f"{seen.case}, {seen.dtype}, {seen.backend} {seen.status}: {seen.detail}" for seen in failures)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dalle_kernels.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--no-speed", action="store_true", help="answers only")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write what was found there too, for programs to read"
    )
    asked = parser.parse_args(arguments)
    print("\n".join(environment()), flush=True)
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    findings: list[Finding] = []
    for device in devices:
        dtypes = (torch.float32, torch.bfloat16) + ((torch.float16,) if device.type == "cuda" else ())
        for seen in examine(device, dtypes, speed=not asked.no_speed):
            findings.append(seen)
            if sys.stderr.isatty():
                print(f"\r\033[K{seen.case}, {seen.dtype}, {seen.backend}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    print("\n" + "\n".join(table(findings)))
    if not asked.no_speed:
        print("\n" + "\n".join(against_sdpa(device, dtype) for device in devices for dtype in dtypes_of_speed(device)))
    if asked.json is not None:
        temporary = asked.json.with_name(f"{asked.json.name}.{os.getpid()}")
        temporary.write_text(json.dumps([seen._asdict() for seen in findings], indent=1) + "\n")
        os.replace(temporary, asked.json)
    bad = [seen for seen in findings if seen.bad]
    right = sum(seen.status == "right" for seen in findings)
    print(f"\n{right} answers right, {len(bad)} wrong or failed" + (": please report this table" if bad else ""))
    return 1 if bad else 0


def dtypes_of_speed(device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtypes that are worth timing on `device`."""
    return (torch.float32,) if device.type == "cpu" else (torch.bfloat16,)


if __name__ == "__main__":
    sys.exit(main())
