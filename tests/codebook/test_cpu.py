"""The native codebook kernels against float64, for every instruction set that this processor has."""

from __future__ import annotations

import pytest
import torch

from dalle_kernels import gumbel_lookup, vq_lookup
from dalle_kernels.backends import native
from dalle_kernels.codebook.gumbel import cpu, reference
from dalle_kernels.codebook.gumbel.contract import Grads, Inputs, Kept, Needs
from dalle_kernels.codebook.vq import contract as vq_contract
from dalle_kernels.codebook.vq import cpu as vq_cpu
from dalle_kernels.codebook.vq import reference as vq_reference
from dalle_kernels.noise import GUMBEL_STREAM, gumbel_noise

DTYPES = [torch.float32, torch.bfloat16]
# Rows, codes, width: fewer codes than quarters, quarters that end early, widths with tails, more rows than a tile.
SHAPES = [(1, 1, 1), (5, 2, 3), (3, 5, 17), (70, 333, 40), (130, 1030, 128), (9, 4096, 80)]
# Each mode that gumbel_lookup has: hard, noise.
MODES = [(False, True), (True, True), (True, False)]


def draw(rows: int, codes: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, codes, generator=generator)
    codebook = torch.randn(codes, width, generator=generator)
    grad_latents = torch.randn(rows, width, generator=generator)
    return logits.to(dtype), codebook.to(dtype), grad_latents.to(dtype), torch.randn(rows, generator=generator)


def plain_gumbel(logits, codebook, temperature, hard, noise, seed, grad_latents, grad_kl):  # type: ignore[no-untyped-def]
    """The formulas in plain PyTorch in the inputs' own dtype: its error is the yardstick for the kernels'."""
    logits, codebook = logits.clone().requires_grad_(), codebook.clone().requires_grad_()
    noisy = logits + gumbel_noise(seed[0], *logits.shape, GUMBEL_STREAM, seed[1]).to(logits.dtype) if noise else logits
    soft = (noisy / temperature).softmax(-1)
    y = soft
    if hard:
        one_hot = torch.nn.functional.one_hot(noisy.argmax(-1), logits.shape[1]).to(soft.dtype)
        y = one_hot - soft.detach() + soft
    latents = y @ codebook
    log_p = logits.log_softmax(-1)
    kl = (log_p.exp() * log_p).sum(-1)
    loss = (latents * grad_latents).sum() + (kl * grad_kl.to(kl.dtype)).sum()
    return latents.detach(), *torch.autograd.grad(loss, (logits, codebook))


def check(name: str, got: torch.Tensor, want: torch.Tensor, plain: torch.Tensor) -> None:
    """Error at most twice plain PyTorch's in the same dtype, plus rounding of the largest value and of terms of order
    1 that cancel (with a single code all of dlogits does)."""
    assert got.isfinite().all(), name
    scale = want.abs().max()
    rounding = {torch.float32: 4e-6, torch.bfloat16: 2**-8}[plain.dtype] * scale + 1e-6
    error, yardstick = (got.double() - want).abs().max(), (plain.double() - want).abs().max()
    assert error <= 2 * yardstick + rounding, f"{name}: error {error:.2e}, plain {yardstick:.2e}, scale {scale:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("hard", "noise"), MODES)
