"""`--against REV`: this tree and another revision, timed in turn with this tree's benchmarks."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import ROOT, commit, read_records

TURNS = 3


def main(revision: str, suite: str, arguments: Sequence[str]) -> int:
    """Runs `arguments` without --against in both trees, three turns each, ours alone, and prints the ratios."""
    if suite not in ("attention", "decode", "codebook", "sampling"):
        print(f"--against: got {suite}, wanted a suite of operations: attention, decode, codebook or sampling")
        return 2
    known = subprocess.run(["git", "rev-parse", "--verify", f"{revision}^{{commit}}"], cwd=ROOT, capture_output=True)
    if known.returncode:
        print(f"--against: got {revision!r}, wanted a revision that git knows")
        return 2
    rest = _without(_without(arguments, "--against"), "--output")
    with tempfile.TemporaryDirectory() as folder, _tree(revision, Path(folder, "tree")) as other:
        trees = {commit(): ROOT, revision: other}
        samples: dict[str, dict[str, list[float]]] = {}
        for turn in range(TURNS):
            for name, tree in trees.items():
                print(f"turn {turn + 1} of {TURNS}: {name}", file=sys.stderr)
                output = Path(folder, f"{turn}-{tree.name}.jsonl")
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks",
                    *rest,
                    "--only",
                    "dalle_kernels",
                    "--output",
                    str(output),
                ]
                if done := subprocess.run(command, cwd=tree, stdout=subprocess.DEVNULL).returncode:
                    return done
                for record in read_records([output]):
                    if record["kind"] == "row" and record["status"] == "ok":
                        samples.setdefault(_title(record), {}).setdefault(name, []).append(record["ms"])
    print("\n".join(compare(samples, list(trees))))
    return 0


def compare(samples: dict[str, dict[str, list[float]]], names: Sequence[str]) -> list[str]:
    """A line a cell: the second revision's median over the first's, above 1 where the first is faster."""
    here, there = names
    lines = [f"{'ratio':>8} {here + ', ms':>18} {there + ', ms':>18}  cell"]
    for title, taken in samples.items():
        if here in taken and there in taken:
            first, second = median(taken[here]), median(taken[there])
            lines.append(f"{second / first:>7.2f}x {first:>18.4g} {second:>18.4g}  {title}")
        else:
            lines.append(f"{'-':>8} only one of the two could run it  {title}")
    return lines


def _title(record: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in record["case"].items())


def _without(arguments: Sequence[str], option: str) -> list[str]:
    kept, skip = [], False
    for word in arguments:
        if not skip and word != option and not word.startswith(f"{option}="):
            kept.append(word)
        skip = word == option
    return kept


@contextmanager
def _tree(revision: str, folder: Path) -> Iterator[Path]:
    """A built worktree of `revision` with this tree's benchmarks in it."""

    def git(*words: str) -> None:
        subprocess.run(["git", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    git("worktree", "add", "--detach", str(folder), revision)
    try:
        print(f"building {revision}", file=sys.stderr)
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(build, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(folder / "benchmarks", ignore_errors=True)
        shutil.copytree(
            ROOT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__")
        )
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))
