"""The loss over a vocabulary, of which a whole model may make more than of its attention."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.competitors.adapter import Lookup, Made, imported, needs_gpu


def linear_cross_entropies() -> list[Lookup]:
    """Functions (hidden [N, E], weight [V, E], bias [V], targets [N]) -> mean cross-entropy.

    No operation of ours competes with them: they are what the loss of a model can be computed with around ours.
    """
    return [
        Lookup("cut-cross-entropy", _cut_cross_entropy),
        Lookup("Liger fused linear cross-entropy", _liger),
    ]


def _cut_cross_entropy() -> Made:
    """GPU: Apple's kernel; it takes no bias, which rides along as one more feature."""
    needs_gpu(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    loss = imported("cut_cross_entropy").linear_cross_entropy

    def function(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        ones = hidden.new_ones(hidden.shape[0], 1)
        return loss(torch.cat([hidden, ones], 1), torch.cat([weight, bias[:, None]], 1), targets)

    return Made(function)


def _liger() -> Made:
    """GPU: Liger's loss module, called (weight, input, targets, bias)."""
    needs_gpu(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    loss = imported("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()

    def function(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        return loss(weight, hidden, targets, bias)

    return Made(function)
