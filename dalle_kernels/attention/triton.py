"""The Triton kernels of sparse attention as a backend: see triton_forward.py and triton_backward.py."""

from __future__ import annotations

from dalle_kernels.attention.triton_backward import backward
from dalle_kernels.attention.triton_forward import WIDEST, forward
from dalle_kernels.backends.contract import Call
from dalle_kernels.backends.triton_common import obstacle

__all__ = ["backward", "forward", "refuse"]


def refuse(call: Call) -> str | None:
    if call.width > WIDEST:
        return f"head dimension {call.width} is more than {WIDEST}"
    return obstacle(call.device, call.dtype)
