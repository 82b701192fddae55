"""Lays the package out as Hugging Face's `kernels` loads it, from a folder or from the Hub.

    python packaging/kernels_layout.py OUTPUT

A build variant for the CPU and, where dalle_kernels/_cuda.so was built, one for CUDA:

    OUTPUT/build/torch-stable-abi211-cpu-x86_64-linux/     __init__.py, metadata.json, _cpu.so, ...
    OUTPUT/build/torch-stable-abi211-cu130-x86_64-linux/   the same and _cuda.so

Each is the package under a name of its own, made of a digest of its contents: module names, the torch.library namespace
and the libraries' operators all carry it. So two versions of a kernel, and an installed dalle_kernels, can be loaded in
one process.

    from kernels import get_local_kernel
    dalle_kernels = get_local_kernel(Path("OUTPUT"))
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dalle_kernels"
sys.path[:0] = [str(ROOT / "csrc"), str(ROOT / "csrc" / "cuda")]

import build_cuda  # noqa: E402  (csrc/cuda/build_cuda.py)

CPU, CUDA = PACKAGE / "_cpu.so", PACKAGE / "_cuda.so"
TORCH = "torch-stable-abi211"
VERSION = 1  # of the kernel as the Hub counts: to be raised when what it offers changes


def renamed(source: str, name: str) -> str:
    """A module of the package as a module of the package `name`."""
    source = re.sub(r"\btorch\.ops\.dalle_kernels_(cpu|cuda)\b", rf"torch.ops.{name}_\1", source)
    return re.sub(r"\bdalle_kernels\b", name, source)


def lay_out(output: Path, cuda: str | None = None) -> Path:
    """Writes one variant and gives its folder.

    Args:
        output: the kernel's folder.
        cuda: CUDA's version, such as "13.0": with the CUDA library. None: for the CPU.
    """
    modules = sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.json")])
    whole = hashlib.sha256(str(cuda).encode())
    for path in [*modules, CPU, *([CUDA] if cuda else [])]:
        whole.update(path.read_bytes())
    kind = "cuda" if cuda else "cpu"
    name = f"_dalle_kernels_{kind}_{whole.hexdigest()[:12]}"
    tag = "cu" + cuda.replace(".", "") if cuda else "cpu"
    variant = output / "build" / f"{TORCH}-{tag}-{platform.machine()}-linux"
    shutil.rmtree(variant, ignore_errors=True)
    for path in modules:
        target = variant / path.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(renamed(path.read_text(), name))
    shutil.copyfile(CPU, variant / CPU.name)  # is told its namespace when it is loaded
    if cuda:
        build_cuda.build(variant / CUDA.name, namespace=f"{name}_cuda")
    described: dict[str, object] = {"type": kind}
    if cuda:
        described["archs"] = build_cuda.architectures().split(";")
    metadata = {
        "id": name,
        "name": "dalle-kernels",
        "version": VERSION,
        "license": "MIT",
        "python-depends": [],
        "backend": described,
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    if not CPU.exists():
        sys.exit(f"{CPU} is not there; build it: python csrc/build_cpu.py {CPU.relative_to(ROOT)}")
    print(lay_out(output))
    if CUDA.exists():
        nvcc = build_cuda.find_nvcc()
        if nvcc is None:
            sys.exit(f"{CUDA} is there, but no nvcc to link it anew: looked at $NVCC, $CUDA_HOME/bin and the path")
        print(lay_out(output, build_cuda.nvcc_version(nvcc)))


if __name__ == "__main__":
    main()
