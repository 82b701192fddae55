"""What all Triton kernels share: a matrix product that is right under the interpreter too, and where they can run."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl


def unsupported(triton_version: str, numpy_version: str, interpreted: bool) -> str | None:
    """What makes these versions of Triton and NumPy useless to the kernels, in one line, or None.

    Example:
        >>> unsupported("3.6.0", "2.4.6", interpreted=False)
        >>> unsupported("3.6.0", "2.4.6", interpreted=True)
        "the interpreter of triton 3.6.0 wants NumPy below 2.4, 2.4.6 is installed: pip install 'numpy<2.4'"
    """
    of_triton, of_numpy = (tuple(int(part) for part in v.split(".")[:2]) for v in (triton_version, numpy_version))
    if of_triton < (3, 6):
        return f"triton {triton_version} is installed, 3.6 or later is wanted"
    if interpreted and of_triton < (3, 7) and of_numpy >= (2, 4):
        # It asks for int(array) of arrays with a dimension, which NumPy 2.4 refuses.
        return (
            f"the interpreter of triton {triton_version} wants NumPy below 2.4, {numpy_version} is installed: "
            "pip install 'numpy<2.4'"
        )
    return None


INTERPRETED = hasattr(triton, "knobs") and triton.knobs.runtime.interpret  # Triton 3.3 and older have no knobs
"""Whether kernels defined from here on run under Triton's interpreter (TRITON_INTERPRET=1 when they are imported)."""

# Here, because every module with kernels imports this one before it defines them.
if reason := unsupported(triton.__version__, np.__version__, INTERPRETED):
    raise ImportError(reason)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b in fp32, with `PRECISION` from `precision`."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def tanh(x):
    """x P(x^2) / Q(x^2), minimax, within 3.2e-7 of tanh(x); Triton's own are unknown to its interpreter. NaN stays."""
    x = tl.where(x > 9.011, 9.011, x)
    x = tl.where(x < -9.011, -9.011, x)
    square = x * x
    p = 1.3334643611528918e-08 * square + 2.0594679881469347e-05
    p = p * square + 0.003494714153930545
    p = p * square + 0.13380290567874908
    q = 7.768379646222456e-07 * square + 0.000328420486766845
    q = q * square + 0.025873659178614616
    q = q * square + 0.46713605523109436
    return x * (p * square + 1.0) / (q * square + 1.0)


def steepness(scale: float, softcap: float | None) -> float:
    """How fast tanh(steepness q . k) of a soft cap rises, as a number that float32 holds; any where there is no cap."""
    highest = torch.finfo(torch.float32).max
    return 0.0 if softcap is None else max(-highest, min(scale / softcap, highest))


def ceil_div(a: int, b: int) -> int:
    """On the host, where triton.cdiv takes microseconds: it is made for kernels too."""
    return -(-a // b)


def precision(dtype: torch.dtype) -> str:
    """How `dot` multiplies operands of `dtype`: fp32 as three tf32 products, 16-bit types as they are.

    Triton's interpreter (3.6 to 3.9) multiplies the bit patterns of bfloat16 as integers; there they are widened first.
    """
    if dtype == torch.float32:
        return "tf32x3"
    return "widened" if INTERPRETED else "ieee"


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot serve tensors of this device and dtype here, or None."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {dtype} is not one of float32, bfloat16, float16"
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"tensors are on {device.type}, Triton kernels run on CUDA (or anywhere with TRITON_INTERPRET=1)"
    if torch.version.hip is not None:
        return f"the Triton kernels are made for NVIDIA GPUs, this torch for AMD's (ROCm {torch.version.hip})"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}, 8.0 or later is wanted"
    return None
