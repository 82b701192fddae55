"""What the paper's transformer would need of GPUs of 80 GB, 8 to 1,024 of them: `python -m benchmarks plan`.

    python -m benchmarks plan     # writes benchmarks/notes/plan.md; a quarter of an hour on two cores

The tables are `dalle-reference plan`'s, beside what the paper says of its own run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.harness import ROOT, commit, versions

GPUS, MEMORY, BATCH = (8, 64, 512, 1024), 80e9, 1024
PAGE = ROOT / "benchmarks" / "notes" / "plan.md"
HEAD = """# The paper's transformer on GPUs of 80 GB, planned

Written by `python -m benchmarks plan` at {commit}, torch {torch}: steps of 1,024 pictures by the `paper` preset (64
layers, 62 heads of 64, 256 text and 1,024 image tokens) on tensors without memory, as `dalle-reference plan` makes
them. No GPU has been asked: what kernels take inside of themselves, and what an allocator loses between blocks, is
not in it. Per GPU; weights, moments and running mean in float32, computing in bfloat16; of each way to compute
activations anew the fewest parts of a batch that fit.

The paper's own (Ramesh et al. 2021, sections 2.4 and 2.5): 1,024 V100 of 16 GB, the same batch of 1,024. Parameters
are divided among the 8 GPUs of a machine, gathered before a block and given back after it; blocks are computed anew in
the backward pass; weights, moments and activations have 16 bits, with a gradient scale for each block. Between machines
gradients pass as products of matrices of rank 896 (PowerSGD), a compression of about 86% by its table 1. What
corresponds here: `--parallel fsdp --recompute blocks`, with `--replicate` for groups that have all weights; gradients
are not compressed under fsdp, nor scaled, as bfloat16 has float32's range.
"""


def table(gpus: int, preset: str = "paper", memory: float = MEMORY, batch: int = BATCH) -> list[str]:
    """A section: what fits so many GPUs, as `dalle-reference plan` prints it."""
    import contextlib
    import io

    from dalle_reference import cli

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        cli.main(
            ["plan", "--preset", preset, "--gpus", str(gpus), "--memory", f"{memory / 1e9:g}", "--batch", str(batch)]
        )
    return [f"## {gpus:,} GPUs", "", *said.getvalue().rstrip().splitlines(), ""]


def main(arguments: Sequence[str] | None = None, page: Path = PAGE) -> int:
    """Writes the page; a process for each of the machine's cores."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks plan", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--gpus", default=",".join(map(str, GPUS)), metavar="N,...")
    asked = parser.parse_args(arguments)
    counts = [int(count) for count in asked.gpus.split(",")]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        sections = [line for section in pool.map(table, counts, [asked.preset] * len(counts)) for line in section]
    page.write_text("\n".join([HEAD.format(commit=commit(), torch=versions()["torch"]), *sections]).rstrip() + "\n")
    print(page.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
