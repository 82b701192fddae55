"""What the compiler makes of the CUDA kernels, as a committed table: `python -m benchmarks cuda`.

Per kernel and architecture: registers, stack, spills and static shared memory as ptxas reports them, and how many of
the instructions that matter its machine code holds. Needs nvcc and cuobjdump (the CUDA toolkit's or the one in
Triton's package), no GPU. tests/cuda/test_build.py compares a fresh build with the table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "results" / "cuda_build.json"
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))

import build_cuda  # noqa: E402  (csrc/cuda/build_cuda.py, which setup.py runs too)

# Tensor core products, asynchronous copies, matrix loads, wide loads; and traffic to local memory, of which there
# should be none.
INSTRUCTIONS = ("HMMA", "LDGSTS", "LDSM", "LDG.128", "LDL", "STL")


def find_cuobjdump() -> str:
    """The disassembler on the path, or Triton's.

    Raises:
        FileNotFoundError: where there is neither.
    """
    if found := shutil.which("cuobjdump"):
        return found
    spec = find_spec("triton")
    if spec is not None and spec.origin is not None:
        candidate = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if candidate.exists():
            return str(candidate)
    raise FileNotFoundError("no cuobjdump: neither on the path nor in Triton's package")


def count_instructions(library: Path) -> dict[str, dict[str, dict[str, int]]]:
    """How many of INSTRUCTIONS each kernel of `library` holds: kernel -> architecture -> instruction -> count."""
    text = subprocess.run(
        [find_cuobjdump(), "--dump-sass", str(library)], capture_output=True, text=True, check=True
    ).stdout
    # One expression over the whole text, 80 MB of it, rather than a few for each of its lines.
    names = "|".join(name.split(".")[0] for name in INSTRUCTIONS)
    marks = re.compile(
        r"arch = (?P<architecture>sm_\w+)|Function : (?P<kernel>\w+)"
        rf"|/\*[0-9a-f]{{4,}}\*/\s+(?:@!?U?P\w+\s+)?(?P<instruction>(?:{names})\b[\w.]*)"
    )
    counts: dict[str, dict[str, dict[str, int]]] = {}
    architecture, row = "", None
    for match in marks.finditer(text):
        if match["architecture"]:
            architecture = match["architecture"]
        elif match["kernel"]:
            row = counts.setdefault(build_cuda.readable(match["kernel"]), {}).setdefault(architecture, {})
        elif row is not None:
            parts = set(match["instruction"].split("."))
            for name in INSTRUCTIONS:
                if set(name.split(".")) <= parts:
                    row[name] = row.get(name, 0) + 1
    return counts


def collect(library: Path) -> dict[str, Any]:
    """Builds `library` and gives the table: compiler, architectures, kernels."""
    report = build_cuda.build(library)
    instructions = count_instructions(library)
    kernels = {
        name: {
            architecture: {**numbers, "instructions": instructions[name][architecture]}
            for architecture, numbers in sorted(rows.items())
        }
        for name, rows in sorted(report.items())
    }
    nvcc = build_cuda.find_nvcc()
    assert nvcc is not None, "the library has just been built"
    return {"nvcc": build_cuda.nvcc_version(nvcc), "kernels": kernels}


def main(arguments: list[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__.split("\n", 1)[0]).parse_args(arguments)
    library = ROOT / "build" / "cuda" / "_cuda.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    table = collect(library)
    for name, rows in table["kernels"].items():
        entries = ",\n".join(f"      {json.dumps(arch)}: {json.dumps(row)}" for arch, row in rows.items())
        lines.append(f"    {json.dumps(name)}: {{\n{entries}\n    }}")
    text = f'{{\n  "nvcc": {json.dumps(table["nvcc"])},\n  "kernels": {{\n' + ",\n".join(lines) + "\n  }\n}\n"
    temporary = TABLE.with_suffix(f".{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, TABLE)
    print(f"{TABLE.relative_to(ROOT)}: {len(lines)} kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
