"""What csrc/torch_abi.h declares, held against the headers of the torch that is installed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from torch.utils import cpp_extension

from benchmarks.kernels.cuda_build import build_cuda

HEADER = Path(__file__).resolve().parents[1] / "csrc" / "torch_abi.h"
THEIRS = "#include <torch/csrc/stable/c/shim.h>\n"
NEWER = "torch_exception_get_what_without_backtrace"  # from torch 2.13 on, and weak


def compiles(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What the compiler says of a program with torch's headers, as of torch 2.11, at hand."""
    path = folder / "program.cpp"
    path.write_text(source)
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    command = [
        *build_cuda.compiler(),
        "-std=c++20",
        "-fsyntax-only",
        f"-I{HEADER.parent}",
        *includes,
    ]
    return subprocess.run(
        [*command, "-DTORCH_TARGET_VERSION=0x020b000000000000", str(path)], capture_output=True, text=True
    )


def declared() -> list[str]:
    return [name for name in re.findall(r"\b((?:aoti_)?torch_\w+)\(", HEADER.read_text()) if name != NEWER]


def test_torch_2_11_has_every_function_that_the_library_calls(tmp_path: Path) -> None:
    names = declared()
    assert "torch_from_blob" in names
    assert len(names) > 20
    uses = "".join(f"auto* use_{name} = &{name};\n" for name in names)
    done = compiles(THEIRS + uses, tmp_path)
    assert done.returncode == 0, done.stderr


def test_both_declare_them_alike(tmp_path: Path) -> None:
    """Two declarations of a C function that differ in a type are an error."""
    done = compiles(THEIRS + '#include "torch_abi.h"\n', tmp_path)
    assert done.returncode == 0, done.stderr
    wrong = HEADER.read_text().replace("int32_t* dtype);", "int64_t* dtype);")
    (tmp_path / "wrong.h").write_text(wrong)
    done = compiles(THEIRS + '#include "wrong.h"\n', tmp_path)
    assert "aoti_torch_get_dtype" in done.stderr
    assert done.returncode != 0
