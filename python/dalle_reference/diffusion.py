"""Gaussian diffusion: noise added by a cosine schedule, and taken away again step by step.

    x(t) = signal(t) x + noise(t) e,    signal(t)^2 + noise(t)^2 = 1,    t from 0 (x itself) to 1 (nothing but noise e)

A model is given x(t) and t and predicts x. To draw, one begins with noise and goes from 1 to 0 in even steps: what is
predicted at one says how x is distributed at the next, a little cleaner (Ho et al. 2020, equation 7).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_OFFSET = 0.008
"""s of Nichol and Dhariwal 2021, equation 17: the first steps do not add too little."""


def amounts(t: Tensor) -> tuple[Tensor, Tensor]:
    """How much of x and how much noise there is in x(t): the square root of Nichol and Dhariwal 2021, equation 17."""
    start = math.cos(_OFFSET / (1.0 + _OFFSET) * math.pi / 2)
    signal = (torch.cos((t + _OFFSET) / (1.0 + _OFFSET) * (math.pi / 2)) / start).clamp(0.0, 1.0)
    return signal, (1.0 - signal.square()).sqrt()


def add_noise(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x(t) of x and noise [B, ...], at t [B]."""
    signal, amount = (part.reshape(-1, *[1] * (x.dim() - 1)) for part in amounts(t))
    return signal * x + amount * noise


def sample(
    predict: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], *, steps: int, seed: int, device: torch.device
) -> Tensor:
    """Draws x of `shape` [B, ...].

    Args:
        predict: (x(t) [B, ...], t [B]) -> x.
        steps: from noise to x.
        seed: of all noise; drawn on the CPU, so that every device draws the same.

    Example:
        >>> sample(lambda x, t: torch.ones_like(x), (2, 3), steps=4, seed=0, device=torch.device("cpu")).tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=chance).to(device)
    times = torch.linspace(1.0, 0.0, steps + 1, device=device)
    signals, noises = amounts(times)
    for now in range(steps - 1):
        predicted = predict(x, times[now].expand(shape[0]))
        kept = signals[now] / signals[now + 1]
        share = (noises[now + 1] / noises[now]).square()
        mean = kept * share * x + signals[now + 1] * (1.0 - kept.square() * share) * predicted
        spread = noises[now + 1] * (1.0 - kept.square() * share).clamp(min=0.0).sqrt()
        x = mean + spread * torch.randn(shape, generator=chance).to(device)
    return predict(x, times[steps - 1].expand(shape[0]))


def time_features(t: Tensor, width: int) -> Tensor:
    """t [B] in 0..1 as sines and cosines of `width` / 2 wavelengths each: [B, width] (Vaswani et al. 2017)."""
    rates = torch.logspace(0.0, 3.0, width // 2, device=t.device)
    angles = t[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
