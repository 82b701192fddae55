"""The door to the Gumbel-softmax lookup: checks, schemas, shapes, derivative and choice of backend."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from dalle_kernels.backends.choice import Operation, register
from dalle_kernels.backends.library import Derivative, Entry
from dalle_kernels.backends.sharding import Merge, flattened
from dalle_kernels.checks import positive_temperature, positive_there, rows_contiguous, seed_and_row
from dalle_kernels.codebook.checks import check_pair, contiguous, describe, gradient_like, refuse_nan
from dalle_kernels.codebook.gumbel import reference
from dalle_kernels.codebook.gumbel.contract import AXES, CODES, Backend, Grads, Inputs, Kept, Needs, Outputs, call_of
from dalle_kernels.codebook.gumbel.merge import may_merge, merged

if TYPE_CHECKING:
    from dalle_kernels.codebook.gumbel import cpu, triton

    _BACKENDS: tuple[Backend, ...] = (cpu, triton, reference)

OPERATION: Operation[Backend] = Operation(
    "gumbel_lookup",
    {
        "triton": "dalle_kernels.codebook.gumbel.triton",
        "cpu": "dalle_kernels.codebook.gumbel.cpu",
        "reference": "dalle_kernels.codebook.gumbel.reference",
    },
    describe,
)


def gumbel_lookup(
    logits: torch.Tensor,
    codebook: torch.Tensor,
    temperature: float | torch.Tensor,
    hard: bool = False,
    noise: bool = True,
    seed: int | torch.Tensor | None = None,
    backend: str = "auto",
    *,
    row_offset: int | torch.Tensor = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """softmax((logits + g) / temperature) @ codebook, the sampled index and the KL to uniform, in one pass.

    g is the Gumbel noise that `dalle_kernels.noise` defines, regenerated in the backward pass instead of stored; no
    N x K table is made. Differentiable with respect to `logits` and `codebook`; `temperature` is a constant.

    Source: Jang et al. 2017 (Gumbel-softmax), equations 2 and 3; Ramesh et al. 2021, section 2.1.

    Args:
        logits: [..., K], float16, bfloat16, float32 or float64; computed in float32 inside. Row n of the flattened
            table takes row n of the noise.
        codebook: [K, D], dtype and device of `logits` (under autocast both are cast).
        temperature: tau > 0, a number or a one-element tensor (which a CUDA graph can change between replays).
        hard: straight-through: latents are the sampled row itself, the gradient is that of the soft mixture.
        noise: False for evaluation: the argmax row, without noise (straight-through as well).
        seed: a 64-bit int or one-element int64 tensor; None draws one from torch's generator.
        backend: "auto", "reference", "cpu" or "triton"; see `explain`.
        row_offset: which row of the noise row 0 takes, an int or one-element int64 tensor: a process that has the rows
            from row a of a batch on draws with `row_offset=a` what the whole batch would have drawn there.

    Returns:
        latents: [..., D] in the dtype of `logits`.
        indices: int64 [...], argmax(logits + g), the first where several are equal.
        kl: float32 [...] (float64 for float64 logits), log K - entropy of softmax(logits), in nats.

    Raises:
        TypeError, ValueError: for wrong shapes, dtypes, devices, a temperature that is not above 0, or, on the CPU, NaN
            among the logits (on a GPU, where looking would make the host wait, NaN goes through to latents and kl).

    Example:
        >>> latents, indices, kl = gumbel_lookup(torch.randn(2, 16, 512), torch.randn(512, 32), temperature=0.9)
        >>> latents.shape, indices.shape, kl.shape
        (torch.Size([2, 16, 32]), torch.Size([2, 16]), torch.Size([2, 16]))
    """
    logits, codebook = check_pair("logits", logits, codebook)
    if logits.shape[-1] != codebook.shape[0]:
        raise ValueError(
            f"codebook: got {codebook.shape[0]} rows, wanted {logits.shape[-1]}, one for each of the logits' codes"
        )
    latents, indices, kl, *_ = _ENTRY(
        Inputs(
            flattened(rows_contiguous(logits), -1, logits.shape[-1]),
            codebook.contiguous(),
            positive_temperature(temperature, logits.device),
            hard or not noise,
            noise,
            *seed_and_row(seed, row_offset, logits.device),
        ),
        backend,
    )
    if logits.dim() == 2:
        return latents, indices, kl
    rows = logits.shape[:-1]
    return latents.reshape(*rows, codebook.shape[1]), indices.reshape(rows), kl.reshape(rows)


register(gumbel_lookup, OPERATION)


def _forward(backend: Backend, inputs: Inputs) -> Outputs:
    positive_there(inputs.temperature)
    outputs = backend.forward(inputs)
    refuse_nan("logits", inputs.logits, outputs.kl)
    return outputs


def _forward_fake(inputs: Inputs, _: str) -> Outputs:
    return fake_outputs(inputs.logits, inputs.codebook, inputs.hard)


def fake_outputs(rows_of: torch.Tensor, codebook: torch.Tensor, hard: bool) -> Outputs:
    """What a lookup of as many rows as `rows_of` has gives."""
    rows, width = rows_of.shape[0], codebook.shape[1]
    wide = torch.float64 if rows_of.dtype == torch.float64 else torch.float32
    kl, maximum, log_noisy, log_clean = (rows_of.new_empty(rows, dtype=wide) for _ in range(4))
    return Outputs(
        latents=rows_of.new_empty(rows, width),
        indices=rows_of.new_empty(rows, dtype=torch.int64),
        kl=kl,
        maximum=maximum,
        log_noisy=log_noisy,
        log_clean=log_clean,
        mixture=rows_of.new_empty((rows, width) if hard else (0,), dtype=wide),
    )


def _backward(backend: Backend, grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    return backend.backward(Grads(*contiguous(grads)), kept, needs)


_ENTRY = Entry(
    "gumbel_forward",
    OPERATION,
    Inputs,
    Outputs,
    call_of,
    _forward,
    _forward_fake,
    AXES,
    Derivative("gumbel_backward", Grads, Kept, Needs, _backward, reference.jvp, gradient_like),
    choice=Merge(CODES, partial(may_merge, OPERATION, call_of), merged),
)
