"""The door to the codebook's second level: from features straight to latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from dalle_kernels.backends.choice import Operation, register
from dalle_kernels.backends.contract import Call
from dalle_kernels.backends.library import Derivative, Entry
from dalle_kernels.backends.sharding import Merge, flattened
from dalle_kernels.checks import (
    autocast,
    check_alike,
    check_tensor,
    positive_temperature,
    positive_there,
    rows_contiguous,
    seed_and_row,
)
from dalle_kernels.codebook.checks import contiguous, gradient_like, refuse_nan
from dalle_kernels.codebook.gumbel.merge import may_merge, merged
from dalle_kernels.codebook.gumbel.op import fake_outputs
from dalle_kernels.codebook.projection import reference
from dalle_kernels.codebook.projection.contract import (
    AXES,
    CODES,
    Backend,
    Grads,
    Inputs,
    Kept,
    Needs,
    Outputs,
    call_of,
    keeps_mixture,
)

if TYPE_CHECKING:
    from dalle_kernels.codebook.projection import cpu, triton

    _BACKENDS: tuple[Backend, ...] = (cpu, triton, reference)


def _describe(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: torch.Tensor,
    *_: Any,
    **__: Any,
) -> Call:
    check_tensor("features", features)
    check_tensor("codebook", codebook, rank=2)
    return Call(features.device, autocast(features)[0].dtype, codebook.shape[-1])


OPERATION: Operation[Backend] = Operation(
    "gumbel_projection_lookup",
    {
        "triton": "dalle_kernels.codebook.projection.triton",
        "cpu": "dalle_kernels.codebook.projection.cpu",
        "reference": "dalle_kernels.codebook.projection.reference",
    },
    _describe,
)


@overload
def gumbel_projection_lookup(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: torch.Tensor,
    temperature: float | torch.Tensor,
    hard: bool = False,
    noise: bool = True,
    seed: int | torch.Tensor | None = None,
    backend: str = "auto",
    *,
    row_offset: int | torch.Tensor = 0,
    distribution: Literal[False] = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


@overload
def gumbel_projection_lookup(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: torch.Tensor,
    temperature: float | torch.Tensor,
    hard: bool = False,
    noise: bool = True,
    seed: int | torch.Tensor | None = None,
    backend: str = "auto",
    *,
    row_offset: int | torch.Tensor = 0,
    distribution: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]: ...


def gumbel_projection_lookup(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: torch.Tensor,
    temperature: float | torch.Tensor,
    hard: bool = False,
    noise: bool = True,
    seed: int | torch.Tensor | None = None,
    backend: str = "auto",
    *,
    row_offset: int | torch.Tensor = 0,
    distribution: bool = False,
) -> tuple[torch.Tensor, ...]:
    """`gumbel_lookup(features @ weight.T + bias, codebook, ...)` without storing the logits.

    The last 1 x 1 convolution of a dVAE's encoder and the lookup in one: the logits, N x K, are made a tile at a time
    and made again in the backward pass. They stay in float32 between the two, where the two calls would round them to
    the dtype of `features`. Differentiable with respect to `features`, `weight`, `bias` and `codebook`.

    With the codebook as weight too, `hard=True` and `noise=False`, it is index backpropagation (IBQ): all codes scored
    by their product with the features, the best one straight-through. `kl` and `distribution` then hold its two
    entropies.

    Sources: as for `gumbel_lookup`; Ramesh et al. 2021, appendix A.1 for the encoder's last layer; Shi et al. 2024 for
    IBQ.

    Args:
        features: [..., C], float16, bfloat16, float32 or float64.
        weight: [K, C], bias: [K] or None, codebook: [K, D]; dtype and device of `features` (under autocast all are
            cast).
        temperature, hard, noise, seed, row_offset: as for `gumbel_lookup`; the same seed draws the same noise.
        backend: "auto", "reference", "cpu" or "triton"; see `explain`.
        distribution: whether to return it.

    Returns:
        latents: [..., D] in the dtype of `features`.
        indices: int64 [...], argmax(logits + g).
        kl: float32 [...] (float64 for float64 features), log K - entropy of softmax(logits), in nats.
        distribution: float32 [K] (float64 for float64 features), the mean over all rows of softmax(logits), which the
            temperature does not change; differentiable. Only where it was asked for.

    Raises:
        TypeError, ValueError: for wrong shapes, dtypes, devices, a temperature that is not above 0, or, on the CPU, NaN
            among the features.

    Example:
        >>> features, weight, codebook = torch.randn(2, 16, 24), torch.randn(512, 24), torch.randn(512, 32)
        >>> latents, indices, kl = gumbel_projection_lookup(features, weight, None, codebook, temperature=0.9)
        >>> latents.shape, indices.shape, kl.shape
        (torch.Size([2, 16, 32]), torch.Size([2, 16]), torch.Size([2, 16]))
    """
    check_tensor("features", features)
    check_tensor("weight", weight, rank=2)
    check_tensor("codebook", codebook, rank=2)
    if bias is not None:
        check_tensor("bias", bias, rank=1)
    if features.dim() < 1 or 0 in weight.shape or 0 in codebook.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (features, weight, codebook))
        raise ValueError(f"features, weight, codebook: got shapes {shapes}, wanted at least one channel and one code")
    if weight.shape[1] != features.shape[-1]:
        raise ValueError(f"weight: got {weight.shape[1]} channels, wanted {features.shape[-1]} as features have")
    codes = weight.shape[0]
    if codebook.shape[0] != codes:
        raise ValueError(f"codebook: got {codebook.shape[0]} rows, wanted {codes}, one for each row of weight")
    if bias is not None and bias.shape[0] != codes:
        raise ValueError(f"bias: got {bias.shape[0]} numbers, wanted {codes}, one for each row of weight")
    tied = codebook is weight
    features, weight, codebook = autocast(features, weight, codebook)
    check_alike("weight", weight, "features", features)
    check_alike("codebook", codebook, "features", features)
    if bias is not None:
        (bias,) = autocast(bias)
        check_alike("bias", bias, "features", features)
    rows, weight = features.shape[:-1], weight.contiguous()
    latents, indices, kl, *_, mean = _ENTRY(
        Inputs(
            flattened(rows_contiguous(features), -1, features.shape[-1]),
            weight,
            None if bias is None else bias.contiguous(),
            weight.detach() if tied else codebook.contiguous(),
            positive_temperature(temperature, features.device),
            hard or not noise,
            noise,
            *seed_and_row(seed, row_offset, features.device),
            distribution,
            tied,
        ),
        backend,
    )
    results = latents.reshape(*rows, codebook.shape[1]), indices.reshape(rows), kl.reshape(rows)
    return (*results, mean) if distribution else results


register(gumbel_projection_lookup, OPERATION)


def _forward(backend: Backend, inputs: Inputs) -> Outputs:
    positive_there(inputs.temperature)
    outputs = backend.forward(inputs)
    refuse_nan("features", inputs.features, outputs.kl)
    return outputs


def _forward_fake(inputs: Inputs, backend: str) -> Outputs:
    kept = keeps_mixture(inputs.hard, backend, inputs.features.device)
    made = fake_outputs(inputs.features, inputs.codebook, kept)
    return Outputs(*made, made.kl.new_empty(inputs.codebook.shape[0] if inputs.with_distribution else 0))


def _backward(backend: Backend, grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    return backend.backward(Grads(*contiguous(grads)), kept, needs)


def _may_merge(inputs: Inputs, backend: str, codes: int, count: int) -> bool:
    """The mean distribution wants each row's sum over all codes before any of its shares."""
    return not inputs.with_distribution and may_merge(OPERATION, call_of, inputs, backend, codes, count)


_ENTRY = Entry(
    "gumbel_projection_forward",
    OPERATION,
    Inputs,
    Outputs,
    call_of,
    _forward,
    _forward_fake,
    AXES,
    Derivative("gumbel_projection_backward", Grads, Kept, Needs, _backward, reference.jvp, gradient_like),
    choice=Merge(CODES, _may_merge, merged),
)
