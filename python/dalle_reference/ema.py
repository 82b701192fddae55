"""A running mean of the weights, which samples better than the weights themselves."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch

from dalle_reference.parallel import local

M = TypeVar("M", bound=torch.nn.Module)


class MovingAverage(Generic[M]):
    """mean <- decay * mean + (1 - decay) * weight, after every step.

    Early on the decay is smaller, (1 + step) / (10 + step), so that the first weights are soon forgotten.

    Args:
        module: whose parameters are averaged; its buffers are taken as they are.
        decay: the share of the mean that a step keeps.

    Attributes:
        module: a copy of the module, in evaluation mode, whose weights are the mean.
    """

    def __init__(self, module: M, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: M, step: int) -> None:
        share = 1.0 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([*map(local, self.module.parameters())], [*map(local, module.parameters())], share)
        for mine, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs)
