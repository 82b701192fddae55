"""Compiles the CUDA kernels into one shared library against PyTorch's stable ABI.

    python csrc/cuda/build_cuda.py dalle_kernels/_cuda.so

Needs nvcc and a C++ compiler, no GPU, and the headers of any torch from 2.10 on, a CPU build's too; the library then
serves torch 2.10 and later under any Python. TORCH_CUDA_ARCH_LIST ("8.0+PTX;9.0" where it is not set) says for which
architectures; NVCC or CUDA_HOME where the compiler is. Objects are kept under build/cuda and made again when a source,
a header that it includes, a flag or a compiler changed; each keeps the compiler's report of registers, shared memory,
stack and spills.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from object_cache import compile_object, compiler, run  # beside this file

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
OUTPUT = ROOT / "build" / "cuda"

DEFAULT_ARCHITECTURES = "8.0+PTX;9.0"
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CXX_FLAGS = ["-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", TARGET, "-DUSE_CUDA"]

NAMESPACE = "dalle_kernels_cuda"

Report = dict[str, dict[str, dict[str, int]]]  # kernel -> architecture -> what the compiler says


def find_nvcc() -> str | None:
    """The CUDA compiler: $NVCC, then $CUDA_HOME/bin/nvcc, then the path."""
    for candidate in (os.environ.get("NVCC"), os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc", "nvcc"):
        if candidate and (found := shutil.which(candidate)):
            return found
    return None


def nvcc_version(nvcc: str) -> str:
    """Such as "13.0"."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match.group(1) if match else "unknown"


def architecture_flags(architectures: str) -> list[str]:
    """nvcc's -gencode flags for a list such as "8.0+PTX;9.0".

    The front end, which takes most of the time, runs once, for the oldest of them, and its PTX is assembled for each.

    Raises:
        ValueError: for an entry of another form, or one before 8.0.
    """
    entries = []
    for entry in re.split(r"[; ]+", architectures.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None or int(match.group(1)) < 8:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: got {entry!r}, wanted such as 8.0, 9.0a or 8.0+PTX, from 8.0 on")
        entries.append((int(match.group(1) + match.group(2)), match.group(3), match.group(4) is not None))
    virtual = f"compute_{min(entries)[0]}"
    codes = [f"sm_{number}{suffix}" for number, suffix, _ in entries]
    codes += [virtual] * any(ptx for *_, ptx in entries)
    return ["-gencode", f"arch={virtual},code=[{','.join(codes)}]"]


def parse_report(text: str) -> Report:
    """What `ptxas -v` says of each kernel: registers, bytes of stack, spills and static shared memory."""
    report: Report = {}
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    for match in pattern.finditer(text):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        report.setdefault(readable(match["name"]), {})[f"sm_{match['arch']}"] = {
            "registers": int(match["registers"]),
            "stack": int(match["stack"]),
            "spill_stores": int(match["stores"]),
            "spill_loads": int(match["loads"]),
            "shared": int(shared.group(1)) if shared else 0,
        }
    return report


def readable(symbol: str) -> str:
    """A kernel's name and template arguments, without its namespace and parameters, from its mangled name."""
    name = run(["c++filt", symbol]).strip()
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\((int|bool)\)", "", name)
    return re.sub(r"\([^()]*\)$", "", name)


def architectures() -> str:
    """For which the kernels are compiled: $TORCH_CUDA_ARCH_LIST, or those they were written for."""
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES


def build(library: Path, jobs: int | None = None, namespace: str = NAMESPACE) -> Report:
    """Compiles and links `library`, whose operations are torch.ops.`namespace`'s; gives the compiler's report on every
    kernel.

    Raises:
        RuntimeError: without nvcc, or with the compiler's words when it fails.
    """
    import torch
    from torch.utils import cpp_extension

    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("no nvcc: looked at $NVCC, $CUDA_HOME/bin and the path")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    version = nvcc_version(nvcc)
    cuda = Path(os.path.realpath(nvcc)).parent.parent
    wanted = architectures()
    built = f'-DDALLE_BUILT="architectures {wanted}; nvcc {version}; torch 2.10 and later"'
    cxx = compiler()
    system = [f"-isystem{path}" for path in (*cpp_extension.include_paths(), cuda / "include")]
    flags = architecture_flags(wanted)
    commands = [(source, [nvcc, *NVCC_FLAGS, *flags, f"-I{CSRC}"]) for source in sorted(CSRC.rglob("*.cu"))]
    for source in sorted(CSRC.rglob("cuda_op.cpp")):
        commands.append((source, [*cxx, *CXX_FLAGS, f"-DDALLE_LIBRARY={namespace}", f"-I{CSRC}", *system]))
    commands.append((CSRC / "cuda" / "built.cpp", [*cxx, *CXX_FLAGS, built, *system]))
    salt = f"{version}; {run([*cxx, '--version']).splitlines()[0]}; torch {torch.__version__}"

    def compile_one(item: tuple[Path, list[str]]) -> Path:
        source, command = item
        name = str(source.relative_to(CSRC)).replace("/", "_")
        if namespace != NAMESPACE and source.name == "cuda_op.cpp":
            name = f"renamed_{name}"  # kept beside the object with the usual name
        return compile_object(source, command, OUTPUT, name, salt)

    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, commands))
    partial = f"{library}.{os.getpid()}"
    # libtorch leads to whatever this torch is made of, libtorch_cuda among it, so it must stay a dependency.
    torch_libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-Wl,--no-as-needed", "-ltorch"]
    runtime = [f"-L{cuda / 'lib64'}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    run([*cxx, "-shared", *map(str, objects), *runtime, *torch_libraries, "-ltorch_cpu", "-lc10", "-o", partial])
    os.replace(partial, library)
    report: Report = {}
    for path in objects:
        report.update(parse_report(path.with_suffix(".txt").read_text()))
    return report


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for kernel, rows in build(target).items():
        for architecture, row in rows.items():
            print(f"{kernel}  {architecture}  {json.dumps(row)}")
    print(f"built {target} for {architectures()}")
