"""gumbel_projection_lookup, defined: the projection, then the lookup of `gumbel/reference.py`."""

from __future__ import annotations

import torch

from dalle_kernels.codebook.gumbel import contract as gumbel
from dalle_kernels.codebook.gumbel import reference
from dalle_kernels.codebook.gumbel.reference import refuse
from dalle_kernels.codebook.projection.contract import Grads, Inputs, Kept, Needs, Outputs
from dalle_kernels.precision import widen

__all__ = ["backward", "forward", "jvp", "refuse"]


def _logits(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(widen(features), widen(weight), None if bias is None else widen(bias))


def forward(inputs: Inputs) -> Outputs:
    features, weight, bias = inputs[:3]
    outputs = reference.forward(gumbel.Inputs(_logits(features, weight, bias), *inputs[3:]))
    return outputs._replace(latents=outputs.latents.to(features.dtype))


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    features, weight, bias = kept[:3]
    through_logits = needs.features or needs.weight or needs.bias
    dlogits, dcodebook = reference.backward(
        grads, gumbel.Kept(_logits(features, weight, bias), *kept[3:]), gumbel.Needs(through_logits, needs.codebook)
    )
    assert dlogits is not None
    return (
        (dlogits @ widen(weight)).to(features.dtype) if needs.features else None,
        (dlogits.T @ widen(features)).to(weight.dtype) if needs.weight else None,
        dlogits.sum(0).to(bias.dtype) if needs.bias and bias is not None else None,
        dcodebook,
    )


def jvp(tangents: tuple[torch.Tensor | None, ...], kept: Kept) -> tuple[torch.Tensor, torch.Tensor]:
    features, weight, bias = kept[:3]
    dfeatures, dweight, dbias, dcodebook = (None if tangent is None else widen(tangent) for tangent in tangents)
    dlogits = None
    if dfeatures is not None:
        dlogits = dfeatures @ widen(weight).T
    if dweight is not None:
        from_weight = widen(features) @ dweight.T
        dlogits = from_weight if dlogits is None else dlogits + from_weight
    if dbias is not None:
        shared = dbias.expand(features.shape[0], -1)
        dlogits = shared if dlogits is None else dlogits + shared
    return reference.jvp((dlogits, dcodebook), gumbel.Kept(_logits(features, weight, bias), *kept[3:]))
