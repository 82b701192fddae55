"""Compiles the CPU kernels into one shared library against PyTorch's stable C interface.

    python csrc/build_cpu.py dalle_kernels/_cpu.so

Needs a C++ compiler ($CXX, c++ where it is not set) and nothing of torch: csrc/torch_abi.h declares what is called.
The library then serves torch 2.11 and later under any Python. Objects are kept under build/cpu and made again when a
source, a header that it includes, a flag or the compiler changed; MAX_JOBS says how many are compiled at a time.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent
sys.path.insert(0, str(CSRC / "cuda"))

from object_cache import compile_object, compiler, run  # noqa: E402  (csrc/cuda/object_cache.py)

OUTPUT = CSRC.parent / "build" / "cpu"
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall"]
FLAGS += ["-Wno-psabi", "-Wno-ignored-attributes", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
LINK_FLAGS = ["-shared", "-s", "-Wl,--gc-sections"]
EXPORTED = "{ global: dalle_kernels_cpu_*; local: *; };"


def obstacle() -> str | None:
    """Why the CPU kernels cannot be built here, or None."""
    if sys.platform != "linux":
        return f"the CPU kernels are built on Linux, this is {sys.platform}"
    if platform.machine() not in ("x86_64", "AMD64", "aarch64"):
        return f"the CPU kernels are written for x86-64 and AArch64, this is {platform.machine()}"
    if missing := [name for name in compiler() if not name.startswith("-") and shutil.which(name) is None]:
        return f"no C++ compiler ({missing[0]}) on the path"
    return None


def sources() -> list[Path]:
    """What the library is made of; csrc/cuda and the cuda_op.cpp are the CUDA library's."""
    return sorted(
        path
        for path in CSRC.rglob("*.cpp")
        if path.name != "cuda_op.cpp" and path.relative_to(CSRC).parts[0] not in ("cuda", "tests")
    )


def build(library: Path) -> None:
    """Compiles and links `library`.

    Raises:
        RuntimeError: with the compiler's words, when it fails.
    """
    OUTPUT.mkdir(parents=True, exist_ok=True)
    cxx = compiler()
    version = run([*cxx, "--version"]).splitlines()[0]
    built = f'-DDALLE_BUILT="{platform.machine()}, {version}; torch 2.11 and later"'

    def compile_one(source: Path) -> Path:
        extra = [built] if source.name == "library.cpp" else []
        name = str(source.relative_to(CSRC)).replace("/", "_")
        return compile_object(source, [*cxx, *FLAGS, *extra, f"-I{CSRC}"], OUTPUT, name, version)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, sources()))
    # The functions come from torch's library, which is loaded before this one. An empty one of its name stands in for
    # it here, so that the linker writes down where they are.
    stand_in = OUTPUT / "libtorch_cpu.so"
    run([*cxx, "-shared", "-Wl,-soname,libtorch_cpu.so", "-x", "c++", os.devnull, "-o", str(stand_in)])
    exported = OUTPUT / "exported"
    exported.write_text(EXPORTED)
    library.parent.mkdir(parents=True, exist_ok=True)
    partial = library.with_name(f"{library.name}.{os.getpid()}")
    needed = ["-Wl,--no-as-needed", str(stand_in), "-Wl,--as-needed"]
    run([*cxx, *LINK_FLAGS, f"-Wl,--version-script={exported}", *map(str, objects), *needed, "-o", str(partial)])
    os.replace(partial, library)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
    print(f"built {sys.argv[1]}")
