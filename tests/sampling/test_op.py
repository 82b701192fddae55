"""Drawing tokens: what is kept, what is drawn how often, compilation, bad input."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.library import opcheck

from dalle_kernels import sample_tokens
from dalle_kernels.noise import SAMPLING_STREAM, gumbel_noise
from tests.sampling import masked


def logits(rows: int = 4, tokens: int = 50) -> torch.Tensor:
    torch.manual_seed(6)
    return 3 * torch.randn(rows, tokens)


def drawn(row: torch.Tensor, **options) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """How often each token is drawn, over 20,000 rows."""
    tokens = sample_tokens(row.expand(20_000, -1), seed=8, **options)
    return torch.bincount(tokens, minlength=row.numel()) / 20_000


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_frequencies_are_those_of_the_softmax(backend: str) -> None:
    row = logits(1, 12)[0]
    frequency = drawn(row, temperature=1.7, backend=backend)
    p = (row / 1.7).softmax(-1)
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / 20_000).sqrt() + 1e-4).all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_top_k_and_top_p_keep_what_they_say(backend: str) -> None:
    row = logits(1, 12)[0]
    assert set(drawn(row, top_k=3, temperature=4.0, backend=backend).nonzero().flatten().tolist()) == set(
        row.topk(3).indices.tolist()
    )
    p, order = row.softmax(-1).sort(descending=True)
    keep = int((p.cumsum(-1) - p < 0.8).sum())
    assert set(drawn(row, top_p=0.8, backend=backend).nonzero().flatten().tolist()) == set(order[:keep].tolist())
    tied = torch.tensor([1.0, 3.0, 3.0, 0.0])
    assert set(drawn(tied, top_k=1, backend=backend).nonzero().flatten().tolist()) == {1, 2}
    assert set(drawn(tied, top_p=0.01, backend=backend).nonzero().flatten().tolist()) == {1, 2}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_it_is_an_argmax_over_the_stated_noise(backend: str) -> None:
    table = logits(6, 101)
    noise = gumbel_noise(torch.tensor(-5), 6, 101, SAMPLING_STREAM)
    assert torch.equal(sample_tokens(table, 0.5, seed=-5, backend=backend), (table / 0.5 + noise).argmax(-1))
    assert torch.equal(sample_tokens(table, temperature=0, backend=backend), table.argmax(-1))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_guidance(backend: str) -> None:
    conditional, free = logits(), logits().flip(0)
    got = sample_tokens(conditional, 0, unconditional_logits=free, guidance_scale=2.5, backend=backend)
    assert torch.equal(got, (free + 2.5 * (conditional - free)).argmax(-1))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("scale", masked.SCALES)
@pytest.mark.parametrize("settings", masked.SETTINGS, ids=str)
def test_guidance_never_draws_what_either_side_rules_out(settings, scale: float, backend: str) -> None:  # type: ignore[no-untyped-def]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        conditional, free, allowed = masked.guided(dtype)
        got = sample_tokens(
            conditional, seed=7, unconditional_logits=free, guidance_scale=scale, backend=backend, **settings
        )
        wide, base = (side if dtype == torch.float64 else side.float() for side in (conditional, free))
        scores = torch.where(allowed, base + scale * (wide - base), -torch.inf)
        assert torch.equal(got, sample_tokens(scores, seed=7, backend="reference", **settings))
        assert allowed[:-1].gather(1, got[:-1, None]).all()
        assert got[-1] == 0


@pytest.mark.parametrize("scale", masked.SCALES)
@pytest.mark.parametrize("settings", masked.SETTINGS, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_row_that_guidance_leaves_empty(backend: str, settings, scale: float) -> None:  # type: ignore[no-untyped-def]
    conditional, free = masked.nothing_to_draw()
    options = {"seed": 7, "unconditional_logits": free, "guidance_scale": scale, **settings}
    assert sample_tokens(conditional, backend=backend, **options).tolist() == [0]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_one_token_or_no_rows_at_any_stride(backend: str) -> None:
    assert sample_tokens(torch.randn(4, 2)[:, ::2], seed=1, backend=backend).tolist() == [0] * 4
    assert sample_tokens(torch.randn(0, 8)[:, ::2], seed=1, backend=backend).shape == (0,)


def test_numbers_of_any_type() -> None:
    table = logits()
    options = {"unconditional_logits": table.flip(0), "backend": "reference"}
    want = sample_tokens(table, 0.5, 7, 0.75, 3, guidance_scale=2.5, **options)
    for real in (np.float16, np.float32, np.float64, Fraction):
        got = sample_tokens(table, real(0.5), np.int64(7), real(0.75), np.int64(3), guidance_scale=real(2.5), **options)
        assert torch.equal(got, want)
    assert torch.equal(sample_tokens(table, top_k=2**80, seed=1), sample_tokens(table, seed=1))
    assert sample_tokens(table, np.float32(0)).equal(table.argmax(-1))
    # Beyond the largest float32, but not once rounded.
    assert torch.equal(sample_tokens(table, 3.40282355e38, seed=1), sample_tokens(table, 3e38, seed=1))


def test_opcheck_and_compile() -> None:
    table, seed = logits(), torch.tensor(3)
    for unconditional, scale, top_k, top_p in ((None, 1.0, 5, 0.9), (table, 2.0, 0, 1.0)):
        scale, temperature, top_p = (torch.tensor(number, dtype=torch.float64) for number in (scale, 0.9, top_p))
        arguments = (table, unconditional, scale, temperature, top_k, top_p, seed, torch.tensor(0), "auto")
        opcheck(torch.ops.dalle_kernels.sample_tokens.default, arguments)
    compiled = torch.compile(lambda t, s: sample_tokens(t, top_k=4, seed=s), fullgraph=True)
    assert torch.equal(compiled(table, seed), sample_tokens(table, top_k=4, seed=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature: got -1.0, wanted 0 or a finite number of at least 1.2e-38"),
        ({"temperature": 1e300}, r"temperature: got 1e\+300, wanted 0 or a finite number of at least 1.2e-38"),
        ({"temperature": 1e-39}, "temperature: got 1e-39, wanted 0 or a finite number of at least 1.2e-38"),
        ({"temperature": 10**400}, "temperature: got 1000"),
        ({"temperature": "1"}, "temperature: got '1'"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"top_k": 2.0}, "top_k: got 2.0"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"top_p": 1e-46}, "top_p: got 1e-46, wanted 0 < top_p <= 1 in float32, or None"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"top_p": "0.5"}, "top_p: got '0.5'"),
        ({"seed": 2**63}, "seed: got 9223372036854775808"),
        ({"guidance_scale": 1e300}, r"guidance_scale: got 1e\+300, wanted a finite number in float32"),
        ({"guidance_scale": float("nan")}, "guidance_scale: got nan"),
        ({"guidance_scale": 3.0}, "unconditional_logits: got None, wanted logits to guide by 3.0"),
        ({"unconditional_logits": torch.zeros(4, 3)}, r"unconditional_logits: got shape \(4, 3\)"),
        ({"unconditional_logits": torch.full((4, 50), torch.nan)}, "unconditional_logits: row 0 holds NaN"),
    ],
)
def test_bad_options_are_refused(options, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        sample_tokens(logits(), **options)


def test_bad_logits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits: got shape \(50,\), wanted 2 dimensions"):
        sample_tokens(logits()[0])
    with pytest.raises(ValueError, match="logits: row 2 holds NaN"):
        sample_tokens(logits().index_fill_(0, torch.tensor([2]), torch.nan))
