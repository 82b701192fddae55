"""`row_offset`: a part of a batch draws what the whole batch draws there, in every operation and backend.

tests/cuda has the same for the CUDA kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dalle_kernels import gumbel_lookup, gumbel_projection_lookup, sample_tokens, vq_lookup
from dalle_kernels.noise import GUMBEL_STREAM, HEAD_STEP, SAMPLING_STREAM, VQ_STREAM, gumbel_noise

ROWS, CODES = 70, 37
# The low word of a row overflows within the batch; rows beyond 2^32; the last rows before the sign.
OFFSETS = [1, 2**32 - 30, 2**40 + 12345, 2**63 - ROWS]
SEED = -(2**61) - 3


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def backend_of(name: str) -> str:
    if name == "triton":
        pytest.importorskip("triton")
    return name


def gumbel(rows: slice, backend: str, dtype: torch.dtype, row_offset: Any) -> tuple[torch.Tensor, ...]:
    """Latents, indices, kl and the logits' gradient of some rows of one batch."""
    logits = randn(ROWS, CODES, dtype=dtype)[rows].requires_grad_()
    codebook = randn(CODES, 16, seed=1, dtype=dtype)
    latents, indices, kl = gumbel_lookup(logits, codebook, 0.8, seed=SEED, row_offset=row_offset, backend=backend)
    loss = (latents * randn(ROWS, 16, seed=2, dtype=dtype)[rows]).sum() + kl.sum()
    return latents.detach(), indices, kl.detach(), *torch.autograd.grad(loss, logits)


def projection(rows: slice, backend: str, dtype: torch.dtype, row_offset: Any) -> tuple[torch.Tensor, ...]:
    features = randn(ROWS, 8, dtype=dtype)[rows].requires_grad_()
    weight, codebook = randn(CODES, 8, seed=1, dtype=dtype), randn(CODES, 16, seed=2, dtype=dtype)
    latents, indices, kl = gumbel_projection_lookup(
        features, weight, None, codebook, 0.8, seed=SEED, row_offset=row_offset, backend=backend
    )
    loss = (latents * randn(ROWS, 16, seed=3, dtype=dtype)[rows]).sum() + kl.sum()
    return latents.detach(), indices, kl.detach(), *torch.autograd.grad(loss, features)


def vq(rows: slice, backend: str, dtype: torch.dtype, row_offset: Any) -> tuple[torch.Tensor, ...]:
    features, codebook = randn(3, ROWS, 6, dtype=dtype)[:, rows], randn(3, CODES, 6, seed=1, dtype=dtype)
    settings = {"temperature": 3.0, "seed": SEED, "row_offset": row_offset, "backend": backend}
    drawn = [vq_lookup(features, codebook, k=k, **settings)[1] for k in (None, 4)]  # type: ignore[call-overload]
    return tuple(indices.movedim(0, 1) for indices in drawn)


def tokens(rows: slice, backend: str, dtype: torch.dtype, row_offset: Any) -> tuple[torch.Tensor, ...]:
    logits = randn(ROWS, CODES, dtype=dtype)[rows]
    settings = {"seed": SEED, "row_offset": row_offset, "backend": backend}
    # The interpreter takes a second a row to find a threshold, and noise is the same with and without.
    filters = ({},) if backend == "triton" else ({}, {"top_k": 5}, {"top_p": 0.9})
    return tuple(sample_tokens(logits, 1.2, **chosen, **settings) for chosen in filters)


CASES = {
    "gumbel": (gumbel, ("reference", "cpu", "triton")),
    "projection": (projection, ("reference", "cpu", "triton")),
    "vq": (vq, ("reference", "cpu")),
    "tokens": (tokens, ("reference", "cpu", "triton")),
}


def check_parts(draw: Callable[[slice, Any], tuple[torch.Tensor, ...]], offset: int, exact: bool) -> None:
    whole = draw(slice(None), offset)
    for part, number in ((slice(0, 3), int), (slice(3, ROWS), torch.tensor)):
        for mine, all_of_them in zip(draw(part, number(offset + part.start)), whole, strict=True):
            if exact or not mine.is_floating_point():
                assert torch.equal(mine, all_of_them[part])
            else:
                torch.testing.assert_close(mine, all_of_them[part])


@pytest.mark.parametrize(("case", "backend"), [(case, name) for case, (_, names) in CASES.items() for name in names])
@pytest.mark.parametrize("offset", OFFSETS)
def test_parts_draw_what_the_whole_draws(case: str, backend: str, offset: int) -> None:
    """Every bit of it, but for the reference's products, whose matrix has another size, and the interpreter's."""
    draw, name = CASES[case][0], backend_of(backend)
    exact = backend == "cpu" or (backend == "triton" and torch.cuda.is_available())
    check_parts(lambda rows, row_offset: draw(rows, name, torch.float32, row_offset), offset, exact=exact)