@pytest.mark.usefixtures("poisoned_memory")
def test_gumbel_against_float64(isa: str, shape: tuple, dtype: torch.dtype, hard: bool, noise: bool) -> None:
    logits, codebook, grad_latents, grad_kl = draw(*shape, dtype)
    temperature, seed = 0.6, (-(2**62) - 12345, 2**33 - 5)
    exact = [t.double() for t in (logits, codebook)]
    got = cpu.forward(Inputs(logits, codebook, temperature, hard, noise, *seed))
    want = reference.forward(Inputs(*exact, temperature, hard, noise, *seed))
    mine = cpu.backward(
        Grads(grad_latents, grad_kl), Kept(logits, codebook, temperature, hard, noise, *seed, *got), Needs(True, True)
    )
    theirs = reference.backward(
        Grads(grad_latents.double(), grad_kl.double()),
        Kept(*exact, temperature, hard, noise, *seed, *want),
        Needs(True, True),
    )
    plain = plain_gumbel(logits, codebook, temperature, hard, noise, seed, grad_latents, grad_kl)

    assert torch.equal(got[1], want[1])
    check("latents", got[0], want[0], plain[0])
    for name, index in (("kl", 2), ("maximum", 3), ("log_noisy", 4), ("log_clean", 5)):
        torch.testing.assert_close(
            got[index].double(), want[index], rtol=2e-6, atol=4e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    if hard:
        assert torch.equal(got[0], codebook[got[1]])
        check("mixture", got[6], want[6], want[6].to(dtype))
    check("dlogits", mine[0], theirs[0], plain[1])
    check("dcodebook", mine[1], theirs[1], plain[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned_memory")
def test_gradients_of_one_output_alone(isa: str, dtype: torch.dtype) -> None:
    logits, codebook, grad_latents, grad_kl = draw(66, 259, 24, dtype)
    temperature, seed = 1.5, (3, 0)
    saved = cpu.forward(Inputs(logits, codebook, temperature, False, True, *seed))
    common = (logits, codebook, temperature, False, True, *seed, *saved)
    both = cpu.backward(Grads(grad_latents, grad_kl), Kept(*common), Needs(True, True))
    only_latents = cpu.backward(Grads(grad_latents, None), Kept(*common), Needs(True, True))
    only_kl = cpu.backward(Grads(None, grad_kl), Kept(*common), Needs(True, True))
    assert torch.equal(both[1], only_latents[1])
    assert not only_kl[1].any()
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(only_latents[0] + only_kl[0], both[0], rtol=tolerance, atol=tolerance)


def test_published_philox_vectors(isa: str) -> None:
    """Known answers of Philox4x32-10, from the test vectors of its authors' library."""
    ones, pi = 2**32 - 1, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    key = 0xA4093822 | 0x299F31D0 << 32
    for counter, seed, want in (
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, key, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        row, signed = counter[1] | counter[2] << 32, lambda x: x - (x >> 63 << 64)
        words, _ = torch.ops.dalle_kernels_cpu.noise_words(signed(seed), signed(row), counter[3], counter[0])
        assert tuple(words[:, 0].tolist()) == want


@pytest.mark.parametrize("codes", [1, 3, 4, 7, 61, 64, 100])
def test_noise_is_the_defined_noise(isa: str, codes: int) -> None:
    """Counter by counter; each float32 within a few units of rounding of the exact logarithms of the same u."""
    seed, quarter = -(2**40) - 7, -(-codes // 4)
    want = gumbel_noise(torch.tensor(seed), 5, codes, GUMBEL_STREAM)
    for row in range(5):
        parts = []
        for first in range(0, quarter, 16):
            parts.append(torch.ops.dalle_kernels_cpu.noise_words(seed, row, GUMBEL_STREAM, first))
        words, noise = (torch.cat([part[i] for part in parts], dim=1)[:, :quarter].flatten()[:codes] for i in (0, 1))
        exact = -torch.log(-torch.log(((words >> 9).double() + 0.5) * 2.0**-23))
        assert ((noise - exact).abs() <= 3e-7 * exact.abs() + 2e-7).all()
        torch.testing.assert_close(noise, want[row], rtol=6e-7, atol=4e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_take_the_first_index(isa: str, dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 700, dtype=dtype)
    logits[1, [650, 130, 333]] = 2
    logits[2, [699, 350]] = 1
    codebook = torch.randn(700, 8).to(dtype)
    indices = cpu.forward(Inputs(logits, codebook, 1.0, True, False, 0, 0))[1]
    assert indices.tolist() == [0, 130, 350]
    table = torch.randn(50, 6).to(dtype)
    table[31] = table[17]
    table[44] = table[17]
    assert vq_lookup(table[17:18], table)[1].tolist() == [17]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_refused_with_its_row(isa: str, dtype: torch.dtype) -> None:
    for code in (0, 200, 258):
        logits, codebook, *_ = draw(70, 259, 24, dtype)
        logits[66, code] = torch.nan
        with pytest.raises(ValueError, match="row 66"):
            gumbel_lookup(logits, codebook, 1.0, seed=1, backend="cpu")
        features = codebook.clone()
        features[200, 5] = torch.nan
        with pytest.raises(ValueError, match="row 200"):
            vq_lookup(features, codebook, backend="cpu")


@pytest.mark.parametrize("noise", [False, True])
def test_minus_infinity_and_huge_logits(isa: str, noise: bool) -> None:
    """Codes that -inf rules out, whole tiles of them included, take no weight and no gradient; large offsets cancel."""
    logits, codebook, grad_latents, grad_kl = draw(9, 600, 16, torch.float32)
    logits[:, :400] = -torch.inf
    logits[:, 500:] += 3e4
    logits[8] = -1e20 * torch.arange(600)
    arguments = (0.05, not noise, noise, 8, 0)
    got = cpu.forward(Inputs(logits, codebook, *arguments))
    want = reference.forward(Inputs(logits.double(), codebook.double(), *arguments))
    plain = reference.forward(Inputs(logits, codebook, *arguments))
    assert torch.equal(got[1], want[1])
    for index, name in enumerate(("latents", "indices", "kl", "maximum", "log_noisy", "log_clean")):
        check(name, got[index].float(), want[index].double(), plain[index].float())
    dlogits, _ = cpu.backward(Grads(grad_latents, grad_kl), Kept(logits, codebook, *arguments, *got), Needs(True, True))
    assert dlogits.isfinite().all()
    assert not dlogits[:8, :400].any()


@pytest.mark.parametrize("shape", [(130, 1030, 72), (1100, 37, 20), (3, 300, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(isa: str, shape: tuple, dtype: torch.dtype) -> None:
    logits, codebook, grad_latents, grad_kl = draw(*shape, dtype)
    arguments = (0.8, False, True, 5, 0)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            forward = cpu.forward(Inputs(logits, codebook, *arguments))
            hard = cpu.forward(Inputs(logits, codebook, arguments[0], True, True, *arguments[3:]))
            results.append(
                (
                    *forward,
                    *hard,
                    *cpu.backward(
                        Grads(grad_latents, grad_kl), Kept(logits, codebook, *arguments, *forward), Needs(True, True)
                    ),
                    *cpu.backward(
                        Grads(grad_latents, grad_kl),
                        Kept(logits, codebook, arguments[0], True, True, *arguments[3:], *hard),
                        Needs(True, True),
                    ),
                )
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("poisoned_memory")
def test_vq_against_float64(isa: str, shape: tuple, dtype: torch.dtype) -> None:
    _, codebook, features, grad = draw(*shape, dtype)
    features, codebook, grad = features[None], codebook[None], grad[None, :, None]
    inputs = vq_contract.Inputs(features, codebook, codebook.shape[1], "euclidean", 1, None, None, None)
    nearest, distance, indices = vq_cpu.forward(inputs)
    exact = (features.double()[:, :, None] - codebook.double()[:, None]).square().sum(-1)
    assert torch.equal(indices[..., 0], exact.argmin(-1))
    assert torch.equal(nearest[0, :, 0], codebook[0, indices[0, :, 0]])
    torch.testing.assert_close(distance[..., 0].double(), exact.min(-1).values, rtol=2e-6, atol=1e-12)
    kept = vq_contract.Kept(features, nearest, indices, codebook.shape[1])
    got = vq_cpu.backward(vq_contract.Grads(grad), kept, vq_contract.Needs(True, True))
    want = vq_reference.backward(
        vq_contract.Grads(grad.double()),
        kept._replace(features=features.double(), nearest=nearest.double()),
        vq_contract.Needs(True, True),
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)


def test_rows_further_apart_and_no_rows(isa: str) -> None:
    wide, codebook, *_ = draw(20, 300, 16, torch.float32)
    logits, codebook = wide[:, 20:277], codebook[:257].contiguous()
    arguments = (1.0, False, True, 5, 0)
    for one, other in zip(
        cpu.forward(Inputs(logits, codebook, *arguments)),
        cpu.forward(Inputs(logits.contiguous(), codebook, *arguments)),
        strict=True,
    ):
        assert torch.equal(one, other)
    assert gumbel_lookup(torch.randn(4, 2)[:, ::2], torch.randn(1, 3), 1.0, backend="cpu")[0].shape == (4, 3)
    assert gumbel_lookup(torch.randn(0, 8)[:, ::2], torch.randn(4, 3), 1.0, backend="cpu")[0].shape == (0, 3)
    latents, indices, kl = gumbel_lookup(torch.empty(0, 257), codebook, 1.0, seed=1, backend="cpu")
    assert (latents.shape, indices.shape, kl.shape) == ((0, 16), (0,), (0,))


@pytest.mark.parametrize(("size", "temperature"), [(1.0, 3e-9), (1e4, 1e-5), (1e30, 1.0)])
@pytest.mark.parametrize("noise", [True, False])
def test_scores_far_apart(isa: str, noise: bool, size: float, temperature: float) -> None:
    logits, codebook, grad_latents, grad_kl = draw(20, 333, 32, torch.float32)
    settings = temperature, False, noise, 4, 0
    got = cpu.forward(Inputs(size * logits, codebook, *settings))
    want = reference.forward(Inputs((size * logits).double(), codebook.double(), *settings))
    assert torch.equal(got[0].double(), want[0])  # one code takes all
    torch.testing.assert_close(got[3].double(), want[3], rtol=1e-6, atol=0)
    gradients = cpu.backward(
        Grads(grad_latents, grad_kl), Kept(size * logits, codebook, *settings, *got), Needs(True, True)
    )
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("floor", [-2e30, torch.finfo(torch.float32).min])
def test_rows_at_the_floor_are_uniform(isa: str, floor: float, noise: bool) -> None:
    codebook = torch.randn(40, 8)
    latents, indices, kl, *_ = cpu.forward(Inputs(torch.full((3, 40), floor), codebook, 1.0, False, noise, 1, 0))
    torch.testing.assert_close(latents, codebook.mean(0).expand(3, -1))
    assert torch.equal(indices, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(kl, torch.zeros(3), rtol=0, atol=1e-6)


def test_automatic_choice_is_native() -> None:
    logits, codebook, *_ = draw(4, 9, 3, torch.float32)
    from dalle_kernels import explain

    for answer in (explain(gumbel_lookup, logits, codebook, 1.0), explain(vq_lookup, codebook, codebook)):
        assert (answer.backend, answer.detail) == ("cpu", native.instruction_set())


@pytest.mark.parametrize("use", ["latents", "kl", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.usefixtures("poisoned_memory")
def test_what_is_frozen_costs_nothing(isa: str, hard: bool, dtype: torch.dtype, use: str) -> None:
    """What is asked for alone has the bits it has among all; the codebook's gradient alone reads no codebook."""
    logits, codebook, grad_latents, grad_kl = draw(70, 40, 24, dtype)
    settings = (logits, codebook, 0.7, hard, True, 2, 0)
    kept = Kept(*settings, *cpu.forward(Inputs(*settings)))
    grads = Grads(None if use == "kl" else grad_latents, None if use == "latents" else grad_kl)
    both = cpu.backward(grads, kept, Needs(True, True))
    unread = kept._replace(codebook=torch.full_like(codebook, torch.nan))
    for needs, given in ((Needs(True, False), kept), (Needs(False, True), unread), (Needs(False, False), unread)):
        for gradient, whole, need in zip(cpu.backward(grads, given, needs), both, needs, strict=True):
            assert (gradient is not None) == need
            assert gradient is None or torch.equal(gradient.view(torch.uint8), whole.view(torch.uint8))


def test_a_frozen_nearest_row_costs_nothing(isa: str) -> None:
    codebook, grad_latents = torch.randn(40, 24), torch.randn(70, 24)
    indices, grad_kl = torch.randint(40, (70,)), torch.randn(70)
    nearest = codebook[indices][None, :, None]
    features = vq_contract.Kept(grad_latents[None], nearest, indices[None, :, None], len(codebook))
    distances = vq_contract.Grads(grad_kl[None, :, None])
    both = vq_cpu.backward(distances, features, vq_contract.Needs(True, True))
    for place, needs in enumerate((vq_contract.Needs(True, False), vq_contract.Needs(False, True))):
        alone = vq_cpu.backward(distances, features, needs)
        assert torch.equal(both[place], alone[place])
        assert alone[1 - place].numel() == 0
