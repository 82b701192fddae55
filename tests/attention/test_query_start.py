"""Queries for a run of the tokens: the rows of the whole, forward and backward, by every backend that serves them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.library import opcheck
from torch.nn.attention.bias import causal_lower_right

from dalle_kernels import (
    Causal,
    Column,
    Convolution,
    KVCache,
    MaskPattern,
    Pattern,
    Row,
    TokenLayout,
    explain,
    sparse_attention,
)
from dalle_kernels.attention import cpu, cuda
from dalle_kernels.attention.contract import Inputs
from dalle_kernels.backends.contract import Call
from dalle_kernels.patterns.schedule import Schedule, schedule_for
from tests.oracles import attention, every_pattern

LAYOUT = TokenLayout(37, (9, 10))
RUNS = [(0, 1), (0, 64), (5, 31), (30, 97), (64, 63), (63, 64), (126, 1), (1, 126)]
BACKENDS = ["reference", *(["cpu"] if cpu.refuse(Call(torch.device("cpu"), torch.float32, 16)) is None else [])]


def leaves(pattern: Pattern, width: int = 16, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 2, pattern.length, width, dtype=dtype, requires_grad=True) for _ in range(3)]


def check(
    pattern: Pattern,
    start: int,
    count: int,
    backend: str,
    padded: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> None:
    """Out, log-sum-exps and gradients as float64 has them of the dense mask's rows."""
    q, k, v = (leaf.detach().to(device).requires_grad_() for leaf in leaves(pattern, dtype=dtype))
    padding = torch.rand(2, pattern.length, device=device) < 0.3 if padded else None
    asked = q[:, :, start : start + count]
    got = sparse_attention(
        asked, k, v, pattern, key_padding_mask=padding, return_lse=True, backend=backend, query_start=start
    )
    wide = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    rows = pattern.mask()[start : start + count]
    want = attention(wide[0][:, :, start : start + count], *wide[1:], rows, key_padding_mask=padding)
    seen = want[1].isfinite()
    assert got[0].shape == asked.shape
    assert got[1].shape == asked.shape[:3]
    assert torch.equal(got[1].isfinite(), seen)
    grads = torch.randn_like(want[0]), torch.randn_like(want[1]) * seen
    given = grads[0].to(got[0].dtype), grads[1].to(got[1].dtype)
    results = [got[0], got[1].where(seen, 0), *torch.autograd.grad(got, [q, k, v], given)]
    truth = [want[0], want[1].where(seen, 0)]
    truth += torch.autograd.grad(truth, wide, grads)
    tolerance = 3e-5 if dtype == torch.float32 else 3e-2
    for name, one, other in zip(("out", "lse", "dq", "dk", "dv"), results, truth, strict=True):
        size = other.abs().max().clamp(min=1)
        assert (one.double() - other).abs().max() <= tolerance * size, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", every_pattern(LAYOUT), ids=str)
def test_every_pattern(pattern: Pattern, backend: str) -> None:
    for start, count in RUNS if backend == "cpu" else RUNS[:3]:
        check(pattern, start, min(count, pattern.length - start), backend)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_instruction_sets_and_padding(isa: str, run: tuple[int, int], dtype: torch.dtype) -> None:
    for pattern in (Row(LAYOUT), Column(LAYOUT)):
        check(pattern, *run, "cpu", dtype=dtype)
        check(pattern, *run, "cpu", padded=True, dtype=dtype)


@pytest.mark.parametrize("heads", [1, 9])
def test_bits_do_not_depend_on_threads(heads: int) -> None:
    layout = TokenLayout(200, (24, 24))
    pattern, before = Column(layout), torch.get_num_threads()
    q, k, v = (torch.randn(1, heads, layout.length, 16, requires_grad=True) for _ in range(3))
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            out = sparse_attention(q[:, :, 100:700], k, v, pattern, query_start=100)
            results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("tile", [(64, 64), (32, 96)])
