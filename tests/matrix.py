"""Tests the promised versions: every torch with the Triton that it brings, and NumPy at both ends of the range.

    make matrix                           # what has not passed yet; writes benchmarks/results/matrix.md
    python tests/matrix.py --list         # the pairings and what is known of each
    python tests/matrix.py --only 2.11    # those whose name holds this, again

Each pairing gets an environment of its own under build/matrix, which is deleted before the next one is made: torch with
its libraries takes 5 GB. In it the package is built and installed, without CUDA's kernels; the doctor holds
every kernel against the reference, and the Triton tests of all rooms run in Triton's interpreter. What a pairing came
to is kept in build/matrix, with what its commands said: a run that was interrupted goes on where it was, and one after
a change of the sources starts again. The Python is the one that runs this.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "matrix"
TABLE = ROOT / "benchmarks" / "results" / "matrix.md"
TESTED = ("dalle_kernels", "csrc", "setup.py", "pyproject.toml")  # a change of these makes a result old
TOOLS = ("setuptools>=77", "pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3.5", "hypothesis>=6.100")


class Pairing(NamedTuple):
    """What is asked of pip: an exact torch, and requirements for Triton ("" for what torch brings) and NumPy."""

    torch: str
    triton: str
    numpy: str

    @property
    def name(self) -> str:
        return f"torch {self.torch}, {self.triton or 'its triton'}, {self.numpy}, Python {platform.python_version()}"

    @property
    def record(self) -> Path:
        return WORK / (re.sub(r"[^0-9a-z.]+", "-", self.name.lower()) + ".json")


# torch 2.13 is named with its Triton, because builds for the CPU alone bring none.
PAIRINGS = (
    Pairing("2.11.0", "", "numpy==1.26.4"),
    Pairing("2.11.0", "", "numpy<2.4"),
    Pairing("2.12.0", "", "numpy"),
    Pairing("2.13.0", "triton==3.7.1", "numpy"),
    Pairing("2.14.1", "", "numpy"),
    Pairing("2.15.0", "", "numpy"),
)


class StepError(Exception):
    """A step of a pairing ended badly; says which, and how its output ended."""


def triton_tests() -> list[str]:
    """The tests of the Triton kernels, of every room."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_triton*.py"))


def digest() -> str:
    """A short hash of what is tested."""
    names = [*TESTED, *triton_tests()]
    found = (
        path for name in names for path in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))
    )
    paths = (path for path in found if path.is_file() and path.suffix not in (".so", ".pyc"))
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return total.hexdigest()[:12]


