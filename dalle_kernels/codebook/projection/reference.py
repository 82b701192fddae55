"""gumbel_projection_lookup, defined: the projection, then the lookup of `gumbel/reference.py`."""

from __future__ import annotations

import torch

from dalle_kernels.codebook.gumbel import contract as gumbel
from dalle_kernels.codebook.gumbel import reference
from dalle_kernels.codebook.gumbel.reference import refuse
from dalle_kernels.codebook.projection.contract import Grads, Inputs, Kept, Needs, Outputs, keeps_mixture
from dalle_kernels.precision import widen

__all__ = ["backward", "forward", "jvp", "refuse"]


def _logits(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(widen(features), widen(weight), None if bias is None else widen(bias))


def _gumbel_kept(kept: Kept) -> gumbel.Kept:
    """What the lookup of the logits would have kept."""
    shared = kept._asdict()
    return gumbel.Kept(
        logits=_logits(kept.features, kept.weight, kept.bias),
        **{name: shared[name] for name in gumbel.Kept._fields if name != "logits"},
    )


def forward(inputs: Inputs) -> Outputs:
    features, weight, bias, codebook, temperature, hard, noise, seed, row_offset, with_distribution, _, first = inputs
    logits = _logits(features, weight, bias)
    made = reference.forward(gumbel.Inputs(logits, codebook, temperature, hard, noise, seed, row_offset, first))
    mixture = made.mixture if keeps_mixture(hard, "reference", features.device) else made.mixture.new_empty(0)
    distribution = logits.softmax(-1).mean(0) if with_distribution else logits.new_empty(0)
    made = made._replace(latents=made.latents.to(features.dtype), mixture=mixture)
    return Outputs(*made, distribution)


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    """With p = softmax(logits) and G the derivative by the mean distribution, the lookup's dlogits receive
    p (G - p . G) / N besides.
    """
    features, weight, bias = kept[:3]
    through_logits = needs.features or needs.weight or needs.bias
    lookup = _gumbel_kept(kept)
    dlogits, dcodebook = reference.backward(
        gumbel.Grads(grads.latents, grads.kl),
        lookup,
        gumbel.Needs(through_logits, needs.weight if kept.tied else needs.codebook),
    )
    assert dlogits is not None
    assert dcodebook is not None
    if through_logits and grads.distribution is not None and grads.distribution.numel():
        p = lookup.logits.softmax(-1)
        pulled = p * grads.distribution
        dlogits = dlogits + (pulled - p * pulled.sum(-1, keepdim=True)) / max(len(p), 1)
    dweight = dlogits.T @ widen(features)
    if kept.tied:
        dweight = dweight + widen(dcodebook)
    return (
        (dlogits @ widen(weight)).to(features.dtype) if needs.features else None,
        dweight.to(weight.dtype) if needs.weight else None,
        dlogits.sum(0).to(bias.dtype) if needs.bias and bias is not None else None,
        dcodebook if needs.codebook else None,
    )


def jvp(tangents: tuple[torch.Tensor | None, ...], kept: Kept) -> tuple[torch.Tensor, ...]:
    features, weight = kept[:2]
    dfeatures, dweight, dbias, dcodebook = (None if tangent is None else widen(tangent) for tangent in tangents)
    if kept.tied:
        dcodebook = dweight
    dlogits = None
    if dfeatures is not None:
        dlogits = dfeatures @ widen(weight).T
    if dweight is not None:
        from_weight = widen(features) @ dweight.T
        dlogits = from_weight if dlogits is None else dlogits + from_weight
    if dbias is not None:
        shared = dbias.expand(features.shape[0], -1)
        dlogits = shared if dlogits is None else dlogits + shared
    lookup = _gumbel_kept(kept)
    ddistribution = torch.zeros_like(kept.distribution)
    if kept.with_distribution and dlogits is not None:
        p = lookup.logits.softmax(-1)
        ddistribution = (p * (dlogits - (p * dlogits).sum(-1, keepdim=True))).mean(0)
    return *reference.jvp((dlogits, dcodebook), lookup), ddistribution
