"""Builds the native kernels of `csrc/` where their compilers are at hand.

DALLE_KERNELS_NATIVE=auto (default) builds the CPU kernels where a C++ compiler is, and says why where they cannot be
built; =1 makes their absence an error; =0 leaves them out: the package is then pure Python. They need no torch to build
(csrc/build_cpu.py), so an isolated build has them too.

DALLE_KERNELS_CUDA=auto (default) also compiles the CUDA kernels where nvcc is and torch has CUDA; =1 compiles them
beside any torch (no GPU is needed) or fails; =0 leaves them out. csrc/cuda/build_cuda.py says what else steers that.

A wheel with native kernels is tagged for its platform, one without them for any.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT / "csrc"), str(ROOT / "csrc" / "cuda")]

import build_cpu  # noqa: E402  (csrc/build_cpu.py)
import build_cuda  # noqa: E402  (csrc/cuda/build_cuda.py)


def _obstacle() -> str | None:
    """Why the CPU kernels are left out, or None."""
    if os.environ.get("DALLE_KERNELS_NATIVE", "auto") == "0":
        return "DALLE_KERNELS_NATIVE=0"
    return build_cpu.obstacle()


def _cuda_obstacle() -> str | None:
    """Why the CUDA kernels are left out, or None."""
    wanted = os.environ.get("DALLE_KERNELS_CUDA", "auto")
    if wanted == "0":
        return "DALLE_KERNELS_CUDA=0"
    if build_cuda.find_nvcc() is None:
        return "no nvcc: looked at $NVCC, $CUDA_HOME/bin and the path"
    try:
        import torch
    except ImportError:
        return "torch cannot be imported here; install it and build with --no-build-isolation"
    if wanted != "1" and torch.version.cuda is None:
        return "this torch has no CUDA; DALLE_KERNELS_CUDA=1 builds them all the same"
    return None


class BuildNative(build_ext):
    """Builds the CPU library, and the CUDA library beside it: plain shared libraries that torch loads."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).absolute()
        build_cpu.build(library)
        if obstacle := _cuda_obstacle():
            if os.environ.get("DALLE_KERNELS_CUDA") == "1":
                sys.exit(f"dalle-kernels: DALLE_KERNELS_CUDA=1, but {obstacle}")
            print(f"dalle-kernels: building without the CUDA kernels ({obstacle})", file=sys.stderr)
            return
        build_cuda.build(library.with_name("_cuda.so"))


class BuildPure(build_py):
    """The package without kernels, with a note that says why."""

    def run(self) -> None:
        super().run()
        folder = (ROOT if self.editable_mode else Path(self.build_lib)) / "dalle_kernels"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_left_out.txt").write_text(f"{_obstacle()}\n")


class PlatformWheel(bdist_wheel):
    """A wheel that any Python 3 can load: the libraries know nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform = super().get_tag()
        return "py3", "none", platform


def main() -> None:
    obstacle = _obstacle()
    if obstacle is None:
        library = Extension("dalle_kernels._cpu", sources=[])
        setup(ext_modules=[library], cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel})
        return
    if os.environ.get("DALLE_KERNELS_NATIVE") == "1":
        sys.exit(f"dalle-kernels: DALLE_KERNELS_NATIVE=1, but {obstacle}")
    print(f"dalle-kernels: building without the native CPU kernels ({obstacle})", file=sys.stderr)
    setup(cmdclass={"build_py": BuildPure})


main()
