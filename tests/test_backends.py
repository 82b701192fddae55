"""The choice of backend, and a package without its native library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle_kernels import Row, TokenLayout, explain, gumbel_lookup, sparse_attention
from dalle_kernels.attention.op import OPERATION as ATTENTION
from dalle_kernels.backends import native
from dalle_kernels.backends.choice import Operation, first
from dalle_kernels.backends.contract import Call

ROOT = Path(__file__).resolve().parents[1]
Q = torch.randn(1, 2, 29, 16)


def test_the_native_library_is_built_and_serves_cpu_tensors() -> None:
    """Without this, every test of the CPU kernels would pass by testing the reference against itself."""
    assert native.absence() is None
    answer = explain(sparse_attention, Q, Q, Q, Row(TokenLayout(5, (4, 6))))
    assert answer.backend == "cpu"
    assert answer.detail == native.instruction_set()
    assert "could serve" in answer.refusals["reference"]
    answer = explain(gumbel_lookup, torch.zeros(2, 8), torch.zeros(8, 4), 1.0)
    assert answer.backend == "cpu"
    assert answer.refusals["cuda"] == "there is no cuda kernel for gumbel_lookup"


@pytest.mark.parametrize(
    ("capability", "width", "refused", "wanted"),
    [
        ((8, 0), 64, (), "cuda"),
        ((8, 0), 64, ("cuda",), "triton"),
        ((8, 0), 128, (), "cuda"),
        ((8, 6), 64, (), "triton"),
        ((9, 0), 64, (), "triton"),
    ],
)
def test_cuda_goes_first_where_its_counted_floor_is_under_triton_s(
    capability: tuple[int, int], width: int, refused: tuple[str, ...], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DALLE_KERNELS_SELF_CHECK", "off")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for name in ("cuda", "triton"):
        refusal = "no" if name in refused else None
        monkeypatch.setattr(ATTENTION.load(name), "refuse", lambda call, refusal=refusal: refusal)
    candidates = ATTENTION.candidates(Call(torch.device("cuda", 0), torch.bfloat16, width))
    assert first(candidates) == wanted
    assert len({candidate.name for candidate in candidates}) == len(candidates)


def test_a_named_backend_never_falls_back() -> None:
    call = Call(torch.device("cpu"), torch.float32, 16)
    operation: Operation[Any] = Operation("thing", {"reference": "dalle_kernels.attention.reference"}, lambda: call)
    with pytest.raises(
        ValueError, match="backend: 'cpu' cannot serve this thing call: there is no cpu kernel for thing"
    ):
        operation.choose("cpu", call)
    with pytest.raises(ValueError, match="backend: got 'gpu', wanted 'auto' or one of cuda, triton, cpu, reference"):
        operation.choose("gpu", call)
    assert operation.choose("auto", call).__name__ == "dalle_kernels.attention.reference"


PURE = """
import torch
from dalle_kernels import *
layout = TokenLayout(5, (4, 6))
q = torch.randn(1, 2, layout.length, 16, requires_grad=True)
sparse_attention(q, q, q, Row(layout)).sum().backward()
cache = KVCache(Row(layout), 1, 2, 16)
with torch.no_grad():
    decode_attention(q[:, :, :1], q[:, :, :1], q[:, :, :1], cache, 0)
gumbel_lookup(torch.randn(3, 8), torch.randn(8, 4), 1.0)
sample_tokens(torch.randn(3, 8))
gumbel_lookup(torch.randn(3, 8).double(), torch.randn(8, 4).double(), 1.0)
print(explain(sparse_attention, q, q, q, Row(layout)))
"""


def _copy_without_libraries(folder: Path) -> None:
    left_out = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "dalle_kernels", folder / "dalle_kernels", ignore=left_out)


def _run_pure(folder: Path, path: Path) -> subprocess.CompletedProcess[str]:
    """PURE, from `folder`, with `path` as PYTHONPATH."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, "-c", PURE], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_a_pure_python_install_works_and_says_so(tmp_path: Path) -> None:
    _copy_without_libraries(tmp_path)
    result = _run_pure(tmp_path, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("sparse_attention: reference\n")
    assert "cpu: the native library is absent: it was never built" in result.stdout
    assert result.stderr.count("CPU tensors go to the slow reference backend; the native library is absent") == 1
    assert "pip install --force-reinstall --no-deps --no-cache-dir " in result.stderr
    (tmp_path / "dalle_kernels" / "_left_out.txt").write_text("DALLE_KERNELS_NATIVE=0\n")
    wanted = _run_pure(tmp_path, tmp_path)
    assert wanted.stderr == ""
    assert "cpu: the native library is absent: DALLE_KERNELS_NATIVE=0" in wanted.stdout


def test_sources_in_front_of_what_was_installed_say_so(tmp_path: Path) -> None:
    """As in a clone from which the package was installed."""
    _copy_without_libraries(tmp_path / "sources")
    (tmp_path / "installed" / "dalle_kernels").mkdir(parents=True)
    (tmp_path / "installed" / "dalle_kernels" / native.LIBRARY.name).write_bytes(b"")
    result = _run_pure(tmp_path / "sources", tmp_path / "installed")
    said = f"these are the sources, not what pip installed in {tmp_path / 'installed'}: run from another folder"
    assert f"cpu: the native library is absent: {said}" in result.stdout
    assert said in result.stderr
    assert "--force-reinstall" not in result.stderr


def test_the_build_says_why_it_leaves_the_kernels_out() -> None:
    environment = {**os.environ, "CXX": "no-such-compiler", "DALLE_KERNELS_NATIVE": "auto"}
    command = [sys.executable, "setup.py", "--version"]
    lenient = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "building without the native CPU kernels (no C++ compiler (no-such-compiler) on the path)" in lenient.stderr
    environment["DALLE_KERNELS_NATIVE"] = "1"
    strict = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert strict.returncode != 0
    assert "DALLE_KERNELS_NATIVE=1, but no C++ compiler" in strict.stderr


def test_the_report_names_what_was_built() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "dalle_kernels.backends.native"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "CPU kernels: built for" in result.stdout
    assert "torch 2.11 and later; instruction sets: " in result.stdout


def test_versions_that_triton_kernels_cannot_use_are_named_at_import() -> None:
    """In one line, where a backend is asked for."""
    script = """
import numpy, torch, triton
triton.__version__, numpy.__version__, triton.knobs.runtime.interpret = "3.6.0", "2.4.0", True
import dalle_kernels
print(dalle_kernels.explain(dalle_kernels.sample_tokens, torch.zeros(1, 8)).refusals["triton"])
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout == (
        "it cannot be imported here: the interpreter of triton 3.6.0 wants NumPy below 2.4, 2.4.0 is installed: "
        "pip install 'numpy<2.4'\n"
    ), result.stderr


def test_which_versions_triton_kernels_can_use() -> None:
    pytest.importorskip("triton")
    from dalle_kernels.backends.triton_common import unsupported

    assert unsupported("3.5.1", "2.3.5", interpreted=False) == "triton 3.5.1 is installed, 3.6 or later is wanted"
    assert unsupported("3.6.0", "2.4.6", interpreted=False) is None
    assert unsupported("3.6.0", "2.3.5", interpreted=True) is None
    assert "wants NumPy below 2.4" in str(unsupported("3.6.0", "3.0.0rc1", interpreted=True))
    assert unsupported("3.7.0", "2.4.6", interpreted=True) is None
    assert unsupported("3.10.0+git1", "2.4.6", interpreted=True) is None
