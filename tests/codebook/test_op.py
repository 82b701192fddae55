"""The doors to the codebook: the reference against autograd on plain formulas, compilation, bad input."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from dalle_kernels import gumbel_lookup, vq_lookup
from dalle_kernels.noise import GUMBEL_STREAM, gumbel_noise


def table(rows: int = 7, codes: int = 10, width: int = 4, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[no-untyped-def]
    torch.manual_seed(3)
    logits = (2 * torch.randn(rows, codes, dtype=dtype)).requires_grad_()
    return logits, torch.randn(codes, width, dtype=dtype, requires_grad=True)


def plain(logits, codebook, tau, hard, noise, seed):  # type: ignore[no-untyped-def]
    """gumbel_lookup as one would write it with autograd."""
    noisy = logits
    if noise:
        noisy = logits + gumbel_noise(torch.tensor(seed), *logits.shape, GUMBEL_STREAM)
    y, indices = (noisy / tau).softmax(-1), noisy.argmax(-1)
    if hard or not noise:
        y = F.one_hot(indices, y.shape[-1]).to(y.dtype) - y.detach() + y
    log_p = logits.log_softmax(-1)
    return y @ codebook, indices, (log_p.exp() * log_p).sum(-1) + math.log(logits.shape[-1])


@pytest.mark.parametrize(("hard", "noise"), [(False, True), (True, True), (False, False)])
def test_gumbel_forward_and_gradients(hard: bool, noise: bool) -> None:
    logits, codebook = table()
    got = gumbel_lookup(logits, codebook, 0.7, hard, noise, seed=11, backend="reference")
    want = plain(logits, codebook, 0.7, hard, noise, 11)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
    weights = torch.randn_like(got[0]), torch.randn_like(got[2])
    for outputs, cotangents in (((0, 2), weights), ((0,), weights[:1]), ((2,), weights[1:])):
        grads = [
            torch.autograd.grad(
                [result[i] for i in outputs], [logits, codebook], cotangents, retain_graph=True, allow_unused=True
            )
            for result in (got, want)
        ]
        torch.testing.assert_close(grads[0][0], grads[1][0])
        torch.testing.assert_close(grads[0][1], torch.zeros_like(codebook) if grads[1][1] is None else grads[1][1])


def test_gradcheck() -> None:
    logits, codebook = table(rows=3)

    def soft(logits: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents, _, kl = gumbel_lookup(logits, codebook, 0.9, seed=5)
        return latents, kl

    assert torch.autograd.gradcheck(soft, (logits, codebook))
    features = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f, c: vq_lookup(f, c)[2], (features, codebook))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hard", [False, True])
def test_opcheck(hard: bool, dtype: torch.dtype) -> None:
    logits, codebook = table(dtype=dtype)
    tau, seed = torch.tensor(0.8), (torch.tensor(5), torch.tensor(0))
    opcheck(torch.ops.dalle_kernels.gumbel_forward.default, (logits, codebook, tau, hard, True, *seed, 0, "auto"))
    rows = codebook[None, :5].detach().requires_grad_()
    arguments = rows, codebook[None], codebook.shape[0], "euclidean", 1, None, None, None, "auto"
    opcheck(torch.ops.dalle_kernels.vq_forward.default, arguments)


def test_torch_compile_makes_one_graph() -> None:
    logits, codebook = table(dtype=torch.float32)

    def loss(logits: torch.Tensor, codebook: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        latents, _, kl = gumbel_lookup(logits, codebook, tau, seed=4)
        nearest, _, distance = vq_lookup(latents, codebook)
        return latents.square().sum() + kl.sum() + nearest.sum() + distance.sum()

    compiled = torch.compile(loss, fullgraph=True)
    for tau in (0.9, 0.5):
        arguments = (logits, codebook, torch.tensor(tau))
        got = torch.autograd.grad(compiled(*arguments), arguments[:2])
        for one, other in zip(got, torch.autograd.grad(loss(*arguments), arguments[:2]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_seeds_and_leading_dimensions() -> None:
    logits, codebook = table(rows=12, dtype=torch.float32)
    torch.manual_seed(0)
    first = gumbel_lookup(logits, codebook, 1.0)
    second = gumbel_lookup(logits, codebook, 1.0)
    torch.manual_seed(0)
    again = gumbel_lookup(logits, codebook, 1.0)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], second[0])
    shaped = gumbel_lookup(logits.view(3, 2, 2, 10), codebook, 1.0, seed=9)
    flat = gumbel_lookup(logits, codebook, 1.0, seed=torch.tensor([9]))
    assert [tuple(t.shape) for t in shaped] == [(3, 2, 2, 4), (3, 2, 2), (3, 2, 2)]
    assert all(torch.equal(one.reshape(other.shape), other) for one, other in zip(shaped, flat, strict=True))


def test_a_code_ruled_out_by_minus_infinity() -> None:
    logits, codebook = table(dtype=torch.float32)
    masked = logits.detach().clone()
    masked[:, 4] = -torch.inf
    masked.requires_grad_()
    latents, indices, kl = gumbel_lookup(masked, codebook, 0.5, seed=2)
    assert (indices != 4).all()
    assert latents.isfinite().all()
    assert kl.isfinite().all()
    (grad,) = torch.autograd.grad(latents.sum() + kl.sum(), masked)
    assert not grad[:, 4].any()
    assert grad.isfinite().all()


def test_autocast_casts_both_sides() -> None:
    logits, codebook = table(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        latents, _, kl = gumbel_lookup(logits.to(torch.bfloat16), codebook, 0.5)
    assert latents.dtype == torch.bfloat16
    assert kl.dtype == torch.float32


def test_vq_is_the_nearest_row_straight_through() -> None:
    torch.manual_seed(4)
    features = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(13, 5, dtype=torch.float64, requires_grad=True)
    latents, indices, distance = vq_lookup(features, codebook)
    wanted = torch.cdist(features.reshape(-1, 5), codebook).min(-1)
    assert torch.equal(indices.flatten(), wanted.indices)
    assert torch.equal(latents, codebook[indices])
    torch.testing.assert_close(distance.flatten(), wanted.values.square())
    weight = torch.randn_like(latents)
    through = torch.autograd.grad(latents, [features, codebook], weight, retain_graph=True, allow_unused=True)
    assert torch.equal(through[0], weight)
    assert through[1] is None
    want = (features - codebook[indices]).square().sum(-1)
    for one, other in zip(
        torch.autograd.grad(distance.sum(), [features, codebook]),
        torch.autograd.grad(want.sum(), [features, codebook]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_temperatures_of_any_type(backend: str) -> None:
    torch.manual_seed(4)
    logits, codebook = torch.randn(3, 8), torch.randn(8, 4)
    want = gumbel_lookup(logits, codebook, 0.5, seed=1, backend=backend)[0]
    for real in (np.float16, np.float32, np.float64, Fraction, torch.tensor):
        assert torch.equal(gumbel_lookup(logits, codebook, real(0.5), seed=1, backend=backend)[0], want)
    # Beyond the largest float32, but not once rounded.
    largest, beyond = (gumbel_lookup(logits, codebook, t, seed=1)[0] for t in (2.0**128 - 2.0**104, 3.40282355e38))
    assert torch.equal(largest, beyond)


def test_one_code_or_no_rows_at_any_stride() -> None:
    latents, indices, kl = gumbel_lookup(torch.randn(4, 2)[:, ::2], torch.ones(1, 3), 1.0, backend="reference")
    assert (latents.tolist(), indices.tolist(), kl.tolist()) == ([[1.0] * 3] * 4, [0] * 4, [0.0] * 4)
    latents, indices, kl = gumbel_lookup(torch.randn(0, 8)[:, ::2], torch.randn(4, 3), 1.0, backend="reference")
    assert (latents.shape, indices.shape, kl.shape) == ((0, 3), (0,), (0,))


LOGITS, CODEBOOK = torch.zeros(3, 8), torch.zeros(8, 4)
NAN = LOGITS.clone().index_fill_(0, torch.tensor([1]), torch.nan)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((LOGITS.tolist(), CODEBOOK, 1.0), TypeError, "logits: got list"),
        ((LOGITS.int(), CODEBOOK, 1.0), TypeError, "logits: got torch.int32"),
        ((LOGITS, CODEBOOK[0], 1.0), ValueError, r"codebook: got shape \(4,\), wanted 2 dimensions"),
        ((LOGITS, CODEBOOK[:5], 1.0), ValueError, "codebook: got 5 rows, wanted 8"),
        ((LOGITS, CODEBOOK.double(), 1.0), TypeError, "codebook: got torch.float64, wanted torch.float32"),
        ((LOGITS, CODEBOOK.to("meta"), 1.0), ValueError, "codebook: got a tensor on meta"),
        ((LOGITS, CODEBOOK, -1.0), ValueError, "temperature: got -1.0, wanted a finite number"),
        (
            (LOGITS, CODEBOOK, 1e300),
            ValueError,
            r"temperature: got 1e\+300, wanted a finite number of at least 1.2e-38",
        ),
        ((LOGITS, CODEBOOK, 1e-39), ValueError, "temperature: got 1e-39, wanted a finite number of at least 1.2e-38"),
        ((LOGITS, CODEBOOK, 10**400), ValueError, "temperature: got 1000"),
        ((LOGITS, CODEBOOK, "1"), ValueError, "temperature: got '1'"),
        ((LOGITS, CODEBOOK, torch.tensor(-1.0)), ValueError, "temperature: got -1.0, wanted a finite number"),
        ((LOGITS, CODEBOOK, torch.tensor(torch.inf)), ValueError, "temperature: got inf, wanted a finite number"),
        ((LOGITS, CODEBOOK, torch.ones(2)), ValueError, r"temperature: got shape \(2,\)"),
        ((LOGITS, CODEBOOK, 1.0, False, True, 2**64), ValueError, "seed: got 18446744073709551616"),
        ((LOGITS, CODEBOOK, 1.0, False, True, torch.tensor(0.5)), ValueError, "seed: got torch.float32"),
        ((NAN, CODEBOOK, 1.0), ValueError, "logits: row 1 holds NaN, wanted numbers"),
    ],
)
def test_bad_gumbel_input_is_refused(arguments, error, message: str, backend: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        gumbel_lookup(*arguments, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_vq_input_is_refused(backend: str) -> None:
    with pytest.raises(ValueError, match="codebook: got width 4, wanted 8 as features have"):
        vq_lookup(LOGITS, CODEBOOK, backend)
    with pytest.raises(ValueError, match="features: row 1 holds NaN"):
        vq_lookup(NAN, torch.zeros(4, 8), backend)
