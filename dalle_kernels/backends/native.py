"""Loads what `csrc` built, and says what it holds: `python -m dalle_kernels.backends.native`."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

from dalle_kernels.backends import cuda_library

NATIVE: ModuleType | None = None
_absence = ""

try:
    _loaded = import_module("dalle_kernels._native")

    if _loaded.torch_version.split(".")[:2] == torch.__version__.split(".")[:2]:
        NATIVE = _loaded
        # A bad DALLE_KERNELS_CPU_ISA or _KEEP_MB is an error here, not in the middle of a computation.
        NATIVE.isa(), NATIVE.kept_limit()
    else:
        _absence = f"the native library was built for torch {_loaded.torch_version}, this is {torch.__version__}"
except ImportError as error:
    _absence = f"the native library is absent ({error}); build it: pip install --no-build-isolation ."


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
    return f"CPU kernels: built for torch {NATIVE.torch_version}; instruction sets: {supported}; in use: {NATIVE.isa()}"


if __name__ == "__main__":
    print(report())
