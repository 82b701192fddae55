"""`python -m benchmarks attention --quick`: see `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.choice import PATTERNS, Choice
from benchmarks.harness import DTYPES, Bench, Cell, Options, Recorder, default_output, dtype_name, limit_memory

SUITES = ("attention", "decode", "codebook", "sampling", "training", "generation", "integrations")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times the operations beside their competitors; every row's answer is checked first.",
    )
    parser.add_argument("suite", choices=(*SUITES, "cpu", "report"))
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, type=torch.device)
    parser.add_argument("--grid", type=_numbers, default=(), metavar="N,...", help="sides of the image grid")
    parser.add_argument("--text", type=_numbers, default=(), metavar="N,...", help="text tokens")
    parser.add_argument("--dtype", default="", metavar="fp32,bf16,fp16")
    parser.add_argument("--pattern", default="", metavar=",".join(PATTERNS))
    parser.add_argument("--only", default="", metavar="NAME;...", help="these contenders beside ours")
    parser.add_argument("--quick", action="store_true", help="a few cells: under two minutes on a CPU")
    parser.add_argument("--dry-run", action="store_true", help="list the cells and stop")
    parser.add_argument("--seconds", type=float, help="how long the rounds of one cell may take together")
    parser.add_argument("--output", type=Path, help="JSON lines to append to, instead of benchmarks/results/")
    parser.add_argument("--part", default="", metavar="NAME,...", help="of `cpu`: these parts of its table")
    parser.add_argument("--against", metavar="REV", help="time this revision and REV in turn and print the ratios")
    return parser


def cells_of(suite: str, choice: Choice) -> list[Cell]:
    """The cells of one suite."""
    return importlib.import_module(f"benchmarks.{suite}").cells(choice)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    asked = parser.parse_args(arguments)
    for option, given, known in (("--dtype", asked.dtype, DTYPES), ("--pattern", asked.pattern, PATTERNS)):
        for name in filter(None, given.split(",")):
            if name not in known:
                parser.error(f"{option}: got {name!r}, wanted one of {', '.join(known)}")
    if asked.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, but this torch sees no CUDA device")
    if asked.suite == "report":
        from benchmarks import report

        return report.main()
    if asked.against:
        from benchmarks import against

        return against.main(asked.against, asked.suite, arguments)
    output = asked.output or default_output(asked.device)
    if asked.suite == "cpu":
        from benchmarks import cpu

        return cpu.main(output, tuple(filter(None, asked.part.split(","))), asked.dry_run)
    choice = Choice(
        asked.device,
        asked.quick,
        asked.grid,
        asked.text,
        tuple(DTYPES[name] for name in filter(None, asked.dtype.split(","))),
        tuple(filter(None, asked.pattern.split(","))),
    )
    cells = cells_of(asked.suite, choice)
    if asked.dry_run:
        print("\n".join(str(cell) for cell in cells))
        return 0
    if asked.device.type == "cpu":
        limit_memory()
    seconds = asked.seconds or (0.5 if asked.quick else 4.0)
    only = tuple(filter(None, asked.only.split(";")))
    options = Options(asked.device, seconds, 5.0 if asked.quick else 30.0, only)
    bench = Bench(options, Recorder(output), command=asked.suite)
    try:
        bench.begin(sorted({cell.dtype for cell in cells}, key=dtype_name))
        bench.run(cells)
    except KeyboardInterrupt:
        return 130
    return 130 if bench.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
