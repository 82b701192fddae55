"""The CUDA Gumbel kernels, run by the emulation, against the reference in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dalle_kernels import gumbel_lookup, vq_lookup
from dalle_kernels.codebook.gumbel import cuda, reference
from dalle_kernels.codebook.gumbel.contract import Grads, Inputs, Kept, Needs
from dalle_kernels.noise import GUMBEL_STREAM, gumbel_noise
from tests.codebook import offsets

MODES = [(False, True), (True, True), (True, False)]  # (hard, noise)


def _inputs(rows: int, codes: int, width: int, dtype: torch.dtype) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(rows * codes + width)
    logits = (3 * torch.randn(rows, codes, generator=generator)).to(dtype)
    return (
        logits,
        torch.randn(codes, width, generator=generator).to(dtype),
        torch.tensor(0.7),
        (-(2**40) + 5, 2**32 - 20),
    )


def _check_forward(rows: int, codes: int, width: int, dtype: torch.dtype, hard: bool, noise: bool) -> None:
    logits, codebook, temperature, seed = _inputs(rows, codes, width, dtype)
    got = cuda.forward(Inputs(logits, codebook, temperature, hard, noise, *seed))
    want = reference.forward(Inputs(logits.double(), codebook.double(), temperature, hard, noise, *seed))
    noisy = logits.float() + (gumbel_noise(seed[0], rows, codes, GUMBEL_STREAM, seed[1]) if noise else 0)
    best = noisy.gather(1, torch.stack([got[1], want[1]], dim=1))
    assert ((got[1] == want[1]) | (best[:, 0] - best[:, 1] > -1e-5)).all()  # equal but for scores within rounding
    if not noise:
        assert got[1].equal(noisy.argmax(-1))  # the first of equal ones
    mixture, exact = (got[6], want[6]) if hard else (got[0], want[0])
    plain = ((noisy / temperature).to(dtype).softmax(-1) @ codebook).double()
    unit = torch.finfo(dtype).eps
    assert (mixture.double() - exact).abs().max() <= 2 * (plain - exact).abs().max() + unit * exact.abs().max()
    if hard:
        assert got[0].equal(codebook[got[1]])
    for ours, theirs in zip(got[2:6], want[2:6], strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("hard", "noise"), MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_forward(emulated: Any, hard: bool, noise: bool, dtype: torch.dtype) -> None:
    _check_forward(70, 160, 32, dtype, hard, noise)


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("codes", [1, 3, 127, 130, 256])
def test_forward_of_any_number_of_codes(emulated: Any, width: int, codes: int) -> None:
    _check_forward(5, codes, width, torch.bfloat16, False, True)


def _check_backward(
    rows: int, codes: int, width: int, dtype: torch.dtype, hard: bool, noise: bool, latents: bool, kl: bool
) -> None:
    inputs = _inputs(rows, codes, width, dtype)
    logits, codebook, temperature, seed = inputs
    generator = torch.Generator().manual_seed(1)
    grad_latents = torch.randn(rows, width, generator=generator).to(dtype) if latents else None
    grad_kl = torch.randn(rows, generator=generator) if kl else None
    kept = cuda.forward(Inputs(logits, codebook, temperature, hard, noise, *seed))
    got = cuda.backward(Grads(grad_latents, grad_kl), Kept(*inputs[:3], hard, noise, *seed, *kept), Needs(True, True))
    wide = logits.double(), codebook.double()
    exact = reference.forward(Inputs(*wide, temperature, hard, noise, *seed))
    want = reference.backward(
        Grads(None if grad_latents is None else grad_latents.double(), grad_kl),
        Kept(*wide, temperature, hard, noise, *seed, *exact),
        Needs(True, True),
    )
    # 16 bits: what float32 arithmetic on results rounded to them allows; y and dL enter products rounded.
    # float32: an exponent of size E that is rounded a few times leaves y wrong by E eps of itself, and d - delta, which
    # y multiplies, may cancel.
    unit = torch.finfo(dtype).eps
    floor, reach = 1e-6, [theirs.abs().max() for theirs in want]
    if dtype == torch.float32:
        noisy = logits + (gumbel_noise(seed[0], rows, codes, GUMBEL_STREAM, seed[1]) if noise else 0)
        unit *= float((noisy / temperature).abs().max() / math.log(2)) / 4
        floor = 0.0
        if grad_latents is not None:
            reach[0] += 2 * (grad_latents.double() @ codebook.double().T).abs().max() / temperature
    for ours, theirs, largest in zip(got, want, reach, strict=True):
        assert ours.isfinite().all()
        assert (ours.double() - theirs).abs().max() <= 4 * unit * largest + floor


@pytest.mark.parametrize(("hard", "noise"), MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_backward(emulated: Any, hard: bool, noise: bool, dtype: torch.dtype) -> None:
    _check_backward(70, 160, 32, dtype, hard, noise, latents=True, kl=True)


@pytest.mark.parametrize(("latents", "kl"), [(True, False), (False, True)])
def test_backward_of_one_output(emulated: Any, latents: bool, kl: bool) -> None:
    _check_backward(20, 64, 32, torch.bfloat16, False, True, latents, kl)


@pytest.mark.parametrize(("codes", "width"), [(1, 32), (131, 64), (256, 128), (3, 256), (131, 256), (256, 256)])
def test_backward_shapes(emulated: Any, codes: int, width: int) -> None:
    _check_backward(9, codes, width, torch.bfloat16, False, True, latents=True, kl=True)


@pytest.mark.parametrize(("codes", "width"), [(131, 64), (3, 128), (256, 128)])
def test_float32_shapes(emulated: Any, codes: int, width: int) -> None:
    _check_forward(70, codes, width, torch.float32, False, True)
    _check_backward(150, codes, width, torch.float32, False, True, latents=True, kl=True)


@pytest.mark.parametrize(("hard", "noise"), MODES)
@pytest.mark.parametrize(
    ("width", "dtype"), [(32, torch.bfloat16), (32, torch.float32), (64, torch.float16), (256, torch.bfloat16)]
)
def test_backward_past_its_loop_over_rows(
    emulated: Any, width: int, dtype: torch.dtype, hard: bool, noise: bool
) -> None:
    # Two steps of 128 rows and a tail; two blocks' codes and a tail.
    _check_backward(300, 300 if dtype == torch.bfloat16 and width == 32 else 150, width, dtype, hard, noise, True, True)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("width", [32, 256])
def test_backward_in_shares_of_rows(emulated: Any, width: int, hard: bool) -> None:
    _check_backward(600, 32, width, torch.float16, hard, True, latents=True, kl=False)


@pytest.mark.parametrize("use", ["latents", "kl", "both"])
@pytest.mark.parametrize(("width", "dtype", "hard"), [(32, torch.bfloat16, False), (64, torch.float32, True)])
def test_gradients_that_nobody_asked_for_are_not_made(
    emulated: Any, width: int, dtype: torch.dtype, hard: bool, use: str
) -> None:
    """Those asked for have the bits they have among all; the codebook's alone reads no codebook. One stage and two."""
    logits, codebook, temperature, seed = _inputs(140, 70, width, dtype)
    settings = (temperature, hard, True, *seed)
    kept = Kept(logits, codebook, *settings, *cuda.forward(Inputs(logits, codebook, *settings)))
    grads = Grads(
        None if use == "kl" else torch.randn(140, width).to(dtype), None if use == "latents" else logits[:, 0].float()
    )
    both = cuda.backward(grads, kept, Needs(True, True))
    unread = kept._replace(codebook=torch.full_like(codebook, torch.nan))
    for needs, given in ((Needs(True, False), kept), (Needs(False, True), unread), (Needs(False, False), unread)):
        for gradient, whole, need in zip(cuda.backward(grads, given, needs), both, needs, strict=True):
            assert (gradient is not None) == need
            assert gradient is None or torch.equal(gradient, whole)


