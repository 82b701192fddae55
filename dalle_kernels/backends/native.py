"""Loads what `csrc` built, and says what it holds: `python -m dalle_kernels.backends.native`."""

from __future__ import annotations

import ctypes
import json
import platform
import re
import sys
import warnings
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch

from dalle_kernels.backends import cuda_library

LIBRARY = Path(__file__).parents[1] / "_cpu.so"
# What the build left where it left the library out: why.
LEFT_OUT = LIBRARY.with_name("_left_out.txt")
_WISH = "DALLE_KERNELS_NATIVE=0"
_NAMESPACE = __name__.partition(".")[0] + "_cpu"


class Library:
    """The CPU library: its operations become `torch.ops.dalle_kernels_cpu`, and here is what it tells of itself.

    Raises:
        OSError: where it cannot be loaded.
        ValueError: for a bad DALLE_KERNELS_CPU_ISA or DALLE_KERNELS_CPU_KEEP_MB, now and not in a computation.
    """

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))
        self._check(self._text("start", _NAMESPACE.encode()))

    def _text(self, name: str, *arguments: bytes) -> str | None:
        function = self._functions[f"dalle_kernels_cpu_{name}"]
        function.restype = ctypes.c_char_p
        said = function(*arguments)
        return None if said is None else said.decode()

    def _number(self, name: str) -> int:
        function = self._functions[f"dalle_kernels_cpu_{name}"]
        function.restype = ctypes.c_int64
        return function()

    @staticmethod
    def _check(problem: str | None) -> None:
        if problem is not None:
            raise ValueError(problem)

    def built(self) -> str:
        """For which processors, with which compiler, for which torch."""
        return self._text("built") or ""

    def isa(self) -> str:
        """The instruction set in use: avx2, avx512, avx512_bf16, or none."""
        return self._text("isa") or ""

    def set_isa(self, name: str) -> None:
        """Uses a lower instruction set than the processor's best; ValueError for one that it lacks."""
        self._check(self._text("set_isa", name.encode()))

    def supported_isas(self) -> list[str]:
        """The instruction sets that this processor can run, lowest first."""
        return (self._text("supported_isas") or "").split()

    def kept_limit(self) -> int:
        """Bytes of freed results that may be kept; at first DALLE_KERNELS_CPU_KEEP_MB."""
        return self._number("kept_limit")

    def set_kept_limit(self, limit: int) -> None:
        """Keeps at most `limit` bytes from now on; 0 leaves all memory to torch."""
        self._functions.dalle_kernels_cpu_set_kept_limit(ctypes.c_int64(limit))

    def kept_bytes(self) -> int:
        """Bytes of freed results that are kept now."""
        return self._number("kept_bytes")

    def release_kept(self) -> None:
        """Gives the memory of kept results back to the system."""
        self._functions.dalle_kernels_cpu_release_kept()


def _why_left_out() -> str:
    if (elsewhere := _installed()) is not None:
        return f"these are the sources, not what pip installed in {elsewhere}: run from another folder"
    return LEFT_OUT.read_text().strip() if LEFT_OUT.exists() else "it was never built"


def _installed() -> Path | None:
    """The folder of an installed package that has a library, where this one, found first, has none."""
    for folder in sys.path:
        package = Path(folder or ".").resolve() / LIBRARY.parent.name
        if package != LIBRARY.parent and (package / LIBRARY.name).exists():
            return package.parent
    return None


def _load() -> tuple[Library | None, str]:
    """The library, or why there is none."""
    if not LIBRARY.exists():
        return None, f"the native library is absent: {_why_left_out()}"
    try:
        return Library(LIBRARY), ""
    except OSError as error:
        return None, f"the native library does not load: {error}"


NATIVE, _absence = _load()


def _source() -> str:
    """What pip installed this package from, as its command line takes it."""
    try:
        origin = json.loads(distribution("dalle-kernels").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return "."
    sources = (LIBRARY.parents[1] / "pyproject.toml").exists()
    url = origin.get("url", "." if sources else "dalle-kernels")
    if "vcs_info" in origin:
        return f"{origin['vcs_info']['vcs']}+{url}"
    return ("--editable " if origin.get("dir_info", {}).get("editable") else "") + url


_warned = False


def warn_of_absence() -> None:
    """Says once that calls which the CPU kernels would serve are slow, and how to mend it; not to whoever wanted it so.

    `warnings.filterwarnings("ignore", "dalle_kernels")` silences it.
    """
    global _warned
    if NATIVE is not None or _warned or _why_left_out() == _WISH:
        return
    _warned = True
    said = f"dalle_kernels: CPU tensors go to the slow reference backend; {_absence}"
    if _installed() is None:
        said += ". With a C++ compiler on the path:\n    pip install --force-reinstall --no-deps --no-cache-dir "
        said += _source()
    warnings.warn(said, stacklevel=2)


def absence() -> str | None:
    """Why the native CPU kernels cannot be used, or None."""
    if NATIVE is None:
        return _absence
    if not NATIVE.supported_isas():
        return "the native kernels need AVX2 or AVX-512, which this processor lacks"
    return None


def instruction_set() -> str:
    """The instruction set that the native CPU kernels use now, such as "avx512_bf16"; "none" without them."""
    return "none" if NATIVE is None else NATIVE.isa()


def processor() -> str:
    """The processor's name, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def refuse_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why native CPU kernels cannot serve tensors of `dtype` on `device`, or None: every room's first question."""
    if device.type != "cpu":
        return f"it runs on CPU tensors, these are on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {dtype}"
    return absence()


def report() -> str:
    """What was built of both libraries, for what, with what."""
    return f"{_report_cpu()}\n{cuda_library.report()}"


def _report_cpu() -> str:
    if NATIVE is None:
        return f"CPU kernels: none: {_absence}"
    supported = ", ".join(NATIVE.supported_isas()) or "none that this processor has"
    return f"CPU kernels: built for {NATIVE.built()}; instruction sets: {supported}; in use: {NATIVE.isa()}"


if __name__ == "__main__":
    print(report())