@pytest.mark.parametrize("case", ["gumbel", "projection", "vq", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_instruction_sets(case: str, dtype: torch.dtype, isa: str) -> None:
    check_parts(lambda rows, first: CASES[case][0](rows, "cpu", dtype, first), 2**32 - 30, exact=True)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_backends_agree(backend: str, offset: int) -> None:
    for case, (draw, names) in CASES.items():
        if backend in names:
            got = draw(slice(None), backend_of(backend), torch.float32, offset)
            want = draw(slice(None), "reference", torch.float32, offset)
            for ours, theirs in zip(got, want[: len(got)], strict=True):
                torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5, msg=lambda text, case=case: case + text)


@pytest.mark.parametrize("stream", [GUMBEL_STREAM, SAMPLING_STREAM, VQ_STREAM, VQ_STREAM + 2 * HEAD_STEP])
def test_the_noise_of_a_part(stream: int) -> None:
    for offset in (0, *OFFSETS):
        whole = gumbel_noise(torch.tensor(SEED), 9, 13, stream, offset)
        part = gumbel_noise(torch.tensor(SEED), 4, 13, stream, torch.tensor(offset + 5))
        assert torch.equal(whole[5:], part)


def test_the_noise_of_some_codes_of_each_quarter() -> None:
    whole = gumbel_noise(SEED, 5, 24, GUMBEL_STREAM, 3).unflatten(1, (4, 6))
    part = gumbel_noise(SEED, 5, 12, GUMBEL_STREAM, 3, counter_offset=2)
    assert torch.equal(part.unflatten(1, (4, 3)), whole[:, :, 2:5])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("room", ["gumbel", "projection"])
def test_codes_of_each_quarter_draw_as_in_the_whole_codebook(room: str, backend: str) -> None:
    """Some codes of each quarter alone, and the whole codebook in which -inf rules the others out."""
    from dalle_kernels.codebook.gumbel import op as gumbel_op
    from dalle_kernels.codebook.projection import op as projection_op

    codes, first, share = 4 * 40, 3, 37
    kept = torch.arange(codes).view(4, -1)[:, first : first + share].flatten()
    backend_of(backend)
    features, weight, codebook = randn(9, 8), randn(codes, 8, seed=1), randn(codes, 16, seed=2)
    bias = torch.full((codes,), -torch.inf)
    bias[kept] = randn(len(kept), seed=3)

    def call(places: torch.Tensor | slice, counter_offset: int) -> tuple[torch.Tensor, ...]:
        of_noise = 0.7, False, True, SEED, 5
        mine = features.clone().requires_grad_()
        table = codebook[places].clone().requires_grad_()
        if room == "gumbel":
            logits = mine @ weight[places].T + bias[places]
            made = gumbel_op._ENTRY(gumbel_op.Inputs(logits, table, *of_noise, counter_offset), backend)
        else:
            layer = mine, weight[places], bias[places], table
            made = projection_op._ENTRY(projection_op.Inputs(*layer, *of_noise, False, False, counter_offset), backend)
        (made.latents * randn(9, 16, seed=4)).sum().backward()
        return made.latents.detach(), made.indices, made.log_noisy.detach(), mine.grad, table.grad

    part, whole = call(kept, first), call(slice(None), 0)
    torch.testing.assert_close(part[0], whole[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(kept[part[1]], whole[1])
    for mine, theirs in ((part[2], whole[2]), (part[3], whole[3]), (part[4], whole[4][kept])):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


def test_heads_draw_by_themselves() -> None:
    """A head's noise is what its stream says, whatever the number of rows and heads."""
    features, codebook = randn(3, 40, 6), randn(3, CODES, 6, seed=1)
    for backend in ("reference", "cpu"):
        indices = vq_lookup(features, codebook, backend, temperature=5.0, seed=7, row_offset=2**33)[1]
        for head in range(3):
            noise = gumbel_noise(torch.tensor(7), 40, CODES, VQ_STREAM + head * HEAD_STEP, 2**33)
            scores = -torch.cdist(features[head].double(), codebook[head].double()).square() + 5.0 * noise
            assert torch.equal(indices[head], scores.argmax(-1))


def test_compiled_and_vmapped() -> None:
    """One graph serves every offset."""
    logits, codebook = randn(6, 33), randn(33, 8, seed=1)

    def both(row_offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents, indices, _ = gumbel_lookup(logits, codebook, 1.0, seed=3, row_offset=row_offset)
        return latents, indices + sample_tokens(logits, seed=4, row_offset=row_offset)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    offsets = torch.tensor([0, 2**35])
    for offset in offsets:
        for got, want in zip(compiled(offset), both(offset), strict=True):
            assert torch.equal(got, want)
    for got, *want in zip(torch.vmap(both)(offsets), *(both(offset) for offset in offsets), strict=True):
        assert torch.equal(got, torch.stack(want))


@pytest.mark.parametrize(
    ("row_offset", "message"),
    [
        (-1, r"row_offset: got -1, wanted an int from 0 to 2\*\*63 - 1"),
        (2**63, "row_offset: got 9223372036854775808"),
        (1.0, "row_offset: got 1.0"),
        (torch.tensor(1.0), "row_offset: got torch.float32 of shape"),
        (torch.tensor([1, 2]), r"row_offset: got torch.int64 of shape \(2,\), wanted one int64"),
    ],
)
def test_bad_offsets(row_offset: Any, message: str) -> None:
    for call in (
        lambda: gumbel_lookup(randn(2, 5), randn(5, 3), 1.0, row_offset=row_offset),
        lambda: gumbel_projection_lookup(randn(2, 4), randn(5, 4), None, randn(5, 3), 1.0, row_offset=row_offset),
        lambda: vq_lookup(randn(2, 3), randn(5, 3), temperature=1.0, row_offset=row_offset),
        lambda: sample_tokens(randn(2, 5), row_offset=row_offset),
    ):
        with pytest.raises(ValueError, match=message):
            call()
