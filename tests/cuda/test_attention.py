"""The CUDA attention kernels, run by the emulation, against the reference in float64."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from dalle_kernels import TokenLayout, sparse_attention
from dalle_kernels.attention import cuda, reference
from dalle_kernels.attention.contract import Grads, Inputs, Kept, Needs
from dalle_kernels.attention.cuda import backward
from dalle_kernels.backends import cuda_library
from dalle_kernels.patterns.patterns import (
    AxialRow,
    Causal,
    Column,
    Convolution,
    Fixed,
    MaskPattern,
    Pattern,
    Row,
)
from dalle_kernels.patterns.schedule import schedule_for

LAYOUT = TokenLayout(text_length=70, grid=(9, 11))  # 169 tokens: two row tiles, six column tiles
PATTERNS: list[Pattern] = [
    Row(LAYOUT),
    Column(LAYOUT),
    Convolution(LAYOUT, kernel_size=5),
    Causal(LAYOUT),
    AxialRow(TokenLayout(1, (1, 140))),
    Fixed(200, 16, 2),
    Row(TokenLayout(0, (5, 6))),
]


def _inputs(batch: int, heads: int, length: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length * width)
    return [torch.randn(batch, heads, length, width, generator=generator).to(dtype) for _ in range(3)]


def _check(
    pattern: Pattern,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    padding: torch.Tensor | None = None,
    scale: float | None = None,
) -> None:
    """At most twice the error that PyTorch makes in the same precision, plus a rounding of the result."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = sparse_attention(q, k, v, pattern, scale, padding, return_lse=True, backend="cuda")
    want, want_lse = reference.forward(Inputs(q.double(), k.double(), v.double(), padding, scale, pattern))
    visible = pattern.mask(q.shape[2])
    if padding is not None:
        visible = visible & ~padding[:, None, None]
    scores = (q @ k.mT * scale).masked_fill(~visible, -torch.inf)
    plain = scores.softmax(-1).nan_to_num(0) @ v
    unit = torch.finfo(q.dtype).eps
    allowed = 2 * (plain.double() - want).abs().max() + unit * want.abs().max()
    assert (out.double() - want).abs().max() <= allowed
    finite = want_lse.isfinite()
    assert (lse.isfinite() == finite).all()
    torch.testing.assert_close(lse.double()[finite], want_lse[finite], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward(emulated: Any, pattern: Pattern, dtype: torch.dtype) -> None:
    _check(pattern, *_inputs(1, 2, pattern.length, 32, dtype))


@pytest.mark.parametrize("width", [16, 64, 80, 96, 128])
def test_forward_widths(emulated: Any, width: int) -> None:
    _check(Row(LAYOUT), *_inputs(1, 1, LAYOUT.length, width, torch.bfloat16))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 129, 168])
def test_forward_of_a_prefix(emulated: Any, length: int) -> None:
    _check(Column(LAYOUT), *_inputs(1, 1, length, 32, torch.float16))


