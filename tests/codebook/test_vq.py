"""vq_lookup's metrics, heads, masks, several rows, draws and statistics, on every backend that is here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_kernels import code_statistics, vq_lookup
from dalle_kernels.backends import native
from dalle_kernels.codebook.vq.contract import METRICS
from dalle_kernels.noise import HEAD_STEP, VQ_STREAM, gumbel_noise

ON_CPU = ["reference"] + ["cpu"] * (native.absence() is None)
BACKENDS = [*ON_CPU, "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scores(features: torch.Tensor, codebook: torch.Tensor, metric: str) -> torch.Tensor:
    """[..., N, K] in float64, by the docstring."""
    features, codebook = features.double(), codebook.double()
    if metric in ("euclidean", "distance"):
        distance = (features[..., :, None, :] - codebook[..., None, :, :]).square().sum(-1)
        return -distance if metric == "euclidean" else -distance.sqrt()
    products = features @ codebook.mT
    if metric == "dot":
        return products
    return products / (features.norm(dim=-1)[..., None] * codebook.norm(dim=-1)[..., None, :])


def device_of(backend: str) -> str:
    return DEVICE if backend == "triton" else "cpu"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "rows", "codes", "width"), [(1, 70, 150, 24), (3, 37, 41, 17), (2, 5, 1, 1)])
@pytest.mark.usefixtures("poisoned_memory")
def test_the_best_row_of_each_metric(
    backend: str, metric: str, dtype: torch.dtype, heads: int, rows: int, codes: int, width: int
) -> None:
    features, codebook = draw(heads, rows, width, dtype=dtype), draw(heads, codes, width, dtype=dtype, seed=1)
    inputs = [tensor.to(device_of(backend)) for tensor in (features, codebook)]
    latents, indices, distance = (x.cpu() for x in vq_lookup(*inputs, backend, metric=metric))
    want = scores(features, codebook, metric)
    chosen = want.gather(-1, indices[..., None])[..., 0]
    assert ((want.amax(-1) - chosen) <= 1e-5 * want.abs().amax(-1)).all()
    nearest = torch.stack([table[index] for table, index in zip(codebook, indices, strict=True)])
    assert torch.equal(latents, nearest)
    exact = (features.double() - nearest.double()).square().sum(-1)
    torch.testing.assert_close(distance.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_gradients_against_float64(backend: str, metric: str) -> None:
    features, codebook, weight = draw(2, 33, 12), draw(2, 20, 12, seed=1), draw(2, 33, seed=2)
    mask = torch.arange(66).view(2, 33) % 5 != 0
    inputs = [tensor.to(device_of(backend)).requires_grad_() for tensor in (features, codebook)]
    here = mask.to(inputs[0].device)
    latents, indices, distance = vq_lookup(*inputs, backend, metric=metric, row_mask=here)
    loss = (latents * 3).sum() + (distance * weight.to(distance.device)).sum()
    got = torch.autograd.grad(loss, inputs)

    wide = [tensor.double().requires_grad_() for tensor in (features, codebook)]
    chosen = torch.stack([t[i] for t, i in zip(wide[1], indices.cpu().clamp_min(0), strict=True)])
    exact = ((wide[0] - chosen).square().sum(-1) * mask * weight).sum() + (3 * wide[0] * mask[..., None]).sum()
    for one, true in zip(got, torch.autograd.grad(exact, wide), strict=True):
        torch.testing.assert_close(one.cpu().double(), true, rtol=1e-5, atol=1e-5)
    assert (indices.cpu() == -1).eq(~mask).all()
    assert not latents.cpu()[~mask].any()
    assert not distance.cpu()[~mask].any()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned_memory")
def test_several_rows_best_first(backend: str, k: int, metric: str) -> None:
    features, codebook = draw(70, 12).requires_grad_(), draw(133, 12, seed=1).requires_grad_()
    here = device_of(backend)
    found = vq_lookup(features.to(here), codebook.to(here), backend, k=k, metric=metric)
    latents, indices, distance = (tensor.cpu() for tensor in found)
    order = scores(features, codebook, metric).topk(k).indices
    assert torch.equal(indices, order)
    assert torch.equal(latents, codebook[indices])
    exact = (features.double()[:, None] - codebook.double()[order]).square().sum(-1)
    torch.testing.assert_close(distance.double(), exact, rtol=1e-5, atol=1e-6)
    weight = draw(70, k, seed=2)
    got = torch.autograd.grad((distance * weight).sum() + latents.sum(), [features, codebook])
    want = torch.autograd.grad((exact * weight).sum() + features.sum() * k, [features, codebook])
    for one, true in zip(got, want, strict=True):
        torch.testing.assert_close(one, true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rows_come_in_their_order(backend: str) -> None:
    table = torch.randint(-3, 4, (3, 16), generator=torch.Generator().manual_seed(0)).float().repeat(60, 1)
    table = table.to(device_of(backend))
    indices = vq_lookup(table[100:103], table, backend, k=8)[1]
    assert indices.tolist() == [[first + 3 * place for place in range(8)] for first in (1, 2, 0)]
    # Noise that is lost beside the scores leaves only the order.
    indices = vq_lookup(table[100:103], table, backend, k=8, temperature=1e-30, seed=1)[1]
    assert indices.tolist() == [[first + 3 * place for place in range(8)] for first in (1, 2, 0)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("codes", [1, 3, 30, 103])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_draws_are_those_of_the_noise(isa: str, codes: int, metric: str, dtype: torch.dtype) -> None:
    features, codebook = draw(2, 150, 6, dtype=dtype), draw(2, codes, 6, dtype=dtype, seed=1)
    k = min(codes, 3)
    for seed in (1, -(2**62) - 5):
        settings = {"metric": metric, "temperature": 0.7, "seed": seed, "k": k}
        got = vq_lookup(features, codebook, "cpu", **settings)[1]  # type: ignore[call-overload]
        streams = VQ_STREAM, VQ_STREAM + HEAD_STEP
        noise = torch.stack([gumbel_noise(torch.tensor(seed), 150, codes, stream) for stream in streams])
        want = scores(features, codebook, metric) + 0.7 * noise.double()
        assert torch.equal(got, want.topk(k).indices)
        exact = vq_lookup(features.double(), codebook.double(), **settings)[1]  # type: ignore[call-overload]
        assert torch.equal(got, exact)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("codes", "k"), [(1, 1), (3, 3), (30, 1), (103, 1), (103, 5), (333, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_triton_draws_what_the_reference_draws(codes: int, k: int, metric: str, dtype: torch.dtype) -> None:
    features, codebook = draw(2, 70, 20, dtype=dtype), draw(2, codes, 20, dtype=dtype, seed=1)
    settings: dict[str, Any] = {"metric": metric, "temperature": 0.7, "seed": -(2**62) - 5, "k": k, "row_offset": 2**32}
    latents, indices, distance = vq_lookup(features.to(DEVICE), codebook.to(DEVICE), "triton", **settings)
    exact = vq_lookup(features.double(), codebook.double(), "reference", **settings)
    assert torch.equal(indices.cpu(), exact[1])
    assert torch.equal(latents.cpu(), exact[0].to(dtype))
    torch.testing.assert_close(distance.cpu().double(), exact[2], rtol=1e-5, atol=1e-5)


def test_triton_ends_with_codes_where_scores_are_no_numbers() -> None:
    """A GPU does not look for NaN, and its indices are read by others: they must be codes, each once."""
    from dalle_kernels.codebook.vq import triton
    from dalle_kernels.codebook.vq.contract import Inputs

    features, codebook = draw(1, 3, 16), draw(1, 9, 16, seed=1)
    features[0, 1] = torch.nan
    codebook[0, :5, 0], codebook[0, 5] = torch.inf, torch.nan
    for noise in ((None, None, None), (1.0, 1, 0)):
        found = triton.forward(Inputs(features.to(DEVICE), codebook.to(DEVICE), 9, "euclidean", 8, *noise))
        for indices in found.indices[0].tolist():
            assert set(indices) <= set(range(9))
            assert len(set(indices)) == 8


def test_draws_follow_the_temperature() -> None:
    codebook = draw(5, 3, seed=1)
    features = draw(1, 3).expand(40000, 3)
    for metric in METRICS:
        indices = vq_lookup(features, codebook, metric=metric, temperature=2.0, seed=3)[1]
        share = torch.bincount(indices, minlength=5) / 40000
        want = (scores(features[:1], codebook, metric)[0] / 2).softmax(-1)
        torch.testing.assert_close(share.double(), want, rtol=0, atol=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "rows", "codes", "width"), [(1, 1100, 6, 8), (3, 70, 41, 24), (2, 0, 5, 3)])
@pytest.mark.usefixtures("poisoned_memory")
def test_statistics(backend: str, dtype: torch.dtype, heads: int, rows: int, codes: int, width: int) -> None:
    features = draw(heads, rows, width, dtype=dtype)
    indices = torch.randint(-1, codes, (heads, rows), generator=torch.Generator().manual_seed(1))
    here = device_of(backend)
    counts, sums = code_statistics(features.to(here), indices.to(here), codes, heads=True, backend=backend)
    hot = torch.nn.functional.one_hot(indices + 1, codes + 1)[..., 1:].double()
    assert torch.equal(counts.cpu().double(), hot.sum(1))
    torch.testing.assert_close(sums.cpu().double(), hot.mT @ features.double(), rtol=1e-5, atol=1e-5)
    assert counts.dtype == sums.dtype == torch.float32


def test_statistics_of_a_lookup_and_their_hook() -> None:
    features, codebook = draw(2, 30, 8), draw(12, 8, seed=1)
    mask = torch.arange(30) < torch.tensor([30, 11])[:, None]
    seen: list[torch.Tensor] = []

    def twice(tensor: torch.Tensor) -> None:  # as another process with the same rows would
        seen.append(tensor)
        tensor.mul_(2)

    _, indices, _, (counts, sums) = vq_lookup(features, codebook, row_mask=mask, statistics=True, all_reduce=twice)
    assert seen[0] is counts
    assert seen[1] is sums
    assert counts.sum() == 2 * 41
    alone = code_statistics(features[mask], indices[mask], 12)
    torch.testing.assert_close((counts / 2, sums / 2), tuple(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads(isa: str, dtype: torch.dtype) -> None:
    features, codebook = draw(3, 1100, 20, dtype=dtype), draw(3, 37, 20, dtype=dtype, seed=1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            leaves = [features.clone().requires_grad_(), codebook.clone().requires_grad_()]
            *nearest, statistics = vq_lookup(*leaves, "cpu", metric="cosine", statistics=True)
            drawn = vq_lookup(*leaves, "cpu", k=3, temperature=0.5, seed=1)
            gradients = torch.autograd.grad(drawn[2].sum() + nearest[2].sum(), leaves)
            found.append([*nearest, *statistics, *drawn, *gradients])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_codebook_may_change_before_the_backward(backend: str) -> None:
    features = draw(20, 8).to(device_of(backend)).requires_grad_()
    codebook = draw(9, 8, seed=1).to(features.device)
    _, indices, distance = vq_lookup(features, codebook, backend)
    want = 2 * (features.detach() - codebook[indices])
    codebook.mul_(0.5).add_(1)  # an EMA step
    (got,) = torch.autograd.grad(distance.sum(), features)
    torch.testing.assert_close(got, want)
    # Where the codebook is trained too, its gradient is that of the codebook as it was.
    trained = codebook.clone().requires_grad_()
    before = trained.detach().clone()
    _, indices, distance = vq_lookup(features, trained, backend)
    with torch.no_grad():
        trained.zero_()
    (got,) = torch.autograd.grad(distance.sum(), trained)
    want = torch.zeros_like(before).index_add_(0, indices, 2 * (before[indices] - features.detach()))
    torch.testing.assert_close(got, want)


def test_a_frozen_codebook_has_no_gradient_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from dalle_kernels.codebook.vq import cpu, reference

    module = cpu if native.absence() is None else reference
    needs: list[Any] = []
    plain = module.backward
    monkeypatch.setattr(module, "backward", lambda *args: needs.append(args[2]) or plain(*args))
    features = draw(20, 8).requires_grad_()
    vq_lookup(features, draw(9, 8, seed=1))[2].sum().backward()
    assert needs == [(True, False)]


def test_compiled_and_under_opcheck() -> None:
    features, codebook = draw(2, 9, 6).requires_grad_(), draw(2, 13, 6, seed=1).requires_grad_()
    mask = torch.arange(18).view(2, 9) % 4 != 0

    def loss(features: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, ...]:
        _, _, distance, (counts, sums) = vq_lookup(features, codebook, metric="dot", row_mask=mask, statistics=True)
        several = vq_lookup(features, codebook, k=2, temperature=0.5, seed=1)
        return distance.sum() + several[2].sum(), counts, sums

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = compiled(features, codebook), loss(features, codebook)
    torch.testing.assert_close(got, want)
    for one, other in zip(
        torch.autograd.grad(got[0], [features, codebook]),
        torch.autograd.grad(want[0], [features, codebook]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    noise = torch.tensor(0.5), torch.tensor(1), torch.tensor(0)
    torch.library.opcheck(
        torch.ops.dalle_kernels.vq_forward.default, (features, codebook, 13, "cosine", 2, *noise, "auto")
    )
    torch.library.opcheck(
        torch.ops.dalle_kernels.code_statistics.default,
        (features.detach(), torch.zeros(2, 9, dtype=torch.int64), 13, "auto"),
    )


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(0, 3),
    rows=st.integers(0, 80),
    codes=st.integers(1, 70),
    width=st.integers(1, 40),
    metric=st.sampled_from(METRICS),
    k=st.none() | st.integers(1, 8),
    temperature=st.none() | st.floats(0.1, 3.0),
    bfloat16=st.booleans(),
)
def test_backends_agree_at_any_shape(
    heads: int, rows: int, codes: int, width: int, metric: Any, k: int | None, temperature: Any, bfloat16: bool
) -> None:
    first = (heads,) if heads else ()
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    features, codebook = draw(*first, rows, width, dtype=dtype), draw(*first, codes, width, dtype=dtype, seed=1)
    k = None if k is None else min(k, codes)
    given = {"metric": metric, "k": k, "temperature": temperature, "seed": 7}
    got = vq_lookup(features, codebook, **given)
    want = vq_lookup(features.double(), codebook.double(), "reference", **given)
    # Rows whose scores lie within rounding may change places, for one as good.
    table = scores(features, codebook, metric)
    if temperature is not None:
        streams = [VQ_STREAM + head * HEAD_STEP for head in range(max(heads, 1))]
        noise = torch.stack([gumbel_noise(torch.tensor(7), rows, codes, stream) for stream in streams])
        table = table + torch.tensor(temperature) * noise.view_as(table).double()
    chosen = (table.gather(-1, indices.view(*table.shape[:-1], k or 1)) for indices in (got[1], want[1]))
    torch.testing.assert_close(*chosen, rtol=1e-4, atol=1e-4)
    assert torch.equal(
        got[0], codebook[got[1]] if not heads else torch.stack([t[i] for t, i in zip(codebook, got[1], strict=True)])
    )
    exact = (features.double() if k is None else features.double()[..., None, :]) - got[0].double()
    torch.testing.assert_close(got[2].double(), exact.square().sum(-1), rtol=1e-5, atol=1e-5)
    assert got[1].shape == (*first, rows, *(() if k is None else (k,)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"codebook": torch.zeros(0, 4)}, ValueError, "wanted at least one code"),
        ({"codebook": torch.zeros(4)}, ValueError, r"codebook: got shape \(4,\), wanted \[K, D\] or \[H, K, D\]"),
        ({"codebook": torch.zeros(2, 5, 4)}, ValueError, "codebook: got 2 heads, wanted 3 as features have"),
        ({"codebook": torch.zeros(5, 4, device="meta")}, ValueError, "codebook: got a tensor on meta, wanted cpu"),
        ({"codebook": torch.zeros(5, 4).double()}, TypeError, "codebook: got torch.float64, wanted torch.float32"),
        ({"metric": "manhattan"}, ValueError, "metric: got 'manhattan', wanted one of 'euclidean'"),
        ({"k": 0}, ValueError, "k: got 0, wanted an int from 1 to 5, or None"),
        ({"k": 6}, ValueError, "k: got 6, wanted an int from 1 to 5, or None"),
        ({"k": 1.5}, ValueError, "k: got 1.5"),
        ({"k": 2, "statistics": True}, ValueError, "statistics: got True with k=2, wanted k=None"),
        ({"all_reduce": print}, ValueError, "all_reduce: got a function, wanted None"),
        ({"temperature": 0.0}, ValueError, "temperature: got 0.0, wanted a finite number"),
        ({"temperature": torch.tensor(-1.0)}, ValueError, "temperature: got -1.0, wanted a finite number"),
        ({"temperature": 1.0, "seed": 2**64}, ValueError, "seed: got 18446744073709551616"),
        ({"row_mask": [True] * 3}, TypeError, "row_mask: got list, wanted a torch.Tensor"),
        ({"row_mask": torch.ones(3)}, ValueError, r"row_mask: got torch.float32 of shape \(3,\), wanted torch.bool"),
        (
            {"row_mask": torch.ones(2, dtype=torch.bool)},
            ValueError,
            r"row_mask: got torch.bool of shape \(2,\), wanted torch.bool of shape \(3,\)",
        ),
        ({"features": torch.full((3, 4), torch.nan)}, ValueError, "features: row 0 holds NaN, wanted numbers"),
        ({"features": torch.full((3, 4), torch.nan), "k": 2}, ValueError, "features: row 0 holds NaN, wanted numbers"),
        ({"features": torch.zeros(())}, ValueError, "wanted at least one code"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_input_is_refused(change: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    arguments = {"features": torch.zeros(3, 4), "codebook": torch.zeros(5, 4)} | change
    with pytest.raises(error, match=message):
        vq_lookup(**arguments, backend=backend)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_features_that_are_not_finite_are_treated_alike_on_every_path(backend: str, value: float) -> None:
    """On the CPU they are refused; a GPU does not look, and gives NaN."""
    here = device_of(backend)
    features, codebook = draw(4, 16).to(here), draw(9, 16, seed=1).to(here)
    features[2, 3] = value

    def latents(features: torch.Tensor) -> torch.Tensor:
        return vq_lookup(features, codebook, backend)[0]

    compiled = torch.compile(latents, backend="eager", fullgraph=True)
    for path in (latents, compiled, torch.func.vmap(latents)):
        for needs in (False, True):
            given = (features if path in (latents, compiled) else features[None]).clone().requires_grad_(needs)
            if features.is_cuda:
                assert path(given).isnan().any()
                continue
            with pytest.raises(ValueError, match=r"features: row 2 holds (NaN|infinity), wanted (finite )?numbers"):
                path(given)


def test_a_distance_past_the_largest_number_is_infinite() -> None:
    features, codebook = draw(4, 16), draw(9, 16, seed=1)
    features[2] *= 1e25
    latents, indices, distance = vq_lookup(features, codebook)
    assert torch.equal(latents, codebook[indices])
    assert distance.isinf().tolist() == [False, False, True, False]


def test_latents_may_be_changed_in_place_before_the_backward() -> None:
    features, codebook = draw(7, 16), draw(9, 16, seed=1).requires_grad_()
    wanted = torch.autograd.grad(vq_lookup(features, codebook)[2].sum(), codebook)
    latents, _, distance = vq_lookup(features, codebook)
    latents.zero_()
    assert torch.equal(torch.autograd.grad(distance.sum(), codebook)[0], wanted[0])


def test_nan_in_rows_that_do_not_count_is_not_looked_at() -> None:
    features = draw(4, 3)
    features[1] = torch.nan
    mask = torch.tensor([True, False, True, True])
    leaf = features.requires_grad_()
    latents, indices, distance, (counts, sums) = vq_lookup(leaf, draw(5, 3, seed=1), row_mask=mask, statistics=True)
    (latents.sum() + distance.sum()).backward()
    assert leaf.grad is not None
    for tensor in (latents, distance, sums, leaf.grad):
        assert tensor.isfinite().all()
    assert indices[1] == -1
    assert counts.sum() == 3


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indices": [0]}, TypeError, "indices: got list, wanted a torch.Tensor"),
        ({"indices": torch.zeros(3)}, TypeError, "indices: got torch.float32, wanted torch.int64"),
        ({"indices": torch.zeros(2, dtype=torch.int64)}, ValueError, r"features, indices: got shapes \(3, 4\), \(2,\)"),
        ({"indices": torch.tensor([0, 5, 1])}, IndexError, "indices: got 5, wanted 0 to 4, or -1"),
        ({"indices": torch.tensor([0, -2, 1])}, IndexError, "indices: got -2, wanted 0 to 4, or -1"),
        ({"codes": 0}, ValueError, "codes: got 0, wanted at least 1"),
    ],
)
def test_bad_statistics_are_refused(change: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    arguments = {"features": torch.zeros(3, 4), "indices": torch.zeros(3, dtype=torch.int64), "codes": 5} | change
    with pytest.raises(error, match=message):
        code_statistics(**arguments, backend=backend)
