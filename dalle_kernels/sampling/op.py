"""The door to sampling: checks, schema, shapes and choice of backend."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any

import torch

from dalle_kernels.backends.choice import Operation, register
from dalle_kernels.backends.contract import Call
from dalle_kernels.backends.library import Entry
from dalle_kernels.checks import (
    LEAST,
    LEAST_SAID,
    check_alike,
    check_number,
    check_tensor,
    rows_contiguous,
    seed_and_row,
)
from dalle_kernels.sampling.contract import AXES, Backend, Inputs, Outputs, call_of

if TYPE_CHECKING:
    from dalle_kernels.sampling import cpu, cuda, reference, triton

    _BACKENDS: tuple[Backend, ...] = (cpu, cuda, triton, reference)


def _describe(logits: torch.Tensor, *_: Any, **__: Any) -> Call:
    check_tensor("logits", logits, rank=2)
    return Call(logits.device, logits.dtype, logits.shape[-1])


OPERATION: Operation[Backend] = Operation(
    "sample_tokens",
    {
        "cuda": "dalle_kernels.sampling.cuda",
        "triton": "dalle_kernels.sampling.triton",
        "cpu": "dalle_kernels.sampling.cpu",
        "reference": "dalle_kernels.sampling.reference",
    },
    _describe,
)


def sample_tokens(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | torch.Tensor | None = None,
    unconditional_logits: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    backend: str = "auto",
    *,
    row_offset: int | torch.Tensor = 0,
) -> torch.Tensor:
    """Draws one token a row: guidance, temperature, top-k, top-p, then argmax of logits plus Gumbel noise.

    Source: Ho and Salimans 2022 (classifier-free guidance), equation 6; Holtzman et al. 2020 (top-p).

    Args:
        logits: [B, V], float16, bfloat16, float32 or float64.
        temperature: what the logits are divided by; 0 takes the most likely token. It, `top_p` and `guidance_scale`
            are real numbers of any type, in the range given once rounded to float32.
        top_k: keep the `top_k` largest logits, and any equal to the smallest of them; None keeps all.
        top_p: keep a token while the tokens strictly likelier than it hold less than `top_p` of the probability (after
            top-k), 0 < top_p <= 1; None keeps all.
        seed: a 64-bit int or one-element int64 tensor; None draws one from torch's generator. Row n takes row n of
            the noise that `dalle_kernels.noise` defines.
        unconditional_logits: [B, V], for guidance: u + guidance_scale (logits - u). A token that is -inf in `logits`,
            in u or in both is never drawn, whatever the scale.
        guidance_scale: 1 is the conditional model itself, but for tokens that only u rules out.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see `explain`.
        row_offset: which row of the noise row 0 takes, an int or one-element int64 tensor: a process that has the rows
            from row a of a batch on draws with `row_offset=a` what the whole batch would have drawn there.

    Returns:
        int64 [B]; 0 for a row of -inf alone, which leaves nothing to draw.

    Raises:
        TypeError, ValueError: for wrong shapes, dtypes, devices or ranges, or, on the CPU, NaN among the logits.

    Example:
        >>> sample_tokens(torch.tensor([[0.0, 50.0, 0.0]]), seed=1).tolist()
        [1]
    """
    check_tensor("logits", logits, rank=2)
    if logits.shape[1] < 1:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, wanted at least one token a row")
    temperature = check_number(
        "temperature", temperature, f"0 or a finite number of at least {LEAST_SAID}", least=LEAST, or_zero=True
    )
    if top_k is not None and (not isinstance(top_k, (int, numbers.Integral)) or top_k < 1):
        raise ValueError(f"top_k: got {top_k!r}, wanted an int >= 1 or None")
    if top_p is not None:
        top_p = check_number("top_p", top_p, "0 < top_p <= 1 in float32, or None", least=LEAST, most=1.0)
    guidance_scale = check_number("guidance_scale", guidance_scale, "a finite number in float32")
    if unconditional_logits is None:
        if guidance_scale != 1:
            raise ValueError(f"unconditional_logits: got None, wanted logits to guide by {guidance_scale}")
    else:
        check_tensor("unconditional_logits", unconditional_logits, rank=2)
        check_alike("unconditional_logits", unconditional_logits, "logits", logits)
        if unconditional_logits.shape != logits.shape:
            came = tuple(unconditional_logits.shape)
            raise ValueError(f"unconditional_logits: got shape {came}, wanted {tuple(logits.shape)}")
        unconditional_logits = rows_contiguous(unconditional_logits.detach())
    return _ENTRY(
        Inputs(
            rows_contiguous(logits.detach()),
            unconditional_logits,
            guidance_scale,
            temperature,
            0 if top_k is None else min(int(top_k), 2**31 - 1),  # no row is longer, and no int64 too small for it
            1.0 if top_p is None else top_p,
            *seed_and_row(seed, row_offset, logits.device),
        ),
        backend,
    ).tokens


register(sample_tokens, OPERATION)


def _forward(backend: Backend, inputs: Inputs) -> Outputs:
    logits, unconditional = inputs.logits, inputs.unconditional
    if logits.is_cpu:
        for name, tensor in (("logits", logits), ("unconditional_logits", unconditional)):
            # A sum is NaN wherever an element is, and costs one pass without a table of flags; opposite infinities
            # make it NaN too, so the elements have the last word.
            if tensor is not None and math.isnan(tensor.sum().item()) and tensor.isnan().any():
                row = int(tensor.isnan().any(-1).nonzero()[0])
                raise ValueError(f"{name}: row {row} holds NaN, wanted numbers")
    if unconditional is not None and inputs.guidance_scale < 0:
        # The kernels drop what the formula makes -inf or NaN, as it does of every token that either side rules out, but
        # for this: away from -inf is inf.
        inputs = inputs._replace(unconditional=unconditional.masked_fill(logits.isneginf(), -torch.inf))
    return backend.forward(inputs)


def _forward_fake(inputs: Inputs, _: str) -> Outputs:
    return Outputs(inputs.logits.new_empty(inputs.logits.shape[0], dtype=torch.int64))


_ENTRY = Entry("sample_tokens", OPERATION, Inputs, Outputs, call_of, _forward, _forward_fake, AXES)
