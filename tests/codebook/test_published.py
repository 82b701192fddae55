"""benchmarks/notes/quantizers.md: its functions against the quantizers that they stand for, written from the papers.

Each class makes the tables of every row against every code that the published ones make.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dalle_kernels
from dalle_kernels.noise import GUMBEL_STREAM, gumbel_noise

PAGE = Path(__file__).parents[2] / "benchmarks" / "notes" / "quantizers.md"


def page() -> dict[str, Any]:
    """The page's functions."""
    names = ("binary_entropy", "binary_quantize", "codebook_entropy", "gumbel_projection_lookup", "vq_lookup")
    space: dict[str, Any] = {name: getattr(dalle_kernels, name) for name in names} | {"torch": torch, "F": F}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, space)
    return space


OURS = page()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_hot(indices: Tensor, codes: int) -> Tensor:
    return F.one_hot(indices, codes).double()


def squared_distances(z: Tensor, codes: Tensor) -> Tensor:
    return z.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * z @ codes.T


def entropy_terms(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the rows' entropies, and the entropy of the mean distribution."""
    p, log_p = scores.softmax(-1), scores.log_softmax(-1)
    mean = p.mean(0)
    return -(p * log_p).sum(-1).mean(), -(mean * mean.log()).sum()


def same_results_and_gradients(
    ours: Callable[..., tuple[Any, ...]], theirs: Callable[..., tuple[Any, ...]], leaves: list[Tensor]
) -> None:
    """Every result, and the gradients of a weighted sum of all that have one."""
    leaves = [leaf.requires_grad_() for leaf in leaves]
    runs = []
    for function in (ours, theirs):
        results = list(function(*leaves))
        weighted = [
            (value * draw(*value.shape, seed=place)).sum() for place, value in enumerate(results) if value.requires_grad
        ]
        assert len(weighted) >= 2
        runs.append((results, torch.autograd.grad(sum(weighted), leaves, allow_unused=True)))
    assert len(runs[0][0]) == len(runs[1][0])
    for got, wanted in zip([*runs[0][0], *runs[0][1]], [*runs[1][0], *runs[1][1]], strict=True):
        if wanted is None or got is None:
            assert got is wanted
        else:
            assert got.dtype == wanted.dtype
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


class VQ(nn.Module):
    """van den Oord et al. 2017, equations 1 to 3, with taming-transformers' two places for beta."""

    def forward(self, z: Tensor, codebook: Tensor, beta: float, legacy: bool) -> tuple[Tensor, ...]:
        indices = squared_distances(z, codebook).argmin(1)
        rows = codebook[indices]
        codebook_loss = (rows - z.detach()).square().mean()
        commitment_loss = (rows.detach() - z).square().mean()
        weights = (1.0, beta) if legacy else (beta, 1.0)
        return z + (rows - z).detach(), indices, weights[0] * commitment_loss + weights[1] * codebook_loss


@pytest.mark.parametrize("legacy", [True, False])
def test_vector_quantizer_2(legacy: bool) -> None:
    same_results_and_gradients(
        lambda z, codebook: OURS["vector_quantizer_2"](z, codebook, 0.25, legacy),
        lambda z, codebook: VQ()(z, codebook, 0.25, legacy),
        [draw(45, 6), draw(19, 6, seed=1)],
    )


class EMA(nn.Module):
    """van den Oord et al. 2017, appendix A.1, with Laplace smoothing."""

    def __init__(self, codebook: Tensor, beta: float, decay: float, eps: float) -> None:
        super().__init__()
        self.beta, self.decay, self.eps = beta, decay, eps
        self.codebook, self.embed_avg, self.cluster_size = (
            codebook,
            codebook.clone(),
            torch.zeros(len(codebook)).double(),
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        indices = squared_distances(z, self.codebook).argmin(1)
        table = one_hot(indices, len(self.codebook))
        rows = table @ self.codebook
        loss = self.beta * (rows.detach() - z).square().mean()
        self.cluster_size = self.decay * self.cluster_size + (1 - self.decay) * table.sum(0)
        self.embed_avg = self.decay * self.embed_avg + (1 - self.decay) * table.T @ z.detach()
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) / (total + len(self.codebook) * self.eps) * total
        self.codebook = self.embed_avg / smoothed[:, None]
        return z + (rows - z).detach(), indices, loss


def test_ema_vector_quantizer_over_several_steps() -> None:
    start = draw(19, 6, seed=1)
    theirs = EMA(start.clone(), 0.25, 0.9, 1e-5)
    codebook, embed_avg, cluster_size = start.clone(), start.clone(), torch.zeros(19).double()
    for step in range(20):
        same_results_and_gradients(
            lambda z: OURS["ema_vector_quantizer"](z, codebook, cluster_size, embed_avg, 0.25, 0.9, 1e-5),
            theirs,
            [draw(45, 6, seed=10 + step)],
        )
        torch.testing.assert_close(codebook, theirs.codebook, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(cluster_size, theirs.cluster_size, rtol=1e-9, atol=1e-9)


class GumbelSoftmax(nn.Module):
    """Jang et al. 2017, equations 2 and 3, and Ramesh et al. 2021, section 2.1, on a 1 x 1 convolution's logits."""

    def forward(
        self,
        z: Tensor,
        weight: Tensor,
        bias: Tensor,
        codebook: Tensor,
        tau: float,
        hard: bool,
        kl_weight: float,
        seed: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        picture = z.T[None, :, :, None]  # [1, channels, N, 1]
        logits = F.conv2d(picture, weight, bias)
        rows = logits[0, :, :, 0].T
        noisy = rows + gumbel_noise(torch.tensor(seed), *rows.shape, GUMBEL_STREAM)
        soft = (noisy / tau).softmax(1)
        indices = noisy.argmax(1)
        chosen = one_hot(indices, len(codebook)) - soft.detach() + soft if hard else soft
        q = rows.softmax(1)
        kl = (q * (q * len(codebook)).log()).sum(1).mean()
        return chosen @ codebook, indices, kl_weight * kl


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_quantize(hard: bool) -> None:
    same_results_and_gradients(
        lambda *leaves: OURS["gumbel_quantize"](*leaves, 0.8, hard, 5e-4, 7),
        lambda *leaves: GumbelSoftmax()(*leaves, 0.8, hard, 5e-4, 7),
        [draw(45, 5), draw(19, 5, 1, 1, seed=1), draw(19, seed=2), draw(19, 6, seed=3)],
    )


class OnTheSphere(nn.Module):
    """Yu et al. 2022, section 3.2, and Sun et al. 2024, section 2.1."""

    def forward(self, z: Tensor, codebook: Tensor, beta: float, ratio: float, tau: float) -> tuple[Tensor, ...]:
        z, codes = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
        distances = squared_distances(z, codes)
        indices = distances.argmin(1)
        rows = codes[indices]
        sample, mean = entropy_terms(-distances / tau)
        commitment_loss = (rows.detach() - z).square().mean()
        codebook_loss = (rows - z.detach()).square().mean()
        return z + (rows - z).detach(), indices, codebook_loss, beta * commitment_loss, ratio * (sample - mean)


@pytest.mark.parametrize("tau", [0.01, 0.5])
def test_llamagen(tau: float) -> None:
    same_results_and_gradients(
        lambda z, codebook: OURS["llamagen"](z, codebook, 0.25, 0.1, tau),
        lambda z, codebook: OnTheSphere()(z, codebook, 0.25, 0.1, tau),
        [draw(45, 4), draw(19, 4, seed=1)],
    )


class LookupFree(nn.Module):
    """Yu et al. 2024, equations 3 to 5, over the codes one by one."""

    def forward(self, z: Tensor, tau: float, gamma: float) -> tuple[Tensor, ...]:
        bits = z.shape[1]
        codes = torch.tensor([[1.0 if k >> (bits - 1 - i) & 1 else -1.0 for i in range(bits)] for k in range(2**bits)])
        codes = codes.double()
        distances = squared_distances(z, codes)
        indices = distances.argmin(1)
        sample, mean = entropy_terms(-distances / tau)
        commitment_loss = (z - codes[indices]).square().mean()
        return z + (codes[indices] - z).detach(), indices, sample - gamma * mean, commitment_loss


@pytest.mark.parametrize("tau", [0.25, 1.0])
def test_lookup_free(tau: float) -> None:
    def ours(z: Tensor) -> tuple[Tensor, ...]:
        latents, indices, (high, low), entropies, commitment_loss = OURS["lookup_free"](z, tau, 1.5, 4)
        assert torch.equal(high * 16 + low, indices)
        assert int(high.max()) < 2**3
        return latents, indices, entropies, commitment_loss

    same_results_and_gradients(ours, lambda z: LookupFree()(z, tau, 1.5), [draw(45, 7)])


class IndexBackpropagation(nn.Module):
    """Shi et al. 2024, section 3.2: the one-hot choice with softmax's gradient, times the codebook."""

    def forward(self, z: Tensor, codebook: Tensor, beta: float, tau: float) -> tuple[Tensor, ...]:
        logits = z @ codebook.T
        soft = logits.softmax(1)
        indices = logits.argmax(1)
        hard = one_hot(indices, len(codebook))
        latents = (hard + (soft - soft.detach())) @ codebook
        rows = hard @ codebook
        losses = (latents - z).square().mean() + (rows.detach() - z).square().mean()
        losses = losses + beta * (rows - z.detach()).square().mean()
        sample, mean = entropy_terms(logits / tau)
        return latents, indices, losses, sample - mean


@pytest.mark.parametrize("tau", [0.01, 1.0])
def test_index_backpropagation(tau: float) -> None:
    same_results_and_gradients(
        lambda z, codebook: OURS["index_backpropagation"](z, codebook, 0.25, tau),
        lambda z, codebook: IndexBackpropagation()(z, codebook, 0.25, tau),
        [draw(45, 6) / 2, draw(19, 6, seed=1) / 2],
    )


def test_every_function_of_the_page_is_tested() -> None:
    functions = set(re.findall(r"^def (\w+)", PAGE.read_text(), re.MULTILINE))
    assert functions == set(re.findall(r'OURS\["(\w+)"\]', Path(__file__).read_text()))
