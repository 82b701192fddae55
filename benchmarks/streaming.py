"""How much memory a training run holds whose pictures do not fit it: 200,000 of them, streamed from shards.

    python -m benchmarks streaming            # minutes; --quick tries it with a few thousand pictures
    python -m benchmarks streaming --folder /mnt/large/shards   # shards stay there, and serve the next time

A tiny dVAE sees each picture once, decoded by processes of its own (`--workers`), so that what is measured is what
streaming takes. The memory is that of the whole tree of processes, what they share counted once (Linux's proportional
set size), many times a second: its peak, and whether it grew between the first and the last fifth.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.harness import ROOT, Recorder, commit, default_output, label, machine, quantile
from benchmarks.suites.scaling import write_shards

MEMORY = 1e9
GROWTH = 0.05
"""What the run may hold, in bytes, and by how much more at its end than at its beginning."""
_MODEL = ["--resolution", "16", "--width", "8", "--groups", "2", "--blocks", "1", "--vocab", "32", "--code-width", "8"]
_MODEL += ["--patch", "1", "--no-fitted", "--held-out", "0", "--draw-every", "0", "--save-every", "1000000"]
_BATCH, _SIDE, _PER_SHARD, _PERIOD = 256, 32, 10_000, 0.2


class Seen(NamedTuple):
    """What was seen of a run.

    Attributes:
        peak: bytes.
        growth: of the median of the last fifth of the samples against that of the second one, when all has begun.
        samples: how many.
    """

    peak: int
    growth: float
    samples: int


def seen(samples: Sequence[int]) -> Seen:
    """The figures of a run's samples, in bytes, in order."""
    fifth = max(1, len(samples) // 5)
    early, late = quantile(samples[fifth : 2 * fifth] or samples, 0.5), quantile(samples[-fifth:], 0.5)
    return Seen(max(samples), late / early - 1, len(samples))


def tree_bytes(root: int) -> int:
    """The memory of a process and of all that it started: what n of them share counts an nth for each."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(folder.name))
    total, left = 0, [root]
    while left:
        process = left.pop()
        left += parents.get(process, [])
        with contextlib.suppress(OSError):
            found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
            total += int(found[1]) * 1024 if found else 0
    return total


def sample(process: subprocess.Popen[bytes]) -> Iterator[int]:
    """The memory of a running process's tree, until it ends."""
    while process.poll() is None:
        total = tree_bytes(process.pid)
        if total:
            yield total
        time.sleep(_PERIOD)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 1 where the run took more memory than it may, or failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks streaming", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pictures", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=1, help="processes that decode")
    parser.add_argument("--folder", type=Path, help="where the shards are kept; else they are made for this run")
    parser.add_argument("--quick", action="store_true", help="20,000 pictures")
    parser.add_argument("--output", type=Path, help="JSON lines to append to, instead of benchmarks/results/")
    asked = parser.parse_args(arguments)
    pictures = 20_000 if asked.quick else asked.pictures
    with tempfile.TemporaryDirectory(prefix="streaming-") as scratch:
        folder = asked.folder or Path(scratch) / "shards"
        shards = -(-pictures // _PER_SHARD)
        if len(list(folder.glob("*.tar"))) != shards:
            print(f"writing {pictures:,} pictures of {_SIDE} x {_SIDE} into {shards} shards")
            write_shards(folder, pictures, _SIDE, shards, distinct=1000)
        command = [sys.executable, "-m", "dalle_reference", "train-dvae", "demo", *_MODEL, "--batch", str(_BATCH)]
        command += ["--steps", str(pictures // _BATCH), "--source", f"{folder}/*.tar", "--workers", str(asked.workers)]
        command += ["--cache", f"{scratch}/cache", "--out", f"{scratch}/run", "--device", "cpu"]
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            samples = list(sample(process))
        finally:
            process.terminate()
            process.wait()
        seconds = time.perf_counter() - began
    if process.returncode or not samples:
        print("the run failed, or memory cannot be seen here (/proc/*/smaps_rollup)", file=sys.stderr)
        return 1
    found = seen(samples)
    facts = machine(torch.device("cpu"))
    record = {"kind": "streaming", "machine": facts, "commit": commit(), "pictures": pictures, "seconds": seconds}
    Recorder(asked.output or default_output(torch.device("cpu"))).add([record | found._asdict()])
    print(f"{label(facts)}: {pictures:,} pictures in {seconds:.0f} s, {pictures / seconds:.0f} a second")
    print(f"at most {found.peak / 1e6:.0f} MB in all processes, wanted {MEMORY / 1e6:.0f}")
    print(f"{found.growth:+.1%} from the beginning to the end, wanted at most {GROWTH:.0%}; {found.samples} samples")
    return int(found.peak > MEMORY or found.growth > GROWTH)


if __name__ == "__main__":
    sys.exit(main())
