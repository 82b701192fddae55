"""The C++ test program of the CPU kernels, compiled with the address and undefined-behaviour sanitizers, and run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = ["tests/attention.cpp", "isa.cpp", "attention/plan.cpp"]
KERNELS = ["attention/cpu_avx2.cpp", "attention/cpu_avx512.cpp", "attention/cpu_avx512_bf16.cpp"]
KERNELS += ["decode/cpu_avx2.cpp", "decode/cpu_avx512.cpp"]


def test_nothing_is_found(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++20", "-O1", "-fopenmp", f"-I{CSRC}", "-Wno-psabi", "-Wno-ignored-attributes"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    objects = []
    for source in (*SOURCES, *KERNELS):
        target = tmp_path / (source.replace("/", "_") + ".o")
        objects.append((target, subprocess.Popen([compiler, *flags, "-c", str(CSRC / source), "-o", str(target)])))
    for target, process in objects:
        assert process.wait() == 0, target.name
    program = tmp_path / "program"
    paths = [str(target) for target, _ in objects]
    subprocess.run([compiler, "-fsanitize=address,undefined", *paths, "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    if result.returncode:
        pytest.fail(result.stdout + result.stderr)
