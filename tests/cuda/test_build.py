"""The CUDA library compiles on any machine with nvcc, and the compiler's report holds what the committed table says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels.cuda_build import TABLE, build_cuda, collect

Report = dict[str, Any]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda") / "_cuda.so"


@pytest.fixture(scope="module")
def built(library: Path) -> Report:
    return collect(library)


@pytest.fixture(scope="module")
def committed() -> Report:
    return json.loads(TABLE.read_text())


def test_no_kernel_spills_or_touches_local_memory(built: Report) -> None:
    for name, rows in built["kernels"].items():
        for architecture, row in rows.items():
            where = f"{name} {architecture}"
            assert row["stack"] == row["spill_stores"] == row["spill_loads"] == 0, where
            assert not {"LDL", "STL"} & row["instructions"].keys(), where


def test_registers_and_shared_memory_stay_within_the_table(built: Report, committed: Report) -> None:
    assert built["kernels"].keys() == committed["kernels"].keys(), "run python -m benchmarks cuda"
    for name, rows in built["kernels"].items():
        for architecture, row in rows.items():
            known = committed["kernels"][name][architecture]
            assert row["registers"] <= known["registers"], f"{name} {architecture}"
            assert row["shared"] <= known["shared"], f"{name} {architecture}"


def test_machine_code_holds_the_instructions_that_the_design_counts_on(built: Report) -> None:
    for name, rows in built["kernels"].items():
        for architecture, row in rows.items():
            if name.startswith("decode_kernel"):
                assert row["instructions"]["LDG.128"] >= 9, f"{name} {architecture}"  # q, 4 keys, 4 values
            if name.startswith(("forward_kernel", "query_kernel", "key_kernel")):
                # One product for 16 x 8 x 16: two of rows x columns x width forward, three for dq, four for dk and dv.
                width = int(name.rstrip(">").split(", ")[1])
                columns = 16 if name.startswith("key") else 32  # that a loop's round takes
                products = {"f": 2, "q": 3, "k": 4}[name[0]]
                parts = 2 if width <= 64 else 1  # of 16 rows, that read a column tile together
                assert row["instructions"]["HMMA"] == parts * products * (columns // 8) * (width // 16), f"{name}"
                assert row["instructions"]["LDSM"] == row["instructions"]["HMMA"] // parts // 2, f"{name}"
                assert row["instructions"]["LDGSTS"] >= 4, f"{name}"  # keys and values, ahead and at the start


def test_the_library_needs_nothing_of_torch_but_the_stable_abi(library: Path, built: Report) -> None:
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    # "U name" or "w name" (weak), with @VERSION where the system's libraries have it.
    undefined = {line.split()[-1] for line in listing.splitlines() if " U " in line or "torch" in line}
    system = re.compile(r".*@(GLIBC|GLIBCXX|CXXABI|GCC)_|_ZN[KRO]*S")  # the second: in namespace std
    rest = {name for name in undefined if not system.match(name)}
    assert any(name.startswith("aoti_torch_") for name in rest)
    # Both are C interfaces. torch_* came with 2.10 and grows with each version, so its names are listed here.
    lists = {"torch_new_list_reserve_size", "torch_list_push_back", "torch_delete_list"}
    assert {name for name in rest if not name.startswith("aoti_torch_")} <= {"torch_library_impl", *lists}


def test_the_library_loads_without_a_gpu(library: Path, built: Report) -> None:
    script = (
        f"import pathlib, torch; torch.ops.load_library({str(library)!r});"
        "print(torch.ops.dalle_kernels_cuda.decode_attention.default._schema.name);"
        "from dalle_kernels.backends import cuda_library;"
        f"cuda_library.LIBRARY = pathlib.Path({str(library)!r});"
        "print(cuda_library.report());"
        "numbers = cuda_library.numbers;"
        "widths = cuda_library.operations().attention_widths();"
        "print(min(numbers('decode_shape').values()));"
        "print(min(min(numbers('attention_tiles', width).values()) for width in widths))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    name, report, *shapes = done.stdout.splitlines()
    assert name == "dalle_kernels_cuda::decode_attention", done.stderr
    assert shapes == ["2", "1"]  # no number is left out
    assert re.search(r"nvcc 1\d\.\d; torch 2.10 and later; needs a driver for CUDA 1\d or later", report)


@pytest.mark.parametrize(
    ("architectures", "flags"),
    [
        ("8.0", ["arch=compute_80,code=[sm_80]"]),
        ("8.0+PTX;9.0", ["arch=compute_80,code=[sm_80,sm_90,compute_80]"]),
        ("12.0 8.6", ["arch=compute_86,code=[sm_120,sm_86]"]),
    ],
)
def test_architecture_list(architectures: str, flags: list[str]) -> None:
    assert build_cuda.architecture_flags(architectures)[1::2] == flags


@pytest.mark.parametrize("architectures", ["7.5", "sm_80", "8.0;ninety"])
def test_a_wrong_architecture_list_is_refused(architectures: str) -> None:
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST: got"):
        build_cuda.architecture_flags(architectures)
