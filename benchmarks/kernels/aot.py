"""Compiles every Triton kernel of the launch table for GPUs that need not be there, and lists what came out.

A case is an ordinary call of a backend function on CPU tensors, so the kernels, their launch settings and the facts
they are specialised on (alignment, strides, flags) are those of the same call on a GPU. A stand-in driver tells Triton
which GPU to compile for, and each launch compiles its kernel and ends there. A process compiles for one architecture,
because the library remembers what it chose for a device. Each `benchmarks/kernels/aot_*.py` contributes a
function `cases(arch)` that yields (name, call).

    python -m benchmarks aot --arch 80 90 100            # prints the table
    python -m benchmarks aot --write                     # rewrites benchmarks/results/triton_aot.json for this Triton
    PYTHONPATH=where/triton-3.6/lives python -m benchmarks aot --write

Per kernel the table lists registers, bytes of shared memory, instructions that move spilled registers, instructions in
all, and how many of them are matrix instructions of which kind: mma (sm_80 on), wgmma (sm_90), tcgen05 (sm_100). A
kernel that wants more tensor memory than there is has no row: it ends the run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dalle_kernels.backends import launch

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Most shared memory of one block: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, **dict.fromkeys((86, 89, 120), 99 * 1024)}
TENSOR_MEMORY = 512  # columns of one multiprocessor of sm_100
RESULTS = Path(__file__).parents[1] / "results" / "triton_aot.json"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {16: torch.bfloat16, 32: torch.float32}
MATRIX_INSTRUCTIONS = {"mma": "HMMA", "wgmma": "HGMMA", "tcgen05": "UTC[A-Z]*MMA"}

# The cases that `make test` compiles: every kernel once, in bfloat16 and at the sizes of the paper.
COMMON = (
    "attention/16-bit/64",
    "decode/16-bit/64",
    "gumbel/16-bit/128",
    "gumbel/16-bit/128/backward",
    "likelihood/16-bit",
    "projection/16-bit/128",
    "projection/16-bit/128/backward",
    "sampling/16-bit/8192",
    "vq/16-bit/128",
)

Case = tuple[str, Callable[[], object]]
Report = dict[str, dict[str, int]]


class _Driver:
    """What `JITFunction.run` asks of a driver before it compiles, answered for a GPU of the given architecture."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # kernels are cached by device, so each architecture is one

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def recording(arch: int) -> Iterator[dict[str, object]]:
    """Inside, launching a kernel compiles it for `arch`, and nothing runs. Yields the kernels by name as they come.

    A call that launches one function in several variants adds "#2" and so on to the names of the later ones.
    """
    compiled: dict[str, object] = {}
    run = JITFunction.run

    def compile_only(self: JITFunction, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel not in compiled.values():
            again = sum(name.partition("#")[0] == self.__name__ for name in compiled)
            compiled[f"{self.__name__}#{again + 1}" if again else self.__name__] = kernel
        return kernel

    triton.runtime.driver.set_active(_Driver(arch))
    with mock.patch.object(JITFunction, "run", compile_only), mock.patch.object(launch, "INTERPRETED", arch):
        launch.architecture.cache_clear()
        try:
            yield compiled
        finally:
            launch.architecture.cache_clear()


def describe(kernel) -> dict[str, int]:
    """Registers, shared memory, spills and instruction counts of a compiled kernel, read back from its machine code.

    Raises:
        RuntimeError: there is no code to speak of. Triton compiles what wants too much tensor memory to a trap alone.
    """
    columns = getattr(kernel.metadata, "tmem_size", None) or 0
    if columns > TENSOR_MEMORY:
        raise RuntimeError(f"{kernel.metadata.name} wants {columns} columns of tensor memory, of {TENSOR_MEMORY}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        sass = _tool("cuobjdump", "-sass", cubin.name)
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)
    instructions = [name for name in instructions if name != "NOP"]
    if not instructions:
        raise RuntimeError(f"cuobjdump listed no instructions for {kernel.metadata.name}")
    (registers,) = re.findall(r"REG:(\d+)", usage)
    row = {
        "registers": int(registers),
        "shared": kernel.metadata.shared,
        "spills": sum(name.startswith(("STL", "LDL")) for name in instructions),
        "instructions": len(instructions),
    }
    for kind, pattern in MATRIX_INSTRUCTIONS.items():
        row[kind] = sum(re.match(pattern + r"\b", name) is not None for name in instructions)
    return row


def _tool(name: str, *arguments: str) -> str:
    # The tools that come with Triton decode the machine code of the compiler that comes with it.
    environment = {**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run([TOOLS / name, *arguments], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def all_cases(arch: int) -> Iterator[Case]:
    """The cases of every `benchmarks/kernels/aot_*.py` there is."""
    for path in sorted(Path(__file__).parent.glob("aot_*.py")):
        yield from importlib.import_module(f"benchmarks.kernels.{path.stem}").cases(arch)


def survey(arch: int, cases: Iterable[Case]) -> Report:
    """Compiles the kernels of `cases` for `arch`: a row of the table per "case/kernel"."""
    table = {}
    for name, call in cases:
        with recording(arch) as compiled:
            call()
        for kernel_name, kernel in compiled.items():
            table[f"{name}/{kernel_name}"] = describe(kernel)
    return table


def complaints(arch: int, table: Report) -> list[str]:
    """What is wrong with the kernels of one architecture, one sentence each."""
    found = []
    for name, row in table.items():
        if row["spills"]:
            found.append(f"sm_{arch} {name}: {row['spills']} instructions move spilled registers, wanted none")
        if row["shared"] > SHARED_LIMIT[arch]:
            found.append(f"sm_{arch} {name}: {row['shared']} bytes of shared memory, of {SHARED_LIMIT[arch]}")
    return found


def recorded() -> dict[str, dict[str, Report]]:
    """The committed table: Triton version -> "sm_90" -> "case/kernel" -> row."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def record(tables: dict[str, Report]) -> None:
    """Puts the rows of `tables` in the place of their cases' in the committed table, under this Triton's version."""
    everything = recorded()
    of_version = everything.setdefault(triton.__version__, {})
    for arch, table in tables.items():
        cases = {name.rpartition("/")[0] for name in table}
        others = {name: row for name, row in of_version.get(arch, {}).items() if name.rpartition("/")[0] not in cases}
        of_version[arch] = others | table
    # One kernel a line: a change of the machine code is a change of one line in review.
    versions = []
    for version, architectures in sorted(everything.items()):
        blocks = []
        for arch, rows in sorted(architectures.items()):
            lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items()))
            blocks.append(f'  "{arch}": {{\n{lines}\n  }}')
        versions.append(f' "{version}": {{\n' + ",\n".join(blocks) + "\n }")
    RESULTS.parent.mkdir(exist_ok=True)
    temporary = RESULTS.with_suffix(".json.new")
    temporary.write_text("{\n" + ",\n".join(versions) + "\n}\n")
    temporary.rename(RESULTS)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--match", default="", help="only the cases whose name holds this")
    parser.add_argument("--common", action="store_true", help="only the cases that make test compiles")
    parser.add_argument("--write", action="store_true", help="update the committed table")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, for a test to read")
    options = parser.parse_args(arguments)
    if len(options.arch) == 1:
        (arch,) = options.arch
        chosen = (case for case in all_cases(arch) if options.match in case[0])
        tables = {arch: survey(arch, (case for case in chosen if case[0] in COMMON or not options.common))}
    else:
        with ThreadPoolExecutor(2) as pool:
            surveys = pool.map(lambda arch: _in_a_process_of_its_own(arch, options), options.arch)
            tables = dict(zip(options.arch, surveys, strict=True))
    wrong = [complaint for arch, table in tables.items() for complaint in complaints(arch, table)]
    if options.write:
        record({f"sm_{arch}": table for arch, table in tables.items()})
    if options.json:
        print(json.dumps({"triton": triton.__version__, "tables": tables, "complaints": wrong}))
        return 0
    for arch, table in tables.items():
        for name, row in table.items():
            print(f"sm_{arch} {name:60s}", *(f"{key} {value}" for key, value in row.items()))
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


def _in_a_process_of_its_own(arch: int, options: argparse.Namespace) -> Report:
    command = [sys.executable, "-m", "benchmarks.kernels.aot", "--json", "--arch", str(arch), "--match", options.match]
    done = subprocess.run(command + ["--common"] * options.common, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["tables"][str(arch)]


if __name__ == "__main__":
    sys.exit(main())
