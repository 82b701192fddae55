"""Drawing tokens in native code: csrc/sampling. AVX2 or AVX-512, rows shared out over torch's threads."""

from __future__ import annotations

import torch

from dalle_kernels.backends import native
from dalle_kernels.backends.choice import Call


def refuse(call: Call) -> str | None:
    return native.refuse_cpu(call.device, call.dtype)


def describe() -> str:
    return native.instruction_set()


def sample(
    logits: torch.Tensor,
    unconditional: torch.Tensor | None,
    guidance_scale: float,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: torch.Tensor,
) -> torch.Tensor:
    """One token a row, as in `reference`; no sort: top-k and top-p are thresholds found by selection."""
    return torch.ops.dalle_kernels_cpu.sample(logits, unconditional, guidance_scale, temperature, top_k, top_p, seed)
