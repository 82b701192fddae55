"""The lookup from features: native kernels and reference against float64, for every instruction set at hand."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from dalle_kernels import explain, gumbel_lookup, gumbel_projection_lookup
from dalle_kernels.backends import native
from dalle_kernels.codebook.projection import cpu
from dalle_kernels.codebook.projection.contract import Grads, Inputs, Kept, Needs
from dalle_kernels.noise import GUMBEL_STREAM, gumbel_noise
from tests.codebook.test_cpu import check

DTYPES = [torch.float32, torch.bfloat16]
# Rows, channels, codes, width: one of each, fewer codes than quarters, odd widths, tails of every loop, more rows than
# a strip has, few rows a strip for the many codes, codes in more tiles than runs of them.
SHAPES = [
    (1, 1, 1, 1),
    (5, 3, 2, 3),
    (3, 5, 5, 17),
    (70, 20, 333, 40),
    (130, 48, 1030, 128),
    (1100, 17, 150, 24),
    (9, 33, 6000, 5),
]
# hard, noise, temperature: the last one scores and logits weigh alike.
MODES = [(False, True, 0.6), (True, True, 0.6), (True, False, 0.6), (True, False, 1.0)]
ALL = Needs(True, True, True, True)


def draw(rows: int, channels: int, codes: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[Any, Any]:
    """Features, weight, bias and codebook; gradients of latents, kl and distribution."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = randn(rows, channels), 2 * randn(codes, channels) * channels**-0.5, randn(codes), randn(codes, width)
    return [tensor.to(dtype) for tensor in tensors], (randn(rows, width).to(dtype), randn(rows), 3 * randn(codes))


def plain(
    tensors: list[torch.Tensor | None], temperature: float, hard: bool, noise: bool, seed: int
) -> tuple[torch.Tensor, ...]:
    """The formulas with autograd, in the inputs' own dtype."""
    features, weight, bias, codebook = tensors
    assert features is not None
    assert weight is not None
    assert codebook is not None
    logits = F.linear(features, weight, bias)
    noisy = logits + gumbel_noise(torch.tensor(seed), *logits.shape, GUMBEL_STREAM).to(logits) if noise else logits
    y, indices = (noisy / temperature).softmax(-1), noisy.argmax(-1)
    if hard:
        y = F.one_hot(indices, y.shape[-1]).to(y.dtype) - y.detach() + y
    log_p = logits.log_softmax(-1)
    kl = torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1) + torch.tensor(float(len(weight))).log().to(logits)
    return y @ codebook, indices, kl, log_p.exp().mean(0)


def with_gradients(
    lookup: Any, tensors: list[torch.Tensor | None], grads: tuple[torch.Tensor | None, ...], dtype: torch.dtype
) -> list[torch.Tensor]:
    leaves = [None if tensor is None else tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors]
    latents, indices, kl, distribution = lookup(leaves)
    results = latents, kl, distribution
    asked = [(result, grad.to(result)) for result, grad in zip(results, grads, strict=True) if grad is not None]
    outputs, cotangents = zip(*asked, strict=True)
    wanted = [leaf for leaf in leaves if leaf is not None]
    made = torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)
    zeros = [torch.zeros_like(leaf) if one is None else one for one, leaf in zip(made, wanted, strict=True)]
    return [latents.detach(), indices, kl.detach(), distribution.detach(), *zeros]


NAMES = ("latents", "indices", "kl", "distribution", "dfeatures", "dweight", "dbias", "dcodebook")


def compare(
    shape: Any,
    dtype: torch.dtype,
    mode: Any,
    with_bias: bool,
    only: str | None = None,
    backend: str = "cpu",
    device: str = "cpu",
) -> None:
    hard, noise, temperature = mode
    tensors, grads = ([tensor.to(device) for tensor in some] for some in draw(*shape, dtype))
    if not with_bias:
        tensors[2] = None
    if only is not None:
        grads = tuple(
            grad if name == only else None for name, grad in zip(("latents", "kl", "distribution"), grads, strict=True)
        )

    def lookup(leaves: Any) -> Any:
        return gumbel_projection_lookup(*leaves, temperature, hard, noise, 7, backend, distribution=True)

    def definition(leaves: Any) -> Any:
        return plain(leaves, temperature, hard, noise, 7)

    got = with_gradients(lookup, tensors, grads, dtype)
    want = with_gradients(definition, tensors, grads, torch.float64)
    yardstick = with_gradients(definition, tensors, grads, dtype)
    names = [name for name in NAMES if with_bias or name != "dbias"]
    for name, mine, true, rough in zip(names, got, want, yardstick, strict=True):
        if name == "indices":
            assert torch.equal(mine, true)
        elif name in ("kl", "distribution"):
            torch.testing.assert_close(mine.double(), true, rtol=2e-5, atol=4e-6)
        else:
            check(name, mine, true, rough)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("poisoned_memory")