def test_forward_with_padding_and_strides_and_aliases(emulated: Any) -> None:
    pattern = Row(LAYOUT)
    joined = torch.randn(2, pattern.length, 3, 2, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    q, k, v = (tensor.transpose(1, 2) for tensor in joined.unbind(2))
    padding = torch.rand(2, pattern.length, generator=torch.Generator().manual_seed(2)) < 0.3
    padding[0, :40] = True  # the first queries see nothing
    _check(pattern, q, k, v, padding)
    _check(pattern, q, q, q, scale=-0.3)
    _check(pattern, q, k, v, scale=0.0)


def test_rows_that_see_nothing(emulated: Any) -> None:
    mask = torch.rand(150, 150, generator=torch.Generator().manual_seed(6)) < 0.05
    mask[10:20] = False
    mask[130:] = False  # and a row tile's rest
    mask[:, 70:] = False
    pattern = MaskPattern(mask)
    q, k, v = _inputs(1, 1, 150, 16, torch.float16)
    _check(pattern, q, k, v)
    out, lse = sparse_attention(q, k, v, pattern, return_lse=True, backend="cuda")
    assert (out[:, :, 130:] == 0).all()
    assert (lse[:, :, 130:] == -torch.inf).all()


@pytest.mark.parametrize("slots", [3, 4, 9])
@pytest.mark.parametrize("multiprocessors", [1, 2])
def test_any_number_of_slots_and_parts(
    emulated: Any, monkeypatch: pytest.MonkeyPatch, slots: int, multiprocessors: int
) -> None:
    bytes_ = slots * cuda._tiles(16).key_slot
    monkeypatch.setattr(cuda_library, "shared_memory", lambda device, blocks: bytes_)
    monkeypatch.setattr(cuda_library, "multiprocessors", lambda device: multiprocessors)
    pattern = Convolution(TokenLayout(130, (16, 16)), kernel_size=7)
    _check(pattern, *_inputs(1, 1, pattern.length, 16, torch.bfloat16))


def _seen_by_few() -> Pattern:
    """Of a warp's 32 rows only the upper half sees the tile of 32 columns two before its own, and of its own only the
    row itself: by rows and by columns."""
    rows, columns = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    two_before = rows // 32 == columns // 32 + 2
    return MaskPattern((rows == columns) | (two_before & (rows % 32 >= 16) & (columns % 32 >= 16)))


def test_what_only_half_of_a_warp_sees(emulated: Any) -> None:
    pattern = _seen_by_few()
    _check(pattern, *_inputs(1, 1, pattern.length, 32, torch.bfloat16))


def test_a_walk_over_other_tiles_than_the_kernels_is_refused(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = cuda._tiles(32)
    monkeypatch.setattr(cuda, "_tiles", lambda width: tiles._replace(columns=64))
    q, k, v = _inputs(1, 1, LAYOUT.length, 32, torch.bfloat16)
    with pytest.raises(RuntimeError, match="masks: got those of tiles of 128 x 64, wanted 128 x 32"):
        sparse_attention(q, k, v, Row(LAYOUT), backend="cuda")


def test_large_scores_do_not_overflow(emulated: Any) -> None:
    q, k, v = _inputs(1, 1, LAYOUT.length, 32, torch.bfloat16)
    _check(Row(LAYOUT), 30 * q, 30 * k, v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_that_rise_from_tile_to_tile(emulated: Any, dtype: torch.dtype) -> None:
    """By less than moves a row's maximum, and by more; rows that fall meanwhile keep theirs."""
    pattern = Causal(TokenLayout(256, (8, 8)))
    q, _, v = _inputs(1, 1, pattern.length, 32, dtype)
    q[..., 1:] = 0
    q[..., 1::2, 0] *= -1
    k = torch.zeros_like(q)
    k[..., 0] = torch.linspace(0, 30, pattern.length)
    _check(pattern, q, k, v, scale=1.0)


def _check_backward(
    pattern: Pattern,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    padding: torch.Tensor | None = None,
    with_lse: bool = False,
) -> None:
    scale = 0.7 * q.shape[-1] ** -0.5
    generator = torch.Generator().manual_seed(11)
    grad_out = torch.randn(q.shape, generator=generator).to(q.dtype)
    wide = [tensor.double() for tensor in (q, k, v)]
    want_out, want_lse = reference.forward(Inputs(*wide, padding, scale, pattern))
    grad_lse = torch.randn(want_lse.shape, generator=generator) if with_lse else None
    out = want_out.to(q.dtype)
    kept = Kept(q, k, v, out, want_lse.float(), padding, scale, pattern)
    got = backward(Grads(grad_out, grad_lse), kept, Needs(True, True, True))
    want = reference.backward(
        Grads(grad_out.double(), grad_lse),
        Kept(*wide, want_out, want_lse, padding, scale, pattern),
        Needs(True, True, True),
    )
    # Plain PyTorch in the inputs' own precision.
    visible = pattern.mask(q.shape[2])
    if padding is not None:
        visible = visible & ~padding[:, None, None]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (q, k, v)]
    scores = (leaves[0] @ leaves[1].mT * scale).masked_fill(~visible, -torch.inf)
    seen = visible.any(-1, keepdim=True)
    plain = torch.where(seen, scores.masked_fill(~seen, 0).softmax(-1), 0) @ leaves[2]
    loss = (plain * grad_out).sum()
    if grad_lse is not None:
        lse = scores.logsumexp(-1).masked_fill(~seen[..., 0], 0)
        loss = loss + (lse * grad_lse.to(q.dtype)).sum()
    unit = torch.finfo(q.dtype).eps
    for ours, theirs, exact in zip(got, torch.autograd.grad(loss, leaves), want, strict=True):
        allowed = 2 * (theirs.double() - exact).abs().max() + unit * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backward(emulated: Any, pattern: Pattern, dtype: torch.dtype) -> None:
    _check_backward(pattern, *_inputs(1, 2, pattern.length, 32, dtype))


@pytest.mark.parametrize("width", [16, 64, 80, 96, 128])
def test_backward_widths(emulated: Any, width: int) -> None:
    _check_backward(Row(LAYOUT), *_inputs(1, 1, LAYOUT.length, width, torch.bfloat16))


@pytest.mark.parametrize("length", [1, 63, 65, 129])
def test_backward_of_a_prefix(emulated: Any, length: int) -> None:
    _check_backward(Column(LAYOUT), *_inputs(1, 1, length, 32, torch.float16), with_lse=True)


def test_backward_with_padding_strides_and_a_gradient_of_the_log_sum_exp(emulated: Any) -> None:
    pattern = Row(LAYOUT)
    joined = torch.randn(2, pattern.length, 3, 2, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    q, k, v = (tensor.transpose(1, 2) for tensor in joined.unbind(2))
    padding = torch.rand(2, pattern.length, generator=torch.Generator().manual_seed(2)) < 0.3
    padding[0, :40] = True
    _check_backward(pattern, q, k, v, padding, with_lse=True)


def test_backward_where_half_of_a_warp_sees_something(emulated: Any) -> None:
    pattern = _seen_by_few()
    _check_backward(pattern, *_inputs(1, 1, pattern.length, 32, torch.bfloat16))


def test_a_padded_key_whose_weights_overflow(emulated: Any) -> None:
    pattern = Causal(LAYOUT)
    q, k, v = _inputs(1, 1, pattern.length, 32, torch.bfloat16)
    padding = torch.zeros(1, pattern.length, dtype=torch.bool)
    padding[0, [3, 70, 100]] = True
    k[:, :, padding[0]] = 1e4 * q.mean(2, keepdim=True).sign()
    _check_backward(pattern, q, k, v, padding)


@pytest.mark.parametrize("width", [32, 80])
def test_backward_where_tiles_and_their_transposes_would_have_other_orders(emulated: Any, width: int) -> None:
    pattern = Column(TokenLayout(1, (16, 15)))
    orders = [schedule_for(pattern, tile, pattern.length).order for tile in ((128, 32), (32, 128))]
    assert not orders[0].equal(orders[1])
    _check_backward(pattern, *_inputs(1, 1, pattern.length, width, torch.bfloat16), with_lse=True)


@pytest.mark.parametrize("needs", [needs for needs in product((False, True), repeat=3) if not all(needs)], ids=str)
def test_gradients_that_nobody_asked_for_are_not_made(
    emulated: Any, monkeypatch: pytest.MonkeyPatch, needs: tuple[bool, bool, bool]
) -> None:
    q, k, v = _inputs(1, 2, LAYOUT.length, 32, torch.bfloat16)
    outputs = sparse_attention(q, k, v, Row(LAYOUT), return_lse=True, backend="cuda")
    kept = Kept(q, k, v, *outputs, None, 0.2, Row(LAYOUT))
    grads = Grads(outputs[0], outputs[1])
    everything = backward(grads, kept, Needs(True, True, True))
    asked: list[str] = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return getattr(emulated, name)

    monkeypatch.setattr(cuda_library, "operations", Spy)
    for got, whole, need in zip(backward(grads, kept, Needs(*needs)), everything, needs, strict=True):
        assert (got is not None) == need
        assert got is None or got.equal(whole)
    assert ("attention_backward_queries" in asked) == needs[0]
    assert ("attention_backward_keys" in asked) == (needs[1] or needs[2])
    assert ("attention_statistics" in asked) == any(needs)


def test_gradients_through_the_public_operation_and_every_time_the_same(emulated: Any) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in _inputs(1, 2, LAYOUT.length, 32, torch.bfloat16))
    runs = []
    for _ in range(2):
        out, lse = sparse_attention(q, k, v, Column(LAYOUT), return_lse=True, backend="cuda")
        runs.append(torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)))
    for first, second in zip(*runs, strict=True):
        assert first.equal(second)
        assert first.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 2), (2, 0)])
