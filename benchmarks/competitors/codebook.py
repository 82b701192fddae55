"""What else computes the codebook lookups and the logit-Laplace likelihood."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.competitors.adapter import Lookup, Made


def gumbel_competitors() -> list[Lookup]:
    """Functions (logits [N, K], codebook, temperature, hard, noise [N, K] or None) -> latents, indices, kl.

    With None they draw the noise themselves, as torch.nn.functional.gumbel_softmax does; the tests and the check before
    the timing hand them ours.
    """
    return [
        Lookup("eager", lambda: Made(_gumbel)),
        Lookup("compiled", lambda: Made(torch.compile(_gumbel, dynamic=False))),
        Lookup("compiled, uniform noise", lambda: Made(torch.compile(_gumbel_uniform, dynamic=False))),
    ]


def _gumbel(
    logits: Tensor, codebook: Tensor, temperature: float, hard: bool, noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    if noise is None:
        noise = -torch.empty_like(logits).exponential_().log()
    return _mixed(logits, codebook, temperature, hard, noise)


def _gumbel_uniform(
    logits: Tensor, codebook: Tensor, temperature: float, hard: bool, noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with noise that a compiler can fuse: exponential_ is a call of its own, rand is not."""
    if noise is None:
        noise = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-9, 1 - 6e-8)))
    return _mixed(logits, codebook, temperature, hard, noise)


def _mixed(
    logits: Tensor, codebook: Tensor, temperature: float, hard: bool, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    y = ((logits + noise) / temperature).softmax(-1)
    indices = y.argmax(-1)
    if hard:
        y = torch.zeros_like(y).scatter_(-1, indices[:, None], 1.0) - y.detach() + y
    log_p = logits.float().log_softmax(-1)
    kl = (log_p.exp() * (log_p + torch.log(torch.tensor(float(logits.shape[-1]))))).sum(-1)
    return y @ codebook, indices, kl


def vq_competitors() -> list[Lookup]:
    """Functions (features [N, D], codebook [K, D]) -> latents, indices, squared distance."""
    return [
        Lookup("eager, expanded squares", lambda: Made(_vq)),
        Lookup("compiled, expanded squares", lambda: Made(torch.compile(_vq, dynamic=False))),
        Lookup("eager, cdist", lambda: Made(_vq_cdist)),
    ]


def _vq(features: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        indices = (codebook.square().sum(-1) - 2 * features @ codebook.mT).argmin(-1)
    return _straight_through(features, codebook, indices)


def _vq_cdist(features: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if features.dtype != torch.float32:
        features, codebook = features.float(), codebook.float()
    with torch.no_grad():
        indices = torch.cdist(features, codebook).argmin(-1)
    return _straight_through(features, codebook, indices)


def vq_best_competitors() -> list[Lookup]:
    """Functions (features [N, D], codebook [K, D], k, temperature or None, noise [N, K] or None) -> indices [N, k].

    With a temperature and no noise they draw it themselves.
    """
    return [
        Lookup("eager", lambda: Made(_vq_best)),
        Lookup("compiled", lambda: Made(torch.compile(_vq_best, dynamic=False))),
    ]


def _vq_best(
    features: Tensor, codebook: Tensor, k: int, temperature: float | None, noise: Tensor | None = None
) -> Tensor:
    scores = (2 * features @ codebook.mT - codebook.square().sum(-1)).float()
    if temperature is not None:
        if noise is None:
            noise = -torch.empty_like(scores).exponential_().log()
        scores = scores + temperature * noise
    return scores.argmax(-1, keepdim=True) if k == 1 else scores.topk(k).indices


def _straight_through(features: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    nearest = F.embedding(indices, codebook)
    squared_distance = (features - nearest).float().square().sum(-1)
    return features + (nearest - features).detach(), indices, squared_distance


def laplace_competitors() -> list[Lookup]:
    """Functions (pixels, mu, log_b) -> the logit-Laplace negative log-likelihood."""
    return [
        Lookup("eager", lambda: Made(_laplace)),
        Lookup("compiled", lambda: Made(torch.compile(_laplace, dynamic=False))),
    ]


def _laplace(pixels: Tensor, mu: Tensor, log_b: Tensor) -> Tensor:
    logit = torch.logit(pixels)
    return torch.log(2 * pixels * (1 - pixels)) + log_b + (logit - mu).abs() * torch.exp(-log_b)