def test_schedules_count_the_rows_that_are_asked_for(tile: tuple[int, int], run: tuple[int, int]) -> None:
    start, count = run
    for pattern in every_pattern(LAYOUT):
        stop = min(start + count, pattern.length)
        schedule = Schedule.build(pattern, tile, queries=(start, stop))
        rows, columns = tile
        mask = torch.zeros(-(-(stop - start) // rows) * rows, -(-pattern.length // columns) * columns, dtype=torch.bool)
        for query_tile in range(len(schedule.key_offsets) - 1):
            for entry in range(*schedule.key_offsets[query_tile : query_tile + 2].tolist()):
                words = schedule.masks[schedule.mask_ids[entry]]
                bits = (words[:, :, None] >> torch.arange(32)) & 1
                key = int(schedule.key_tiles[entry]) * columns
                block = bits.reshape(rows, columns).bool()
                mask[query_tile * rows : (query_tile + 1) * rows, key : key + columns] = block
        by_token = torch.zeros(stop - start, pattern.length, dtype=torch.bool)
        seen = mask[: stop - start, : pattern.length]
        by_token[schedule.query_order.long()[:, None], schedule.order.long()] = seen
        assert torch.equal(by_token, pattern.mask()[start:stop])
        assert schedule.visible_pairs == int(pattern.mask()[start:stop].sum())
        assert schedule.executed_pairs == len(schedule.key_tiles) * rows * columns
        assert sorted(schedule.query_order.tolist()) == list(range(stop - start))


def test_a_part_costs_its_part() -> None:
    pattern = Row(TokenLayout(256, (32, 32)))
    whole = schedule_for(pattern, (64, 64))
    parts = [schedule_for(pattern, (64, 64), queries=(start, start + 256)) for start in range(0, 1280, 256)]
    assert sum(part.visible_pairs for part in parts) == whole.visible_pairs
    assert sum(part.executed_pairs for part in parts) == whole.executed_pairs  # in raster order, whole tiles a part
    assert repr(parts[0]).startswith(f"Schedule({pattern}, 1280 tokens, 256 queries, ")
    with pytest.raises(ValueError, match=r"queries: got \(5, 5\), wanted first and stop of a run of the 1280 tokens"):
        Schedule.build(pattern, queries=(5, 5))


def test_the_last_tokens_ask_where_nothing_is_said() -> None:
    """As FlashAttention and causal_lower_right align: prefill by chunks needs no number."""
    pattern = Causal(LAYOUT)
    q, k, v = (tensor.detach() for tensor in leaves(pattern))
    whole = sparse_attention(q, k, v, pattern)
    for start, stop in ((0, 40), (40, 41), (41, 127)):
        part = sparse_attention(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], pattern)
        torch.testing.assert_close(part, whole[:, :, start:stop])
        bias = causal_lower_right(stop - start, stop)
        theirs = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], attn_mask=bias
        )
        torch.testing.assert_close(part, theirs)


def test_derivatives_compilation_and_other_shapes() -> None:
    pattern = Convolution(TokenLayout(5, (4, 6)), 3)
    q, k, v = (torch.randn(1, n, 29, w, dtype=torch.float64, requires_grad=True) for n, w in ((2, 3), (1, 3), (1, 2)))

    def attend(*tensors: torch.Tensor) -> Any:
        return sparse_attention(*tensors, pattern, return_lse=True, query_start=9, softcap=2.0)

    rows = q[:, :, 9:20].detach().requires_grad_()
    assert torch.autograd.gradcheck(attend, (rows, k, v), check_forward_ad=True)
    want = sparse_attention(q, k, v, pattern, return_lse=True, softcap=2.0)
    for one, other in zip(attend(rows, k, v), want, strict=True):
        torch.testing.assert_close(one, other[:, :, 9:20])
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rows, k, v), attend(rows, k, v))

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def chunk(*tensors: torch.Tensor) -> torch.Tensor:
        return sparse_attention(*tensors, pattern)

    for start, stop in ((0, 7), (7, 20), (20, 29)):
        got = chunk(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop])
        torch.testing.assert_close(got, sparse_attention(q, k, v, pattern)[:, :, start:stop])
    alike = [tensor.detach().float() for tensor in (q[:, :1, :4], k, k)]
    scale = torch.tensor(0.5, dtype=torch.float64)
    opcheck(torch.ops.dalle_kernels.attention_forward.default, (*alike, None, scale, pattern.spec, None, 7, "auto"))


