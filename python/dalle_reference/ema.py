"""A running mean of the weights, which samples better than the weights themselves."""

from __future__ import annotations

import torch


class MovingAverage:
    """shadow <- decay * shadow + (1 - decay) * weight, after every step.

    Early on the decay is smaller, (1 + step) / (10 + step), so that the first weights are soon forgotten.

    Args:
        module: whose parameters are averaged.
        decay: the share of the mean that a step keeps.
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: value.detach().clone() for name, value in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module, step: int) -> None:
        weights = dict(module.named_parameters())
        share = 1.0 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.shadow.values()), [weights[name] for name in self.shadow], share)

    @torch.no_grad()
    def copy_to(self, module: torch.nn.Module) -> None:
        """Gives `module` the mean as its weights."""
        for name, value in module.named_parameters():
            value.copy_(self.shadow[name])