@pytest.mark.parametrize("padded", [False, True])
def test_no_samples_and_no_heads(emulated: Any, shape: tuple[int, int], padded: bool) -> None:
    q, k, v = (torch.randn(*shape, LAYOUT.length, 32).bfloat16().requires_grad_() for _ in range(3))
    padding = torch.zeros(shape[0], LAYOUT.length, dtype=torch.bool) if padded else None
    out, lse = sparse_attention(q, k, v, Row(LAYOUT), None, padding, return_lse=True, backend="cuda")
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    gradients = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    assert all(gradient.shape == q.shape for gradient in gradients)
    (only,) = torch.autograd.grad(sparse_attention(q, k, v, Row(LAYOUT), None, padding, backend="cuda").sum(), (k,))
    assert only.shape == k.shape


def test_calls_that_the_kernels_do_not_serve_are_refused(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 1, LAYOUT.length, 24).half()
    with pytest.raises(ValueError, match="it takes head dimensions 16, 32, 64, 80, 96, 128, not 24"):
        sparse_attention(q, q, q, Row(LAYOUT), backend="cuda")
    q = torch.randn(1, 1, LAYOUT.length, 128).half()
    monkeypatch.setattr(cuda_library, "shared_memory", lambda device, blocks: 101_376 // blocks)  # sm_86, 89, 120
    assert sparse_attention(*3 * [q.bfloat16()], Row(LAYOUT), backend="cuda").isfinite().all()
    monkeypatch.setattr(cuda_library, "shared_memory", lambda device, blocks: 49_152 // blocks)
    with pytest.raises(ValueError, match="it needs 52992 bytes of shared memory a block at this head dimension"):
        sparse_attention(q, q, q, Row(LAYOUT), backend="cuda")
    q = torch.randn(1, 1, LAYOUT.length, 32)
    with pytest.raises(ValueError, match=r"it takes bfloat16, float16, not torch\.float32"):
        sparse_attention(q, q, q, Row(LAYOUT), backend="cuda")