@pytest.mark.parametrize("mask", offsets.MASKS)
@pytest.mark.parametrize(("hard", "noise"), MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_far_from_zero(emulated: Any, dtype: torch.dtype, hard: bool, noise: bool, mask: str) -> None:
    def lookup(logits, codebook, hard, noise):  # type: ignore[no-untyped-def]
        return gumbel_lookup(logits, codebook, offsets.TAU, hard, noise, 5, "cuda")

    offsets.check(lookup, dtype, mask, hard, noise)


def test_through_the_public_operation(emulated: Any) -> None:
    logits, codebook, _, seed = _inputs(24, 100, 32, torch.bfloat16)
    wide = torch.nn.functional.pad(logits, (0, 7))[:, :100].reshape(2, 12, 100).requires_grad_()
    codebook.requires_grad_()
    runs = []
    for backend in ("cuda", "reference", "cuda"):
        latents, indices, kl = gumbel_lookup(wide, codebook, 0.9, seed=seed[0], backend=backend)
        loss = latents.float().square().sum() + kl.sum()
        runs.append((latents, indices, *torch.autograd.grad(loss, (wide, codebook))))
    for ours, theirs, again in zip(*runs, strict=True):
        assert ours.equal(again)
        # Both round to bfloat16 on the way: latents (about 3 here) before they are squared, and the gradients after.
        torch.testing.assert_close(ours, theirs, atol=0.1, rtol=0.05)


def test_an_empty_batch(emulated: Any) -> None:
    logits, codebook, _, seed = _inputs(0, 64, 32, torch.float16)
    codebook.requires_grad_()
    latents, indices, kl = gumbel_lookup(logits.requires_grad_(), codebook, 1.0, seed=seed[0], backend="cuda")
    assert (latents.shape, indices.shape, kl.shape) == ((0, 32), (0,), (0,))
    assert (torch.autograd.grad(latents.sum(), codebook)[0] == 0).all()


def test_one_code_or_no_rows_at_any_stride(emulated: Any) -> None:
    wide, codebook, _, seed = _inputs(4, 2, 32, torch.float16)
    wide.requires_grad_()
    codebook = codebook[:1].requires_grad_()
    latents, indices, kl = gumbel_lookup(wide[:, ::2], codebook, 1.0, seed=seed[0], backend="cuda")
    assert indices.tolist() == [0] * 4
    torch.testing.assert_close(kl, torch.zeros_like(kl), atol=1e-6, rtol=0)
    torch.testing.assert_close(latents, codebook.expand(4, 32))
    dlogits, dcodebook = torch.autograd.grad(latents.sum() + kl.sum(), (wide, codebook))
    torch.testing.assert_close(dlogits, torch.zeros_like(wide), atol=1e-5, rtol=0)
    torch.testing.assert_close(dcodebook, torch.full_like(codebook, 4))
    logits, codebook, _, seed = _inputs(0, 8, 32, torch.float16)
    latents, indices, kl = gumbel_lookup(logits[:, ::2], codebook[:4], 1.0, seed=seed[0], backend="cuda")
    assert (latents.shape, indices.shape, kl.shape) == ((0, 32), (0,), (0,))


def test_what_the_kernels_do_not_serve_is_refused(emulated: Any) -> None:
    logits, codebook, _, _ = _inputs(4, 64, 48, torch.float16)
    with pytest.raises(ValueError, match=r"it takes torch\.float16 codebooks of widths 32, 64, 128, 256, not 48"):
        gumbel_lookup(logits, codebook, 1.0, backend="cuda")
    logits, codebook, _, _ = _inputs(4, 64, 256, torch.float32)
    with pytest.raises(ValueError, match=r"it takes torch\.float32 codebooks of widths 32, 64, 128, not 256"):
        gumbel_lookup(logits, codebook, 1.0, backend="cuda")
    logits, codebook, _, _ = _inputs(4, 64, 128, torch.bfloat16)  # the emulated machine has 104,448 bytes
    with pytest.raises(ValueError, match=r"needs 139264 bytes of shared memory a block.*here are 104448"):
        gumbel_lookup(logits, codebook, 1.0, backend="cuda")
    with pytest.raises(ValueError, match="there is no cuda kernel for vq_lookup"):
        vq_lookup(codebook, codebook, backend="cuda")
