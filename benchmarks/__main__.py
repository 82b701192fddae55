"""`python -m benchmarks run attention --quick`: see `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import DTYPES, Bench, Cell, Options, Recorder, default_output, limit_memory
from benchmarks.suites.choice import PATTERNS, Choice

SUITES = (
    "attention",
    "neighborhood",
    "decode",
    "codebook",
    "quantizers",
    "sampling",
    "training",
    "generation",
    "pixels",
    "integrations",
)
ON_CPU = ("scaling",)
"""Suites of several processes, which run on CPUs alone."""
_SECONDS = {"scaling": 30.0}
"""How long the rounds of one cell may take together, where not four."""
TOOLS = {
    "fit": ("benchmarks.fit", "the suites that what the doctor found leaves worth timing on a GPU"),
    "report": ("benchmarks.report", "plots and tables from the committed results"),
    "aot": ("benchmarks.kernels.aot", "compile the Triton kernels ahead of time and compare with the committed table"),
    "tune": ("benchmarks.kernels.tune", "measure launch settings on the GPU that is here"),
    "drawing": ("benchmarks.drawing", "quality beside speed of other orders of drawing, by a demo's model"),
    "plan": ("benchmarks.planning", "what the paper's model needs of 8 to 1,024 GPUs, on tensors without memory"),
    "streaming": ("benchmarks.streaming", "the memory of a training run through 200,000 pictures in shards"),
    "host": ("benchmarks.kernels.host", "host time of each operation on its smallest problem"),
    "triton-host": ("benchmarks.kernels.triton_host", "host time of the Triton backends, launches left out"),
    "sass": ("benchmarks.kernels.sass", "what the hot loops of the GPU kernels cost, counted from machine code"),
    "cuda": ("benchmarks.kernels.cuda_build", "what the compiler makes of the CUDA kernels"),
}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times the operations beside their competitors; every row's answer is checked first.",
        epilog="`pytest benchmarks/ --benchmark-only` runs the quick cells through pytest-benchmark: a group a cell, a "
        "benchmark a contender.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure a suite")
    run.add_argument("suite", choices=(*SUITES, *ON_CPU, "cpu"))
    default = "cuda" if torch.cuda.is_available() else "cpu"
    run.add_argument("--device", default=default, type=torch.device)
    run.add_argument("--grid", type=_numbers, default=(), metavar="N,...", help="sides of the image grid")
    run.add_argument("--text", type=_numbers, default=(), metavar="N,...", help="text tokens")
    run.add_argument("--dtype", default="", metavar="fp32,bf16,fp16")
    run.add_argument("--pattern", default="", metavar=",".join(PATTERNS))
    run.add_argument("--only", default="", metavar="NAME;...", help="these contenders beside ours")
    run.add_argument(
        "--match", default="", metavar="TEXT", help="only the cells whose title, as --dry-run prints it, holds this"
    )
    run.add_argument("--quick", action="store_true", help="a few cells: under two minutes on a CPU")
    run.add_argument("--dry-run", action="store_true", help="list the cells and stop")
    run.add_argument("--seconds", type=float, help="how long the rounds of one cell may take together")
    run.add_argument("--output", type=Path, help="JSON lines to append to, instead of benchmarks/results/")
    run.add_argument("--part", default="", metavar="NAME,...", help="of `cpu`: these parts of its table")
    run.add_argument("--against", metavar="REV", help="time this revision and REV in turn and print the ratios")
    for name, (_, purpose) in TOOLS.items():
        commands.add_parser(name, help=purpose, add_help=False)
    return parser


def cells_of(suite: str, choice: Choice) -> list[Cell]:
    """The cells of one suite."""
    return importlib.import_module(f"benchmarks.suites.{suite}").cells(choice)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in TOOLS:
        return importlib.import_module(TOOLS[arguments[0]][0]).main(arguments[1:])
    parser = _parser()
    asked = parser.parse_args(arguments)
    for option, given, known in (("--dtype", asked.dtype, DTYPES), ("--pattern", asked.pattern, PATTERNS)):
        for name in filter(None, given.split(",")):
            if name not in known:
                parser.error(f"{option}: got {name!r}, wanted one of {', '.join(known)}")
    if asked.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, but this torch sees no CUDA device")
    if asked.suite in ON_CPU:
        asked.device = torch.device("cpu")
    if asked.against:
        from benchmarks import against

        return against.main(asked.against, asked.suite, arguments)
    output = asked.output or default_output(asked.device)
    if asked.suite == "cpu":
        from benchmarks.suites import cpu

        return cpu.main(output, tuple(filter(None, asked.part.split(","))), asked.dry_run)
    choice = Choice(
        asked.device,
        asked.quick,
        asked.grid,
        asked.text,
        tuple(DTYPES[name] for name in filter(None, asked.dtype.split(","))),
        tuple(filter(None, asked.pattern.split(","))),
    )
    cells = [cell for cell in cells_of(asked.suite, choice) if asked.match in str(cell)]
    if not cells:
        parser.error(f"--match: got {asked.match!r}, wanted part of a title that --dry-run prints")
    if asked.dry_run:
        print("\n".join(str(cell) for cell in cells))
        return 0
    if asked.device.type == "cpu":
        limit_memory()
    seconds = asked.seconds or (0.5 if asked.quick else _SECONDS.get(asked.suite, 4.0))
    only = tuple(filter(None, asked.only.split(";")))
    options = Options(asked.device, seconds, 5.0 if asked.quick else 30.0, only)
    bench = Bench(options, Recorder(output), command=asked.suite)
    try:
        bench.begin()
        bench.run(cells)
    except KeyboardInterrupt:
        return 130
    return 130 if bench.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
