"""What a call needs at its highest, and how to keep within the machine's memory."""

from __future__ import annotations

import contextlib
import ctypes
import math
import platform
import re
from collections.abc import Callable
from pathlib import Path

import torch

from dalle_kernels.backends import native


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call needs at its highest beyond what was there before; None where that cannot be told."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if platform.system() != "Linux":
        return None
    with contextlib.suppress(OSError, AttributeError):
        if native.NATIVE is not None:
            native.NATIVE.release_kept()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, so that it counts when it is used
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew from here
        before = _status_bytes("VmRSS")
        run()
        return max(_status_bytes("VmHWM") - before, 0)
    return None


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def cache_bytes(device: torch.device) -> int:
    """The last-level cache: what rotating buffers must exceed."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KM]?)", path.read_text().strip()).groups()  # type: ignore[union-attr]
        sizes.append(int(number) * {"": 1, "K": 2**10, "M": 2**20}[unit])
    return max(sizes) or 2**25


def copies_beyond_cache(bytes_per_copy: float, device: torch.device) -> int:
    """How many rotating copies of an input make a working set of twice the last-level cache."""
    return max(1, min(64, math.ceil(2 * cache_bytes(device) / max(bytes_per_copy, 1))))


def limit_memory() -> None:
    """Makes an allocation beyond the machine's memory an error of the contender, not the end of the process."""
    if platform.system() != "Linux":
        return
    import resource

    available = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    if available:
        limit = _status_bytes("VmSize") + int(available[1]) * 1024 * 9 // 10
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
