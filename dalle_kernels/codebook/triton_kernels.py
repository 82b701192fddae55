"""The codebook's Triton backend: what it serves, and where its functions are."""

from __future__ import annotations

from dalle_kernels.backends import Call
from dalle_kernels.codebook.triton_gumbel import gumbel_backward, gumbel_forward
from dalle_kernels.codebook.triton_vq import vq_backward, vq_forward
from dalle_kernels.triton_common import obstacle

__all__ = ["gumbel_backward", "gumbel_forward", "refuse", "vq_backward", "vq_forward"]

WIDEST = 256


def refuse(call: Call) -> str | None:
    if call.width > WIDEST:
        return f"the codebook is {call.width} wide, the kernels hold rows of at most {WIDEST}"
    return obstacle(call.device, call.dtype)
