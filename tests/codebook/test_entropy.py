"""The streamed entropies against the softmax over the whole table, in float64."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from dalle_kernels.codebook import entropy as room
from dalle_kernels.codebook.entropy import codebook_entropy


def dense(features: torch.Tensor, codebook: torch.Tensor, temperature: float, metric: str) -> tuple[torch.Tensor, ...]:
    scores = features @ codebook.T if metric == "dot" else -(features[:, None] - codebook).square().sum(-1)
    log_p = (scores / temperature).log_softmax(-1)
    mean = log_p.exp().mean(0)
    return -(log_p.exp() * log_p).sum(-1).mean(), -(mean * mean.clamp_min(1e-300).log()).sum(), mean


@pytest.fixture(params=[(512, 1024), (4, 7)], ids=str)
def _tiles(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles larger than the problem, and small ones that do not divide it."""
    monkeypatch.setattr(room, "_ROWS", request.param[0])
    monkeypatch.setattr(room, "_CODES", request.param[1])


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("metric", ["dot", "euclidean"])
@pytest.mark.parametrize("temperature", [1.0, 0.05, 10.0])
@pytest.mark.parametrize("sizes", [(13, 40, 6), (1, 1, 1), (9, 8, 3)])
def test_entropies_and_their_gradients(metric: Any, temperature: float, sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    rows, codes, width = sizes
    leaves = [torch.randn(size, width, dtype=torch.float64).requires_grad_() for size in (rows, codes)]
    got = codebook_entropy(*leaves, temperature, metric)
    wanted = dense(*leaves, temperature, metric)
    weights = torch.randn(codes, dtype=torch.float64)
    for one, true in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, true, rtol=1e-10, atol=1e-12)
    losses = [result[0] * 0.7 - result[1] * 1.3 + (result[2] * weights).sum() for result in (got, wanted)]
    for one, true in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        torch.testing.assert_close(one, true, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
@pytest.mark.parametrize("temperature", [1.0, 0.2, 10.0])
@pytest.mark.parametrize("sizes", [(130, 1030, 40), (1, 1, 1), (70, 70001, 3), (1100, 8, 3)])
def test_float32_against_float64(metric: Any, temperature: float, sizes: tuple[int, ...]) -> None:
    """What the lookup's kernels serve errs at most twice as much as the streamed table, and its last digits."""
    torch.manual_seed(0)
    rows, codes, width = sizes
    leaves = [torch.randn(size, width).requires_grad_() for size in (rows, codes)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    weights = torch.randn(codes)

    def all_of(result: tuple[torch.Tensor, ...], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        loss = result[0] * 0.7 - result[1] * 1.3 + (result[2] * weights).sum()
        return [one.detach().double() for one in (*result, *torch.autograd.grad(loss, inputs))]

    row_entropy, distribution, *_ = room._Streamed.apply(*leaves, temperature, metric == "euclidean")
    streamed = all_of((row_entropy, room.entropy(distribution), distribution), leaves)
    got = all_of(codebook_entropy(*leaves, temperature, metric), leaves)
    wanted = all_of(dense(*exact, temperature, metric), exact)
    for one, rough, true in zip(got, streamed, wanted, strict=True):
        error, yardstick = (one - true).abs().max(), (rough - true).abs().max()
        assert error <= 2 * yardstick + 4e-6 * true.abs().max() + 1e-7


def test_nan_is_refused_with_its_row() -> None:
    features = torch.randn(5, 4)
    features[3, 1] = torch.nan
    with pytest.raises(ValueError, match="features: row 3 holds NaN"):
        codebook_entropy(features, torch.randn(9, 4))


@pytest.mark.usefixtures("_tiles")
def test_float32_with_far_scores() -> None:
    torch.manual_seed(1)
    leaves = [(100 * torch.randn(size, 8)).requires_grad_() for size in (30, 50)]
    got = codebook_entropy(*leaves)
    wanted = dense(*(leaf.double() for leaf in leaves), 1.0, "dot")
    for one, true in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), true, rtol=1e-4, atol=1e-6)
    for gradient in torch.autograd.grad(got.rows + got.mean, leaves):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_have_the_inputs_dtype(dtype: torch.dtype) -> None:
    leaves = [torch.randn(size, 4).to(dtype).requires_grad_() for size in (5, 9)]
    result = codebook_entropy(*leaves)
    assert result.rows.dtype == torch.float32
    assert [gradient.dtype for gradient in torch.autograd.grad(result.mean, leaves)] == [dtype, dtype]


def test_masked_rows_do_not_count() -> None:
    torch.manual_seed(2)
    features, codebook = torch.randn(2, 7, 6), torch.randn(20, 6)
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    masked = codebook_entropy(features, codebook, row_mask=mask)
    for got, wanted in zip(masked, codebook_entropy(features[mask], codebook), strict=True):
        torch.testing.assert_close(got, wanted)


MEMORY = """
import resource, torch
from dalle_kernels import codebook_entropy
z, e = torch.randn(1024, 64, requires_grad=True), torch.randn(65536, 64, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = codebook_entropy(z, e)
(result.rows - result.mean).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux")
def test_the_table_is_never_made() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    table = 1024 * 65536 * 4 / 1024  # kilobytes
    assert int(done.stdout) < table / 2


def test_what_is_refused() -> None:
    z, e = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match="features, codebook"):
        codebook_entropy(z, torch.randn(5, 3))
    with pytest.raises(ValueError, match="features, codebook"):
        codebook_entropy(z, e[:0])
    with pytest.raises(ValueError, match="metric: got 'cosine'"):
        codebook_entropy(z, e, metric="cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature"):
        codebook_entropy(z, e, 0.0)
    with pytest.raises(ValueError, match="no row"):
        codebook_entropy(z, e, row_mask=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"codebook: got torch\.float64"):
        codebook_entropy(z, e.double())


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
def test_functional_gradients_in_double_precision(metric: Any) -> None:
    torch.manual_seed(0)
    features, codebook = torch.randn(7, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)

    def loss(features: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        rows, mean, distribution = codebook_entropy(features, codebook, 0.7, metric)
        return rows - 0.5 * mean + distribution[3]

    leaves = features.requires_grad_(), codebook.requires_grad_()
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.func.grad(loss, argnums=(0, 1))(features.detach(), codebook.detach())
    torch.testing.assert_close(got, wanted)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(loss, (features.detach(), codebook.detach()), (features.detach(), codebook.detach()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", ["dot", "euclidean"])
@pytest.mark.parametrize("kernels", [True, False])
def test_autocast_casts_inputs_and_nothing_within(
    dtype: torch.dtype, metric: Any, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entropies of what is cast are computed in float32, by the lookup's kernels and streamed alike."""
    if not kernels:
        monkeypatch.setattr(room, "_has_kernels", lambda *_: False)
    leaves = [(4 * torch.randn(size, 24)).to(dtype).requires_grad_() for size in (31, 40)]
    outside = codebook_entropy(*leaves, 0.3, metric)
    with torch.autocast("cpu", dtype):
        within = codebook_entropy(*leaves, 0.3, metric)
    assert all(
        one.dtype == torch.float32 and torch.equal(one, other) for one, other in zip(within, outside, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strict_export_and_one_graph(dtype: torch.dtype) -> None:
    class Entropies(torch.nn.Module):
        def forward(self, rows: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(codebook_entropy(rows, codes, 0.7))

    given = torch.randn(9, 4, dtype=dtype), torch.randn(6, 4, dtype=dtype)
    with torch.no_grad():
        wanted = Entropies()(*given)
        for made in (
            torch.export.export(Entropies(), given, strict=True).module(),
            torch.compile(Entropies(), fullgraph=True, backend="eager"),
        ):
            torch.testing.assert_close(made(*given), wanted)
