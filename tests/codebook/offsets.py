"""Gumbel lookups of rows far from 0, put to every backend alike.

Masks write -1e9 or a dtype's lowest number over rows, and a softmax does not see a common offset; what is kept for the
backward pass must not either.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# (logits, codebook, hard, noise) -> latents, indices, kl; differentiable
Lookup = Callable[[torch.Tensor, torch.Tensor, bool, bool], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

CODES, WIDTH, TAU = 264, 32, 0.7
MASKS = ("-1e9", "lowest", "lowest but for one of -inf", "1e6 away")


def _rows(mask: str, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    lowest = torch.finfo(dtype).min
    rows = torch.full((6, CODES), lowest if mask.startswith("lowest") else max(-1e9, lowest), dtype=dtype)
    if mask.endswith("-inf"):
        rows[:, 0] = -torch.inf
    if mask == "1e6 away":  # multiples of what float32 resolves there
        steps = torch.randint(-40, 40, rows.shape, generator=generator) / 16
        rows = (steps + min(1e6, -lowest / 2) * torch.tensor([1.0, -1.0] * 3)[:, None]).to(dtype)
    return rows


def check(lookup: Lookup, dtype: torch.dtype, mask: str, hard: bool, noise: bool) -> None:
    """Weights add up to 1, gradients to 0, rows of equal logits are uniform; by float64 where no noise is rounded."""
    generator = torch.Generator().manual_seed(4)
    logits = _rows(mask, dtype).requires_grad_()
    codebook = torch.randn(CODES, WIDTH, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(6, WIDTH, generator=generator).to(dtype)
    latents, indices, kl = lookup(logits, codebook, hard, noise)
    dlogits, dcodebook = torch.autograd.grad((latents * grad).sum(), (logits, codebook), retain_graph=True)
    (dkl,) = torch.autograd.grad(kl.sum(), logits)
    unit = 4 * torch.finfo(dtype).eps
    assert latents.isfinite().all()
    # y^T dL, of rows of y whose sum is 1.
    share = dcodebook.double().sum(0) - grad.double().sum(0)
    assert share.abs().max() <= 1e-4 + unit * dcodebook.double().abs().sum(0).max()
    for gradient in (dlogits, dkl):
        assert gradient.double().sum(-1).abs().max() <= 1e-4 + unit * gradient.double().abs().sum(-1).max()
    if mask != "1e6 away":
        seen = logits.isfinite().detach()
        uniform = seen / seen.sum(-1, keepdim=True)
        torch.testing.assert_close(kl, (CODES / seen.sum(-1)).log(), atol=1e-5, rtol=0)
        torch.testing.assert_close(dkl, torch.zeros_like(dkl), atol=1e-6, rtol=0)
        want = (uniform.double() @ codebook.double()).detach()
        rounded = not noise or dtype != torch.float16  # noise is lost beside -1e9, not beside -65504
        if rounded:
            assert (indices == seen.int().argmax(-1)).all()  # of equal ones the first
        if rounded and not hard:
            torch.testing.assert_close(latents.double(), want, atol=1e-5 + unit, rtol=unit)
            torch.testing.assert_close(
                dcodebook.double(), uniform.double().T @ grad.double(), atol=1e-6 + unit / CODES, rtol=unit
            )
    elif not noise:
        wide, table = logits.detach().double().requires_grad_(), codebook.detach().double()
        mixture, log_p = (wide / TAU).softmax(-1) @ table, wide.log_softmax(-1)
        exact = [torch.autograd.grad(value.sum(), wide)[0] for value in (mixture * grad.double(), log_p.exp() * log_p)]
        for ours, theirs in zip((dlogits, dkl), exact, strict=True):
            torch.testing.assert_close(ours.double(), theirs, atol=2e-5 + unit, rtol=unit)


def projected(lookup: Callable[..., tuple[torch.Tensor, ...]]) -> Lookup:
    """A lookup by features whose logits are exact: each row's own feature, which is 1, times a row of weights."""

    def of(
        logits: torch.Tensor, codebook: torch.Tensor, hard: bool, noise: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = logits.shape[0]
        features = torch.zeros(rows, 16, dtype=logits.dtype)
        features[:, :rows] = torch.eye(rows)
        weight = torch.nn.functional.pad(logits.T, (0, 16 - rows))
        latents, indices, kl = lookup(features, weight, None, codebook, hard, noise)
        return latents, indices, kl

    return of
