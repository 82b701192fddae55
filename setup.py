"""Builds the native kernels of `csrc/` where a torch and a C++ compiler are at hand.

DALLE_KERNELS_NATIVE=auto (default) builds them if it can and says why when it cannot; =1 makes their absence an
error; =0 leaves them out: the package is then pure Python.

DALLE_KERNELS_CUDA=auto (default) also compiles the CUDA kernels where nvcc is and torch has CUDA; =1 compiles them
beside any torch (no GPU is needed) or fails; =0 leaves them out. csrc/cuda/build_cuda.py says what else steers that.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))  # for build_cuda.py


def _obstacle() -> str | None:
    """Why the C++ kernels cannot be built here, or None."""
    if os.environ.get("DALLE_KERNELS_NATIVE", "auto") == "0":
        return "DALLE_KERNELS_NATIVE=0"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the CPU kernels are written for x86-64, this is {platform.machine()}"
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return f"no C++ compiler ({os.environ.get('CXX', 'c++')}) on the path"
    try:
        import pybind11  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        return f"{error.name} cannot be imported here; install it and build with --no-build-isolation"
    return None


def _cuda_obstacle() -> str | None:
    """Why the CUDA kernels are left out, or None."""
    import torch
    from build_cuda import find_nvcc  # csrc/cuda/build_cuda.py

    wanted = os.environ.get("DALLE_KERNELS_CUDA", "auto")
    if wanted == "0":
        return "DALLE_KERNELS_CUDA=0"
    if find_nvcc() is None:
        return "no nvcc: looked at $NVCC, $CUDA_HOME/bin and the path"
    if wanted != "1" and torch.version.cuda is None:
        return "this torch has no CUDA; DALLE_KERNELS_CUDA=1 builds them all the same"
    return None


def _build_ext() -> type:
    from torch.utils.cpp_extension import BuildExtension

    class BuildWithCuda(BuildExtension):
        """Builds the CPU extension, then the CUDA library beside it."""

        def run(self) -> None:
            super().run()
            from build_cuda import build

            if obstacle := _cuda_obstacle():
                if os.environ.get("DALLE_KERNELS_CUDA") == "1":
                    sys.exit(f"dalle-kernels: DALLE_KERNELS_CUDA=1, but {obstacle}")
                print(f"dalle-kernels: building without the CUDA kernels ({obstacle})", file=sys.stderr)
                return
            package = (ROOT if self.inplace else Path(self.build_lib)) / "dalle_kernels"
            package.mkdir(parents=True, exist_ok=True)
            build(package / "_cuda.so")

    return BuildWithCuda


def _native() -> dict:
    from torch.utils.cpp_extension import CppExtension

    sources = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*.cpp")
        if "tests" not in path.parts
        and path.name != "cuda_op.cpp"  # this and csrc/cuda are the CUDA library's
        and path.parent.name != "cuda"
    )
    extension = CppExtension(
        "dalle_kernels._native",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        # Without -fopenmp at::parallel_for, a template, runs on one thread. The runtime it links is torch's own.
        extra_compile_args=[
            *("-O3", "-std=c++20", "-fopenmp", "-fvisibility=hidden"),
            *("-Wno-psabi", "-Wno-ignored-attributes", "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
        ],
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": _build_ext()}}


def main() -> None:
    obstacle = _obstacle()
    if obstacle is None:
        setup(**_native())
        return
    if os.environ.get("DALLE_KERNELS_NATIVE") == "1":
        sys.exit(f"dalle-kernels: DALLE_KERNELS_NATIVE=1, but {obstacle}")
    print(f"dalle-kernels: building without the native CPU kernels ({obstacle})", file=sys.stderr)
    setup()


main()
