"""The rate that bounds a cell, measured beside it: in the same rounds as its contenders, so that a neighbour or a clock
that slows them slows it too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from benchmarks.harness.cells import dtype_name
from benchmarks.harness.memory import cache_bytes


@dataclass(frozen=True)
class Ceiling:
    """What bounds a cell.

    Attributes:
        name: "copy", or "gemm" and a dtype.
        amount: operations or bytes of one run.
        runs: ways to perform them, by name; the fastest counts.
    """

    name: str
    amount: float
    runs: dict[str, Callable[[], object]]

    @property
    def unit(self) -> str:
        return "GB/s" if self.name == "copy" else "TFLOP/s"

    def rate(self, milliseconds: float) -> float:
        """TFLOP/s of a product, GB/s of a copy."""
        return self.amount / milliseconds / (1e6 if self.name == "copy" else 1e9)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether matrix products of bfloat16 have instructions (on a CPU: of oneDNN's kind) on `device`."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@lru_cache(maxsize=4)  # the tensors of one kind serve every cell
def ceiling_of(kind: str, dtype: torch.dtype, device: torch.device) -> Ceiling:
    """What bounds cells of `kind` ("gemm" or "copy") and `dtype` on `device`.

    Where the processor does not multiply bfloat16 its products run as float32's, and so does the ceiling.
    """
    if kind == "copy":
        size = (2**31 if device.type == "cuda" else max(2**27, 4 * cache_bytes(device))) // 4
        source = torch.ones(size, device=device)
        target = torch.empty_like(source)
        return Ceiling("copy", 2 * size * 4, {"copy": lambda: target.copy_(source)})
    if not multiplies_bfloat16(device):
        dtype = torch.float32
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    runs: dict[str, Callable[[], object]] = {"torch.mm": lambda: a @ b}
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # torch.mm calls MKL, which takes a slow path on processors that are not Intel's; oneDNN does not.
        runs["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return Ceiling(f"gemm {dtype_name(dtype)}", 2 * side**3, runs)
