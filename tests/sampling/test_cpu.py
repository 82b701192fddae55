"""The native sampler against the definition, for every instruction set that this processor has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_kernels import explain, sample_tokens
from dalle_kernels.backends import native
from dalle_kernels.noise import SAMPLING_STREAM, gumbel_noise
from dalle_kernels.sampling import cpu, reference
from dalle_kernels.sampling.contract import Inputs
from tests.sampling import masked


def agree(logits, unconditional, scale, temperature, top_k, top_p, seed) -> None:  # type: ignore[no-untyped-def]
    """The same token, unless float32 rounding decides: then the scores, or the filters' boundaries, all but tie.

    The judge is float64: a token that differs must have a noisy score within rounding of the winner's, where the
    winner is taken under slightly tighter or slightly looser filters.
    """
    seed = (seed, 2**32 - 2)
    got = cpu.forward(Inputs(logits, unconditional, scale, temperature, top_k, top_p, *seed)).tokens
    base = None if unconditional is None else unconditional.double()
    want = reference.forward(Inputs(logits.double(), base, scale, temperature, top_k, top_p, *seed)).tokens
    if torch.equal(got, want):
        return
    wide = logits.double() if base is None else base + scale * (logits.double() - base)
    for row in (got != want).nonzero().flatten().tolist():
        one, other = got[row], want[row]
        if temperature == 0:
            assert abs(wide[row, one] - wide[row, other]) <= 4e-7 * wide[row].abs().max()
            continue
        loose = reference.forward(
            Inputs(logits.double(), base, scale, temperature, top_k, min(top_p + 2e-6, 1), *seed)
        ).tokens[row]
        tight = reference.forward(
            Inputs(logits.double(), base, scale, temperature, top_k, max(top_p - 2e-6, 1e-9), *seed)
        ).tokens[row]
        noisy = wide[row] / temperature + gumbel_noise(seed[0], *logits.shape, SAMPLING_STREAM, seed[1])[row]
        assert one in (loose, tight) or abs(noisy[one] - noisy[other]) <= 1e-6 * noisy[other].abs() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "codes"), [(5, 1), (4, 2), (3, 7), (2, 16), (6, 333), (3, 8192), (2, 24704)])
def test_samples_are_the_defined_samples(isa: str, rows: int, codes: int, dtype: torch.dtype) -> None:
    torch.manual_seed(codes)
    logits, unconditional = (3 * torch.randn(2, rows, codes)).to(dtype)
    for guided, temperature, top_k, top_p in (
        (False, 0.0, 0, 1.0),
        (True, 0.0, 3, 0.5),
        (False, 1.0, 0, 1.0),
        (True, 0.3, 1, 1.0),
        (False, 5.0, 200, 1.0),
        (True, 1.0, 4000, 0.999),
        (False, 0.7, 0, 0.9),
        (True, 1.0, 0, 1e-6),
        (False, 1.0, 100, 0.5),
    ):
        base, scale = (unconditional, 2.5) if guided else (None, 1.0)
        agree(logits, base, scale, temperature, top_k, top_p, -12345 - codes)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_logits(data: st.DataObject) -> None:
    """Ties, infinities, huge ranges: whatever a row holds, it is the definition's token."""
    codes = data.draw(st.integers(1, 70))
    value = st.sampled_from([0.0, 1.0, -1.0, 2.5, -torch.inf, 30.0, -300.0, 1e-30, 3e38, -3e38]) | st.floats(
        -8, 8, width=32
    )
    logits = torch.tensor([data.draw(st.lists(value, min_size=codes, max_size=codes))])
    if logits.max() < -1e30 or logits.max() > 1e30:
        logits[0, 0] = 0.5
        logits.clamp_(max=60)
    agree(
        logits,
        None,
        1.0,
        data.draw(st.sampled_from([0.0, 0.7, 1.0])),
        data.draw(st.integers(0, codes)),
        data.draw(st.sampled_from([1.0, 0.95, 0.5, 0.1])),
        data.draw(st.integers(-(2**63), 2**63 - 1)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", masked.SCALES)
def test_guidance_never_draws_what_either_side_rules_out(isa: str, scale: float, dtype: torch.dtype) -> None:
    logits, unconditional, _ = masked.guided(dtype)
    for setting in masked.SETTINGS:
        options = {"seed": 7, "unconditional_logits": unconditional, "guidance_scale": scale, **setting}
        got, want = (sample_tokens(logits, backend=backend, **options) for backend in ("cpu", "reference"))
        assert torch.equal(got, want)


def test_equal_logits_are_kept_together(isa: str) -> None:
    """With k = 2 and three logits in second place, all four are drawn, each as often as its probability says."""
    logits = torch.full((4000, 40), -5.0)
    logits[:, 7] = 2.0
    logits[:, [3, 21, 38]] = 1.0
    tokens = cpu.forward(Inputs(logits, None, 1.0, 1.0, 2, 1.0, 4, 0)).tokens
    counts = torch.bincount(tokens, minlength=40).double()
    expected = torch.where(logits[0] >= 1, logits[0], -torch.inf).softmax(0).double() * 4000
    assert not counts[expected == 0].any()
    kept = expected > 0
    chi_squared = ((counts[kept] - expected[kept]).square() / expected[kept]).sum()
    assert chi_squared < 21.1  # three degrees of freedom: once in ten thousand seeds


def test_rows_and_threads(isa: str) -> None:
    """A row's token depends on its logits and number alone: not on threads, nor on where the row lies in memory."""
    torch.manual_seed(0)
    table = torch.randn(23, 1000)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(cpu.forward(Inputs(table[:, 100:811], None, 1.0, 0.9, 50, 0.9, 1, 0)).tokens)
    finally:
        torch.set_num_threads(threads)
    dense = cpu.forward(Inputs(table[:, 100:811].contiguous(), None, 1.0, 0.9, 50, 0.9, 1, 0)).tokens
    assert all(torch.equal(dense, other) for other in results)
    assert sample_tokens(torch.empty(0, 9), seed=1, backend="cpu").shape == (0,)


def test_nan_is_refused_and_the_choice_is_native() -> None:
    logits = torch.randn(3, 50)
    answer = explain(sample_tokens, logits)
    assert (answer.backend, answer.detail) == ("cpu", native.instruction_set())
    logits[1, 30] = torch.nan
    with pytest.raises(ValueError, match="row 1"):
        sample_tokens(logits, seed=1, backend="cpu")