def processor() -> str:
    """Its name, as /proc/cpuinfo says it."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return named.group(1) if named else platform.machine()


class Environment:
    """An environment of its own for one pairing; what its commands say goes to `log`."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        self.variables = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TRITON"))}
        self.variables |= {"DALLE_KERNELS_NATIVE": "1", "DALLE_KERNELS_CUDA": "0", "CUDA_VISIBLE_DEVICES": ""}

    def run(self, step: str, *command: str, inside: Path = ROOT) -> str:
        """What `command`, its first word a program of the environment, says.

        Raises:
            StepError: its status is not 0.
        """
        begun = time.monotonic()
        print(f"    {step} ...", end=" ", flush=True)
        program = str(self.folder / "bin" / command[0])
        done = subprocess.run(
            [program, *command[1:]],
            cwd=inside,
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(f"{time.monotonic() - begun:.0f} s", flush=True)
        with self.log.open("a") as log:
            print(f"$ {' '.join(command)}\n{done.stdout}", file=log)
        if done.returncode:
            raise StepError(f"{step} failed, the whole of it is in {self.log}:\n" + "\n".join(tail(done.stdout)))
        return done.stdout

    def install(self, *requirements: str) -> None:
        named = [word for word in requirements if not word.startswith("-")]
        self.run(f"installing {', '.join(named)}", "python", "-m", "pip", "install", "--quiet", *requirements)

    def versions(self) -> dict[str, str]:
        script = "import json, numpy, platform, torch, triton; print(json.dumps({'torch': torch.__version__, 'triton': "
        script += "triton.__version__, 'numpy': numpy.__version__, 'python': platform.python_version()}))"
        return json.loads(self.run("asking for versions", "python", "-c", script).splitlines()[-1])


def tail(text: str, lines: int = 25) -> list[str]:
    return [f"      {line}" for line in text.splitlines()[-lines:]]


def try_out(pairing: Pairing) -> dict[str, str | int]:
    """Builds and tests in a fresh environment, and deletes it: versions and counts of answers and tests.

    Raises:
        StepError: a step went wrong.
    """
    log = pairing.record.with_suffix(".log")
    log.unlink(missing_ok=True)
    folder = WORK / "environment"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    environment = Environment(folder, log)
    try:
        environment.install("--upgrade", "pip", *TOOLS)
        environment.install(f"torch=={pairing.torch}", pairing.numpy)
        if pairing.triton:
            environment.install("--no-deps", pairing.triton)
        versions = environment.versions()
        build = ["python", "-m", "pip", "install", "--no-deps", "--no-build-isolation", "."]
        environment.run("building dalle_kernels and installing it", *build)
        # From elsewhere, so that what is asked is what was installed.
        doctor = environment.run("doctor", "python", "-m", "dalle_kernels.doctor", "--no-speed", inside=WORK)
        if re.search(r"CPU kernels: (?!none)", doctor) is None:
            raise StepError("the package was installed without its CPU kernels:\n" + "\n".join(tail(doctor)))
        answers = re.search(r"(\d+) answers right, 0 wrong or failed", doctor)
        if answers is None:
            raise StepError("not every answer is right:\n" + "\n".join(tail(doctor)))
        tests = 0
        for path in triton_tests():
            said = environment.run(path, "python", "-m", "pytest", "-q", "-n", "auto", path)
            counted = re.search(r"(\d+) passed(?!.*(failed|error|skipped))", said.splitlines()[-1])
            if counted is None:
                raise StepError(f"not every test of {path} ran:\n" + "\n".join(tail(said)))
            tests += int(counted.group(1))
        return {**versions, "answers": int(answers.group(1)), "tests": tests}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def known(sources: str) -> Iterator[tuple[Pairing, dict]]:
    """The pairings whose result is of these sources, and the result."""
    for pairing in PAIRINGS:
        if pairing.record.exists():
            record = json.loads(pairing.record.read_text())
            if record["sources"] == sources:
                yield pairing, record


def rows() -> dict[tuple[str, ...], str]:
    """The rows of the committed table by their first four cells: Python, torch, Triton, NumPy."""
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    found = [line for line in lines if re.match(r"\| \d", line)]
    return {tuple(cell.strip() for cell in line.split("|")[1:5]): line for line in found}


def write_table(records: list[dict]) -> None:
    """Puts these results into the committed table; the rows of other versions stay."""
    table = rows()
    for record in records:
        key = tuple(str(record[name]) for name in ("python", "torch", "triton", "numpy"))
        cells = (*key, str(record["answers"]), str(record["tests"]), record["sources"], record["processor"])
        table[key] = f"| {' | '.join(cells)} |"
    ordered = sorted(table, key=lambda key: [[int(part) for part in re.findall(r"\d+", cell)] for cell in key])
    lines = [
        "# Versions that were run",
        "",
        "Written by `make matrix` (tests/matrix.py). A row is an environment of its own: the package was built and",
        "installed in it, `python -m dalle_kernels.doctor` found every answer right, and the Triton tests of all rooms",
        "passed in Triton's interpreter, none failed and none skipped. What fails gets no row. Sources are named",
        "by a hash of what was tested.",
        "",
        "| Python | torch | Triton | NumPy | answers right | tests passed | sources | processor |",
        "|---|---|---|---|---|---|---|---|",
        *(table[key] for key in ordered),
        "",
        "What cannot work: the interpreter of Triton 3.6 with NumPy 2.4 or later. The Triton backend then refuses in a",
        "line that says so; on a GPU, where nothing is interpreted, the two go together.",
    ]
    TABLE.write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--list", action="store_true", help="name the pairings and what is known, and run nothing")
    parser.add_argument("--only", metavar="TEXT", help="run the pairings whose name holds this, passed before or not")
    options = parser.parse_args(arguments)
    WORK.mkdir(parents=True, exist_ok=True)
    sources = digest()
    passed = dict(known(sources))
    if options.list:
        for pairing in PAIRINGS:
            print(f"{pairing.name}: {'passed' if pairing in passed else 'not run on these sources'}")
        return 0
    chosen = [pairing for pairing in PAIRINGS if options.only is None or options.only in pairing.name]
    if not chosen:
        parser.error(f"--only {options.only}: no pairing is named so; --list names them")
    failures = 0
    for number, pairing in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {pairing.name}", flush=True)
        if options.only is None and pairing in passed:
            print("    passed before, on the same sources", flush=True)
            continue
        pairing.record.unlink(missing_ok=True)
        try:
            record = {**try_out(pairing), "sources": sources, "processor": processor()}
        except StepError as failure:
            failures += 1
            print(f"    FAILED: {failure}", flush=True)
            continue
        pairing.record.write_text(json.dumps(record))
        write_table([record])
        print(f"    {record['answers']} answers right, {record['tests']} tests passed", flush=True)
    print(f"{len(chosen) - failures} of {len(chosen)} pairings pass; the table is {TABLE.relative_to(ROOT)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
