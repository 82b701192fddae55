"""Drawing tokens: what is kept, what is drawn how often, compilation, bad input."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from dalle_kernels import sample_tokens
from dalle_kernels.noise import SAMPLING_STREAM, gumbel_noise


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


def test_opcheck_and_compile() -> None:
    table, seed = logits(), torch.tensor(3)
    opcheck(torch.ops.dalle_kernels.sample_tokens.default, (table, None, 1.0, 0.9, 5, 0.9, seed, "auto"))
    opcheck(torch.ops.dalle_kernels.sample_tokens.default, (table, table, 2.0, 0.9, 0, 1.0, seed, "auto"))
    compiled = torch.compile(lambda t, s: sample_tokens(t, top_k=4, seed=s), fullgraph=True)
    assert torch.equal(compiled(table, seed), sample_tokens(table, top_k=4, seed=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature: got -1.0, wanted a finite number >= 0"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
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
