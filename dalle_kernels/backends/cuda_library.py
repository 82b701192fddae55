"""The CUDA kernels of `csrc/**/*.cu`: where their library is, and when it can serve.

One shared library, built against PyTorch's stable ABI: the same file serves torch 2.10 and later and any Python. It
is loaded when a CUDA tensor first asks for it.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).parents[1] / "_cuda.so"
_ABSENT = "the CUDA library is absent; build it where nvcc is: DALLE_KERNELS_CUDA=1 pip install --no-build-isolation ."


def report() -> str:
    """What was built, for what, with what."""
    if not LIBRARY.exists():
        return "CUDA kernels: none: " + _ABSENT
    try:
        built = ctypes.CDLL(str(LIBRARY)).dalle_kernels_cuda_built
    except OSError as error:
        return f"CUDA kernels: built, but they do not load: {error}"
    built.restype = ctypes.c_char_p
    driver = f"needs a driver for CUDA {_versions()[0] // 1000} or later"
    return f"CUDA kernels: built for {built().decode()}; {_refuse_driver() or driver}"


def _versions() -> tuple[int, int]:
    """Of the CUDA runtime inside the library and of what the driver supports, such as 13000; 0 without a driver."""
    library = ctypes.CDLL(str(LIBRARY))
    return library.dalle_kernels_cuda_runtime(), library.dalle_kernels_cuda_driver()


def _refuse_driver() -> str | None:
    """Why the CUDA runtime inside the library cannot work with the driver that is installed, or None.

    Within a major version any driver serves any runtime; none serves a runtime of a later one.
    """
    runtime, driver = _versions()
    if not driver or driver // 1000 >= runtime // 1000:
        return None
    major = runtime // 1000
    return (
        f"the CUDA library holds the runtime of CUDA {major}, the driver here supports CUDA"
        f" {driver // 1000}.{driver % 1000 // 10}: update the driver, or build the library with an nvcc before {major}"
    )


@lru_cache(maxsize=1)
def _load() -> str | None:
    """Loads the library; says why that failed, or None."""
    if not LIBRARY.exists():
        return _ABSENT
    try:
        if reason := _refuse_driver():
            return reason
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the CUDA library does not load: {error}"
    return None


def operations() -> Any:
    """The namespace of the library's operations, `torch.ops.dalle_kernels_cuda`.

    Raises:
        RuntimeError: where it cannot be loaded.
    """
    if reason := _load():
        raise RuntimeError(reason)
    return torch.ops.dalle_kernels_cuda


def numbers(function: str, *arguments: int) -> dict[str, int]:
    """What the library's `function` says of its kernels, by the names that its schema gives."""
    operation = getattr(operations(), function).default
    names = [result.name for result in operation._schema.returns]
    return dict(zip(names, operation(*arguments), strict=True))


@lru_cache(maxsize=16)
def _refuse_device(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it runs on CUDA tensors, these are on {device.type}"
    if torch.version.hip is not None:
        return f"it is made for NVIDIA GPUs, this torch for AMD's (ROCm {torch.version.hip})"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or later"
    return _load()


def refuse(device: torch.device, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the library cannot serve tensors of `dtype` on `device`, or None: every room's first question."""
    if reason := _refuse_device(device):
        return reason
    if dtype not in dtypes:
        return f"it takes {', '.join(str(each).removeprefix('torch.') for each in dtypes)}, not {dtype}"
    return None


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """How many blocks run side by side on `device`, counting one a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself where its rows start at multiples of 16 bytes and are contiguous, else a contiguous copy.

    A contiguous tensor may start anywhere too: the parameters of a flattened module do.
    """
    size = tensor.element_size()
    whole = tensor.data_ptr() % 16 == 0 and tensor.stride(-1) == 1
    whole = whole and all(stride * size % 16 == 0 for stride in tensor.stride()[:-1])
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=16)
def shared_memory(device: torch.device, blocks: int) -> int:
    """Bytes of shared memory that each of `blocks` blocks on one multiprocessor of `device` can have."""
    properties = torch.cuda.get_device_properties(device)
    reserved = 1024  # of every block, by the system
    whole = properties.shared_memory_per_multiprocessor
    return min(whole // blocks - reserved, properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]
