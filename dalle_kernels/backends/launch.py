"""Launch settings of the Triton kernels: one small table, looked up and never searched at run time.

`launch.json` holds rows such as

    {"kernel": "attention_forward", "arch": 90, "bits": 16, "width": 64, "settings": {"num_warps": 4, ...}}

and serves a call with the row of its kernel and element size that was written for the newest architecture which is not
newer than the device, and for the smallest width that holds the call's. So that a row for a large width takes no older
architecture's narrow calls unseen, an architecture that has one states each narrower width that older ones have: a test
sees to it. `python -m benchmarks tune` measures them on a GPU and rewrites the rows of that GPU's architecture; nothing
here or at import time ever does.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

TABLE = Path(__file__).with_name("launch.json")

# The architecture whose rows the interpreter follows, which has none of its own.
INTERPRETED = 90


@functools.lru_cache(maxsize=1)
def rows() -> tuple[Mapping, ...]:
    """The table as it stands in `launch.json`."""
    return tuple(json.loads(TABLE.read_text()))


def served(*kernels: str) -> list[tuple[int, int]]:
    """(bits, width) of every row of these kernels, each once, whatever its architecture."""
    return sorted({(row["bits"], row["width"]) for row in rows() if row["kernel"] in kernels})


@functools.lru_cache(maxsize=64)
def architecture(device: torch.device | str) -> int:
    """Compute capability of `device` as one number (8.0 is 80); `INTERPRETED` for tensors on the CPU."""
    if torch.device(device).type != "cuda":
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.lru_cache(maxsize=1024)
def settings_for(kernel: str, arch: int, bits: int, width: int) -> Mapping[str, Any]:
    """The settings of one kernel: a read-only mapping of what its row lists (tile sizes, num_warps, num_stages ...).

    Args:
        kernel: name in the table, such as "attention_forward".
        arch: compute capability, such as 90.
        bits: size of an element of the inputs, 16 or 32; of decoding over an eight-bit cache, 8.
        width: head dimension or codebook width.

    Raises:
        ValueError: no row serves the call; the message says which do exist.

    Example:
        >>> settings_for("attention_forward", 90, 16, 64)["num_warps"]
        4
    """
    row = serving_row(rows(), kernel, arch, bits, width)
    if row is None:
        known = sorted((row["arch"], row["bits"], row["width"]) for row in rows() if row["kernel"] == kernel)
        raise ValueError(
            f"launch.json has no row for kernel {kernel!r} at architecture {arch}, {bits} bits and width {width}; "
            f"it has (architecture, bits, largest width): {known}"
        )
    return MappingProxyType(dict(row["settings"]))


def serving_row(table: Iterable[Mapping], kernel: str, arch: int, bits: int, width: int) -> Mapping | None:
    """The row of `table` that serves a call, if any does: architecture comes before width, as the module says."""
    fitting = (
        row
        for row in table
        if row["kernel"] == kernel and row["bits"] == bits and row["width"] >= width and row["arch"] <= arch
    )
    return min(fitting, key=lambda row: (-row["arch"], row["width"]), default=None)


def forget() -> None:
    """Drops what was read and looked up, after the table was rewritten."""
    rows.cache_clear()
    settings_for.cache_clear()