Q = torch.zeros(2, 3, 29, 16)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((Q, Q[:, :, :20], Q[:, :, :20]), {}, "q: got 29 tokens, wanted 1 to 20, as many as k has or a run of them"),
        ((Q[:, :, :0], Q, Q), {}, "q: got 0 tokens, wanted 1 to 29, as many as k has or a run of them"),
        (
            (Q[:, :, :9], Q, Q),
            {"query_start": 21},
            "query_start: got 21, wanted a token from 0 to 20, so that 9 queries",
        ),
        ((Q[:, :0], Q, Q), {}, r"k: got shape \(2, 3, 29, 16\), wanted \(2, G, 29, 16\), G a divisor of 0"),
        ((Q[:, :, :9], Q, Q), {"query_start": -1}, "query_start: got -1, wanted a token from 0 to 20"),
        ((Q, Q, Q), {"query_start": 1}, "query_start: got 1, wanted a token from 0 to 0"),
        ((Q, Q, Q), {"query_start": 0.0}, r"query_start: got 0\.0, wanted an int"),
        ((Q[:, :, :9], Q, Q[:, :, :9]), {}, "v: got shape"),
        (
            (Q[:, :, :9], Q, Q),
            {"key_padding_mask": torch.zeros(2, 9, dtype=torch.bool)},
            r"key_padding_mask: got .*, wanted torch.bool of shape \(2, 29\)",
        ),
    ],
)
def test_bad_input_is_refused(arguments: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse_attention(*arguments, Row(TokenLayout(5, (4, 6))), **options)


def test_cuda_refuses_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.cuda_library, "refuse", lambda *_: None)
    call = Call(torch.device("cuda"), torch.bfloat16, 64, ("queries for a part of the tokens",))
    assert cuda.refuse(call) == "it has no queries for a part of the tokens"
    assert explain(sparse_attention, Q[:, :, :9], Q, Q, Row(TokenLayout(5, (4, 6)))).backend == "cpu"


def test_rows_without_keys() -> None:
    mask = torch.ones(80, 80, dtype=torch.bool).tril()
    mask[70:] = False
    q = torch.randn(1, 1, 80, 16)
    for backend in BACKENDS:
        inputs = (q[:, :, 66:76], q, q, MaskPattern(mask))
        out, lse = sparse_attention(*inputs, return_lse=True, backend=backend, query_start=66)
        assert not out[:, :, 4:].any()
        assert out[:, :, :4].any()
        assert lse[:, :, 4:].eq(-torch.inf).all()
    assert Inputs(*inputs[:3], None, 1.0, inputs[3]).query_start == 0


def test_sizes_and_places_may_be_numpys() -> None:
    layout = TokenLayout(5, (4, 6))
    q, k, v = torch.randn(3, 2, 3, 29, 16)
    got = sparse_attention(q[:, :, 7:9], k, v, Row(layout), query_start=np.int64(7))  # type: ignore[call-overload]
    assert torch.equal(got, sparse_attention(q[:, :, 7:9], k, v, Row(layout), query_start=7))
    cache = KVCache(Row(layout), np.int64(2), np.int32(3), np.int64(16), rewind=np.int64(1))  # type: ignore[arg-type]
    assert cache.keys.shape[:2] == (2, 3)
    with pytest.raises(ValueError, match=r"batch: got 1\.5, wanted an int"):
        KVCache(Row(layout), 1.5, 3, 16)  # type: ignore[arg-type]