def test_against_float64(isa: str, shape: tuple, dtype: torch.dtype, mode: tuple) -> None:
    compare(shape, dtype, mode, with_bias=shape[0] % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned_memory")
def test_strips_of_few_rows(isa: str, dtype: torch.dtype) -> None:
    """So many codes that a strip has 64 rows."""
    compare((130, 6, 70001, 3), dtype, (True, False, 1.0), with_bias=True)


@pytest.mark.parametrize("only", ["latents", "kl", "distribution"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("poisoned_memory")
def test_gradients_of_one_output_alone(isa: str, mode: tuple, only: str) -> None:
    compare((66, 20, 259, 24), torch.float32, mode, True, only)


@pytest.mark.parametrize("mode", MODES)
def test_the_reference_is_the_formula(mode: tuple) -> None:
    hard, noise, temperature = mode
    tensors, grads = draw(7, 5, 30, 4, torch.float64)
    got, want = (
        with_gradients(lookup, tensors, grads, torch.float64)
        for lookup in (
            lambda leaves: gumbel_projection_lookup(*leaves, temperature, hard, noise, 7, distribution=True),
            lambda leaves: plain(leaves, temperature, hard, noise, 7),
        )
    )
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def settings(hard: bool = False, noise: bool = True, temperature: float = 0.8, mean: bool = True) -> tuple[Any, ...]:
    return temperature, hard, noise, 5, 0, mean, False


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(130, 20, 1030, 72), (1100, 9, 37, 20), (3, 16, 300, 16), (70, 5, 70001, 3)])
def test_bits_do_not_depend_on_threads(isa: str, shape: tuple, dtype: torch.dtype) -> None:
    tensors, grads = draw(*shape, dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append([])
            for hard in (False, True):
                given = *tensors, *settings(hard)
                made = cpu.forward(Inputs(*given))
                results[-1] += [*made, *cpu.backward(Grads(*grads), Kept(*given, *made), ALL)]
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned_memory")
def test_what_is_asked_for_alone_has_the_bits_it_has_among_all(isa: str, dtype: torch.dtype, hard: bool) -> None:
    tensors, grads = draw(70, 12, 300, 24, dtype)
    given = *tensors, *settings(hard)
    kept = Kept(*given, *cpu.forward(Inputs(*given)))
    together = cpu.backward(Grads(*grads), kept, ALL)
    for place in range(4):
        needs = Needs._make(index == place for index in range(4))
        alone = cpu.backward(Grads(*grads), kept, needs)
        assert [one is None for one in alone] == [index != place for index in range(4)]
        assert alone[place] is not None
        assert torch.equal(alone[place], together[place])


def test_without_the_distribution_nothing_else_changes(isa: str) -> None:
    tensors, grads = draw(70, 12, 300, 24, torch.float32)
    makes = [cpu.forward(Inputs(*tensors, *settings(mean=mean))) for mean in (True, False)]
    assert all(torch.equal(a, b) for a, b in zip(makes[0][:7], makes[1][:7], strict=True))
    assert makes[1].distribution.shape == (0,)
    with_none, without = (
        cpu.backward(Grads(*grads[:2], None), Kept(*tensors, *settings(mean=mean), *made), ALL)
        for mean, made in zip((True, False), makes, strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(with_none, without, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_further_apart_and_no_rows(isa: str, dtype: torch.dtype) -> None:
    (features, weight, bias, codebook), _ = draw(20, 40, 257, 16, dtype)
    for one, other in zip(
        cpu.forward(Inputs(features[:, 3:20], weight[:, 3:20].contiguous(), bias, codebook, *settings())),
        cpu.forward(Inputs(features[:, 3:20].contiguous(), weight[:, 3:20].contiguous(), bias, codebook, *settings())),
        strict=True,
    ):
        assert torch.equal(one, other)
    leaves = [tensor.requires_grad_() for tensor in (features[:0].clone(), weight, bias, codebook)]
    made = gumbel_projection_lookup(*leaves, 1.0, seed=1, backend="cpu", distribution=True)
    assert [tuple(tensor.shape) for tensor in made] == [(0, 16), (0,), (0,), (257,)]
    assert made[3].isnan().all()  # the mean of nothing
    for gradient in torch.autograd.grad(made[0].sum() + made[2].sum(), leaves):
        assert not gradient.any()
    apart = torch.randn(4, 2)[:, ::2]
    assert gumbel_projection_lookup(apart, torch.randn(3, 1), None, torch.randn(3, 5), 1.0)[0].shape == (4, 5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nan_is_refused_with_its_row(backend: str) -> None:
    (features, weight, bias, codebook), _ = draw(70, 12, 259, 24, torch.float32)
    features[66, 5] = torch.nan
    with pytest.raises(ValueError, match="features: row 66 holds NaN"):
        gumbel_projection_lookup(features, weight, bias, codebook, 1.0, seed=1, backend=backend)


@pytest.mark.parametrize("noise", [False, True])
def test_codes_that_a_bias_rules_out(isa: str, noise: bool) -> None:
    """Whole tiles of them: no weight, no share of the distribution, no gradient."""
    tensors, grads = draw(9, 12, 600, 16, torch.float32)
    tensors[2][:400] = -torch.inf
    given = *tensors, *settings(not noise, noise)
    made = cpu.forward(Inputs(*given))
    assert (made.indices >= 400).all()
    assert not made.distribution[:400].any()
    torch.testing.assert_close(made.distribution.sum(), torch.tensor(1.0))
    dfeatures, dweight, dbias, _ = cpu.backward(Grads(*grads), Kept(*given, *made), ALL)
    for gradient in (dfeatures, dweight, dbias):
        assert gradient.isfinite().all()
    assert not dweight[:400].any()
    assert not dbias[:400].any()
    kept = *(tensor[400:] if place else tensor for place, tensor in enumerate(tensors)), *settings(not noise, noise)
    if not noise:
        alone = cpu.forward(Inputs(*kept))
        torch.testing.assert_close(made.latents, alone.latents)
        torch.testing.assert_close(made.distribution[400:], alone.distribution)


def test_ties_take_the_first_index(isa: str) -> None:
    weight = torch.zeros(700, 3)
    weight[[650, 130, 333], 1] = 2
    weight[[699, 350], 2] = 1
    made = cpu.forward(Inputs(torch.eye(3), weight, None, weight, *settings(True, False)))
    assert made.indices.tolist() == [0, 130, 350]


@pytest.mark.parametrize("size", [1e4, 1e15])
@pytest.mark.parametrize("noise", [True, False])
def test_scores_far_apart(isa: str, noise: bool, size: float) -> None:
    (features, weight, bias, codebook), grads = draw(20, 12, 333, 16, torch.float32)
    given = size * features, weight, bias, codebook, *settings(False, noise, 1e-4)
    made = cpu.forward(Inputs(*given))
    chosen = F.linear(given[0].double(), weight.double(), bias.double()).argmax(-1)
    assert torch.equal(made.indices, chosen)
    assert torch.equal(made.latents, codebook[chosen])  # one code takes all
    assert all(one.isfinite().all() for one in cpu.backward(Grads(*grads), Kept(*given, *made), ALL))


def test_it_is_the_lookup_of_the_product(isa: str) -> None:
    """The same noise for the same seed, the codebook as weight or not."""
    (features, weight, bias, _), _ = draw(30, 16, 50, 16, torch.float32)
    for table in (weight, weight.clone()):
        fused = gumbel_projection_lookup(features, weight, bias, table, 0.6, seed=4, backend="cpu")
        apart = gumbel_lookup(F.linear(features, weight, bias), table, 0.6, seed=4, backend="cpu")
        for result, true in zip(fused, apart, strict=True):
            torch.testing.assert_close(result, true, rtol=1e-5, atol=1e-5)


def tied_and_apart(
    shape: tuple[int, int, int], dtype: torch.dtype, mode: tuple[bool, bool, float], backend: str, mean: bool = True
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results and gradients of one table as weight and codebook, and of two equal ones, whose gradients are summed."""
    rows, width, codes = shape
    (features, table, bias, _), grads = draw(rows, width, codes, width, dtype)
    found: list[list[torch.Tensor]] = []
    for tables in ((table.requires_grad_(),) * 2, [table.detach().clone().requires_grad_() for _ in range(2)]):
        leaves = [features.detach().requires_grad_(), bias.detach().requires_grad_(), *dict.fromkeys(tables)]
        given = leaves[0], tables[0], leaves[1], tables[1], mode[2], mode[0], mode[1], 7, backend
        made = gumbel_projection_lookup(*given, distribution=True) if mean else gumbel_projection_lookup(*given)
        loss = sum((made[place] * grad).sum() for place, grad in zip((0, 2, 3)[: len(made) - 1], grads, strict=False))
        gradients = list(torch.autograd.grad(loss, leaves))
        found.append([*made, *gradients[:2], torch.stack(gradients[2:]).sum(0, dtype=torch.float64)])
    return found[0], found[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(70, 20, 333), (130, 5, 70001), (3, 1, 2)])
@pytest.mark.usefixtures("poisoned_memory")
def test_one_table_as_weight_and_codebook(isa: str, dtype: torch.dtype, mode: Any, shape: Any) -> None:
    """It has one gradient, which is both; nothing else changes."""
    tied, apart = tied_and_apart(shape, dtype, mode, "cpu")
    for one, other in zip(tied[:-1], apart[:-1], strict=True):
        assert torch.equal(one, other)
    rounding = (1e-6 if dtype == torch.float32 else 2**-7) * apart[-1].abs().max()
    assert (tied[-1] - apart[-1]).abs().max() <= rounding


@pytest.mark.parametrize("mode", MODES)
def test_one_table_in_the_reference(mode: Any) -> None:
    for one, other in zip(*tied_and_apart((7, 5, 30), torch.float64, mode, "reference"), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mode", MODES[:2])
def test_one_table_in_triton(mode: Any) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is not on where a GPU is")
    for one, other in zip(*tied_and_apart((20, 16, 40), torch.float32, mode, "triton", mean=False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_forward_mode_of_one_table() -> None:
    (features, table, *_), _ = draw(5, 4, 12, 4, torch.float64)

    def tied(table: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = gumbel_projection_lookup(features, table, None, table, 0.7, seed=3, distribution=True)
        return made[0], made[2], made[3]

    def apart(table: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = gumbel_projection_lookup(features, table, None, table * 1, 0.7, seed=3, distribution=True)
        return made[0], made[2], made[3]

    tangent = torch.randn_like(table)
    results = [torch.func.jvp(function, (table,), (tangent,)) for function in (tied, apart)]
    for one, other in zip(*(outputs for _, outputs in results), strict=True):
        torch.testing.assert_close(one, other)
    assert results[0][1][0].abs().max() > 0


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_a_well_made_operation(hard: bool, mean: bool, dtype: torch.dtype) -> None:
    tensors = [tensor.requires_grad_() for tensor in draw(5, 8, 12, 16, dtype)[0]]
    for bias in (tensors[2], None):
        drawn = torch.tensor(0.8), hard, True, torch.tensor(5), torch.tensor(0)
        given = (*tensors[:2], bias, tensors[3], *drawn, mean, False, 0, "auto")
        opcheck(torch.ops.dalle_kernels.gumbel_projection_forward.default, given, atol=1e-4, rtol=1e-4)


def test_gradcheck() -> None:
    tensors = [tensor.requires_grad_() for tensor in draw(4, 3, 6, 2, torch.float64)[0]]

    def lookup(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features, weight, bias, codebook = leaves
        made = gumbel_projection_lookup(features, weight, bias, codebook, 0.9, seed=5, distribution=True)
        return made[0], made[2], made[3]

    assert torch.autograd.gradcheck(lookup, tuple(tensors))


def test_torch_compile_makes_one_graph() -> None:
    tensors = [tensor.requires_grad_() for tensor in draw(6, 5, 30, 5, torch.float32)[0]]

    def loss(features: torch.Tensor, weight: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        made = gumbel_projection_lookup(features, weight, None, weight, tau, True, False, distribution=True)
        return made[0].square().sum() + made[2].sum() + torch.special.entr(made[3]).sum()

    compiled = torch.compile(loss, fullgraph=True)
    for tau in (1.0, 0.5):
        arguments = (*tensors[:2], torch.tensor(tau))
        got = torch.autograd.grad(compiled(*arguments), arguments[:2])
        for one, other in zip(got, torch.autograd.grad(loss(*arguments), arguments[:2]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_explain_says() -> None:
    (features, weight, _, codebook), _ = draw(4, 3, 9, 2, torch.float32)
    answer = explain(gumbel_projection_lookup, features, weight, None, codebook, 1.0, distribution=True)
    assert (answer.backend, answer.detail) == ("cpu", native.instruction_set())
    answer = explain(gumbel_projection_lookup, features.double(), weight.double(), None, codebook.double(), 1.0)
    assert answer.backend == "reference"


MEMORY = """
import resource, torch
from dalle_kernels import gumbel_projection_lookup
z, e = torch.randn(1024, 64, requires_grad=True), torch.randn(65536, 64, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
latents, _, kl, mean = gumbel_projection_lookup(z, e, None, e, 1.0, True, False, distribution=True)
(latents.sin().sum() + kl.mean() - mean.log().mean()).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux")
@pytest.mark.skipif(not native.NATIVE, reason="the reference makes the table")
def test_the_table_is_never_made() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    table = 1024 * 65536 * 4 / 1024  # kilobytes
    assert int(done.stdout) < table / 2
