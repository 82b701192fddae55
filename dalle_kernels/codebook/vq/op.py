"""The door to the nearest-row lookup: checks, schemas, shapes, derivative and choice of backend."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from dalle_kernels.backends.choice import Operation, register
from dalle_kernels.backends.contract import Call
from dalle_kernels.backends.library import Derivative, Entry, plain
from dalle_kernels.backends.sharding import flattened
from dalle_kernels.checks import (
    autocast,
    check_alike,
    check_tensor,
    positive_temperature,
    positive_there,
    rows_contiguous,
    seed_and_row,
)
from dalle_kernels.codebook.checks import check_row_mask, gradient_like, refuse_nan
from dalle_kernels.codebook.statistics.op import CodeStatistics, code_statistics
from dalle_kernels.codebook.vq import reference
from dalle_kernels.codebook.vq.contract import (
    AXES,
    CODES,
    METRICS,
    MOST,
    Backend,
    Grads,
    Inputs,
    Kept,
    Metric,
    Needs,
    Outputs,
    call_of,
    extras,
)

if TYPE_CHECKING:
    from dalle_kernels.codebook.vq import cpu, triton

    _BACKENDS: tuple[Backend, ...] = (cpu, triton, reference)


def _describe(
    features: torch.Tensor, codebook: torch.Tensor, *_: Any, k: int | None = None, temperature: Any = None, **__: Any
) -> Call:
    check_tensor("the first argument", features)
    check_tensor("codebook", codebook)
    return Call(features.device, autocast(features)[0].dtype, codebook.shape[-1], extras(k, temperature))


OPERATION: Operation[Backend] = Operation(
    "vq_lookup",
    {
        "triton": "dalle_kernels.codebook.vq.triton",
        "cpu": "dalle_kernels.codebook.vq.cpu",
        "reference": "dalle_kernels.codebook.vq.reference",
    },
    _describe,
)


@overload
def vq_lookup(
    features: torch.Tensor,
    codebook: torch.Tensor,
    backend: str = "auto",
    *,
    metric: Metric = "euclidean",
    row_mask: torch.Tensor | None = None,
    k: int | None = None,
    temperature: float | torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    row_offset: int | torch.Tensor = 0,
    statistics: Literal[False] = False,
    all_reduce: None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


@overload
def vq_lookup(
    features: torch.Tensor,
    codebook: torch.Tensor,
    backend: str = "auto",
    *,
    metric: Metric = "euclidean",
    row_mask: torch.Tensor | None = None,
    temperature: float | torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    row_offset: int | torch.Tensor = 0,
    statistics: Literal[True],
    all_reduce: Callable[[torch.Tensor], object] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, CodeStatistics]: ...


def vq_lookup(
    features: torch.Tensor,
    codebook: torch.Tensor,
    backend: str = "auto",
    *,
    metric: Metric = "euclidean",
    row_mask: torch.Tensor | None = None,
    k: int | None = None,
    temperature: float | torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    row_offset: int | torch.Tensor = 0,
    statistics: bool = False,
    all_reduce: Callable[[torch.Tensor], object] | None = None,
) -> Any:
    """The nearest codebook row of each feature, with the straight-through gradient.

    Sources: van den Oord et al. 2017 (VQ-VAE), equations 1 to 3, and appendix A.1 for what `statistics` serve; Yu et
    al. 2022 for cosine; Kool et al. 2019 for k draws without replacement. The squared distance is the codebook loss
    and the commitment loss at once: it is differentiable to both sides, with the index held fixed. Nothing of the
    codebook is kept for the backward, so that it may be changed in place before that; a codebook that wants no
    gradient costs none.

    Args:
        features: [..., D], float16, bfloat16, float32 or float64; computed in float32 inside. [H, ..., D] with a
            codebook of H heads.
        codebook: [K, D], or [H, K, D] with one for each head; dtype and device of `features` (under autocast both are
            cast).
        backend: "auto", "reference", "cpu" or "triton"; see `explain`.
        metric: which row is nearest: the one of the largest score, which is -|f - c|^2 for "euclidean", -|f - c| for
            "distance" (the same rows, but for a temperature), f . c for "dot", f . c / |f| |c| for "cosine" (0 where
            either is zero). It decides on the index alone: latents and squared distance are of features and codebook as
            they are.
        row_mask: bool [...], False at rows that do not count: their index is -1, their latents and squared distance are
            0 and take no gradient, what they hold is not looked at.
        k: as many rows, 1 to 8, best first; None for the nearest without a dimension of its own.
        temperature: draws from softmax(scores / temperature), by the Gumbel noise that `dalle_kernels.noise` defines,
            the same on every backend; k draws are without replacement. None takes the nearest.
        seed: of the draw: a 64-bit int or one-element int64 tensor; None draws one from torch's generator.
        row_offset: which row of the noise row 0 of each head takes, an int or one-element int64 tensor: a process that
            has the rows from row a of a batch on draws with `row_offset=a` what the whole batch would have drawn there.
        statistics: also returns how many rows chose each code, and their sums; see `code_statistics`. Not with `k`.
        all_reduce: called on those counts and on those sums, which it changes in place: `torch.distributed.all_reduce`
            makes them those of all processes.

    Returns:
        latents: [..., D] ([..., k, D]), codebook[indices]; its gradient passes to `features` unchanged.
        indices: int64 [...] ([..., k]), the first of the nearest rows.
        squared_distance: float32 [...] ([..., k]) (float64 for float64 features).
        statistics: a `CodeStatistics`, where asked for.

    Raises:
        TypeError, ValueError: for wrong shapes, dtypes, devices or settings, or, on the CPU, NaN or infinity among the
            features. On a GPU the latents of such a row are NaN.

    Example:
        >>> latents, indices, squared_distance = vq_lookup(torch.randn(2, 16, 32), torch.randn(512, 32))
        >>> latents.shape, indices.shape
        (torch.Size([2, 16, 32]), torch.Size([2, 16]))
        >>> *_, (counts, sums) = vq_lookup(torch.randn(2, 16, 32), torch.randn(512, 32), statistics=True)
        >>> int(counts.sum()), sums.shape
        (32, torch.Size([512, 32]))
    """
    features, codebook = _checked(features, codebook)
    heads, (codes, width) = codebook.shape[:-2], codebook.shape[-2:]
    rows = features.shape[:-1]
    if metric not in METRICS:
        raise ValueError(f"metric: got {metric!r}, wanted one of {', '.join(map(repr, METRICS))}")
    most = min(MOST, codes)
    if k is not None and (not isinstance(k, numbers.Integral) or not 1 <= k <= most):
        raise ValueError(f"k: got {k!r}, wanted an int from 1 to {most}, or None")
    if k is not None and statistics:
        raise ValueError(f"statistics: got True with k={k}, wanted k=None")
    if all_reduce is not None and not statistics:
        raise ValueError("all_reduce: got a function, wanted None where no statistics are asked for")
    counted = check_row_mask(row_mask, features)
    if counted is not None:
        features = torch.where(counted[..., None], features, 0.0)
    noise: tuple[Any, ...] = (None, None, None)
    if temperature is not None:
        its = positive_temperature(temperature, features.device)
        noise = its, *seed_and_row(seed, row_offset, features.device)
    table = flattened(rows_contiguous(features), *heads, -1, width)
    outputs = _ENTRY(
        Inputs(
            table if heads else table.unsqueeze(0),
            codebook.contiguous().view(*(heads or (1,)), codes, width),
            codes,
            metric,
            1 if k is None else int(k),
            *noise,
        ),
        backend,
    )
    shape = rows if k is None else (*rows, int(k))
    latents = outputs.nearest.view(*shape, width)
    indices, squared_distance = outputs.indices.view(shape), outputs.squared_distance.view(shape)
    if counted is not None:
        here = counted if k is None else counted[..., None]
        latents = torch.where(here[..., None], latents, 0.0)
        indices = torch.where(here, indices, -1)
        squared_distance = torch.where(here, squared_distance, 0.0)
    # What the backward keeps is not handed out; without one, `through` would be zeros.
    if outputs.squared_distance.requires_grad or not plain((features,)):
        through = features - features.detach()
        # The value is the codebook's row to the last bit, which features + (latents - features) would not be.
        latents = latents + (through if k is None else through[..., None, :])
    if not statistics:
        return latents, indices, squared_distance
    found = code_statistics(features.detach(), indices, codes, heads=len(heads) > 0, all_reduce=all_reduce)
    return latents, indices, squared_distance, found


register(vq_lookup, OPERATION)


def _checked(features: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    check_tensor("features", features)
    check_tensor("codebook", codebook)
    came = f"{tuple(features.shape)}, {tuple(codebook.shape)}"
    if codebook.dim() not in (2, 3):
        raise ValueError(f"codebook: got shape {tuple(codebook.shape)}, wanted [K, D] or [H, K, D]")
    if features.dim() < codebook.dim() - 1 or 0 in codebook.shape:
        raise ValueError(f"features, codebook: got shapes {came}, wanted at least one code")
    features, codebook = autocast(features, codebook)
    check_alike("codebook", codebook, "features", features)
    if features.shape[-1] != codebook.shape[-1]:
        raise ValueError(f"codebook: got width {codebook.shape[-1]}, wanted {features.shape[-1]} as features have")
    if codebook.dim() == 3 and features.shape[0] != codebook.shape[0]:
        raise ValueError(f"codebook: got {codebook.shape[0]} heads, wanted {features.shape[0]} as features have")
    return features, codebook


def _forward(backend: Backend, inputs: Inputs) -> Outputs:
    if inputs.temperature is not None:
        positive_there(inputs.temperature)
    outputs = backend.forward(inputs)
    refuse_nan("features", inputs.features, outputs.squared_distance, or_infinite=True)
    return outputs


def _forward_fake(inputs: Inputs, _: str) -> Outputs:
    features = inputs.features
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    heads, rows, width = features.shape
    return Outputs(
        features.new_empty(heads, rows, inputs.k, width),
        features.new_empty(heads, rows, inputs.k, dtype=wide),
        features.new_empty(heads, rows, inputs.k, dtype=torch.int64),
    )


def _backward(backend: Backend, grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    assert grads.squared_distance is not None
    return backend.backward(Grads(grads.squared_distance.contiguous()), kept, needs)


def _backward_fake(kept: Kept) -> tuple[torch.Tensor, ...]:
    heads, _, width = kept.features.shape
    return gradient_like(kept.features), kept.features.new_empty(heads, kept.codes, width)


_ENTRY = Entry(
    "vq_forward",
    OPERATION,
    Inputs,
    Outputs,
    call_of,
    _forward,
    _forward_fake,
    AXES,
    Derivative("vq_backward", Grads, Kept, Needs, _backward, reference.jvp, fake=_backward_fake),
    choice=CODES,
)
