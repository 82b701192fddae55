"""What a cache remembers: how many tokens it holds, which of them are padding, and how to go back."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
import torch

from dalle_kernels import Column, KVCache, MaskPattern, Pattern, Row, TokenLayout, decode_attention, sparse_attention
from dalle_kernels.backends.contract import Call
from dalle_kernels.decode import cpu
from dalle_kernels.nn import SparseSelfAttention
from dalle_kernels.patterns.decode_table import DecodeTable
from tests.oracles import every_pattern

LAYOUT = TokenLayout(5, (4, 6))
CAUSAL = [pattern for pattern in every_pattern(LAYOUT) if not isinstance(pattern, MaskPattern)]
BACKENDS = ["reference", *(["cpu"] if cpu.refuse(Call(torch.device("cpu"), torch.float32, 16)) is None else [])]

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tokens(pattern: Pattern, rows: int = 2, dtype: torch.dtype = torch.float64) -> QKV:
    torch.manual_seed(4)
    q, k, v = (torch.randn(rows, 3, pattern.length, 16, dtype=dtype) for _ in range(3))
    return q, k, v


def cut(qkv: QKV, start: int, stop: int) -> QKV:
    q, k, v = (tensor[:, :, start:stop] for tensor in qkv)
    return q, k, v


def poisoned(pattern: Pattern, rows: int = 2, dtype: torch.dtype = torch.float64, **options: int) -> KVCache:
    """A slot that is read before it is written shows."""
    cache = KVCache(pattern, rows, 3, 16, dtype=dtype, **options)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    return cache


def state(cache: KVCache) -> list[torch.Tensor]:
    assert cache.lengths is not None
    tensors = (*cache._tensors, cache.lengths)
    return [tensor.clone() for tensor in tensors if isinstance(tensor, torch.Tensor)]


def refused(cache: KVCache, call: Callable[[], object], message: str) -> None:
    """`call` raises, and the cache is as it was."""
    before = state(cache)
    with pytest.raises(ValueError, match=message):
        call()
    for was, now in zip(before, state(cache), strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_positions_are_the_next_or_refused(as_tensor: bool) -> None:
    pattern = Row(LAYOUT)
    qkv = tokens(pattern)
    cache = KVCache(pattern, 2, 3, 16, dtype=torch.float64)
    cache.prefill(*cut(qkv, 0, 7)[1:])

    def step(position: int) -> torch.Tensor:
        where = torch.tensor(position) if as_tensor else position
        return decode_attention(*cut(qkv, position, position + 1), cache, where)

    refused(
        cache, lambda: step(3), r"position: got 3, wanted 7, the tokens that the cache holds; truncate\(3\) goes back"
    )
    refused(cache, lambda: step(8), "position: got 8, wanted 7, the tokens that the cache holds$")
    refused(cache, lambda: cache.prefill(*cut(qkv, 0, 2)[1:]), r"k: the cache holds 7 tokens already.*truncate\(0\)")
    whole = sparse_attention(*qkv, pattern, backend="reference")
    for position in range(7, pattern.length):
        torch.testing.assert_close(step(position), whole[:, :, position : position + 1])
    refused(
        cache, lambda: decode_attention(*cut(qkv, 0, 1), cache, torch.tensor(29)), "position: got 29, wanted 0 to 28"
    )
    assert cache.lengths is not None
    assert cache.lengths.tolist() == [29, 29]


def test_positions_are_checked_in_a_compiled_step() -> None:
    pattern = Row(LAYOUT)
    qkv = tokens(pattern, dtype=torch.float32)
    cache = KVCache(pattern, 2, 3, 16)

    @torch.compile(fullgraph=True)
    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return decode_attention(q, k, v, cache, position)

    for position in range(3):
        step(*cut(qkv, position, position + 1), torch.tensor(position))
    refused(cache, lambda: step(*cut(qkv, 1, 2), torch.tensor(1)), "position: got 1, wanted 3")


def test_prefill_compiles_to_one_graph_and_exports() -> None:
    pattern = Row(LAYOUT)
    module = SparseSelfAttention(pattern, 24, 3, head_dim=16).double()
    x = torch.randn(2, pattern.length, 24, dtype=torch.float64)
    whole = module(x)

    class Prompt(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            cache = self.attention.new_cache(2)
            prompt = self.attention(x[:, :7], cache=cache)
            return torch.cat([prompt, self.attention.step(x[:, 7:8], cache, 7)], 1)

    with torch.no_grad():
        for strict in (False, True):
            exported = torch.export.export(Prompt(), (x,), strict=strict)
            torch.testing.assert_close(exported.module()(x), whole[:, :8])
        torch.testing.assert_close(torch.compile(Prompt(), fullgraph=True)(x), whole[:, :8])
        torch.testing.assert_close(Prompt()(x), whole[:, :8])  # nothing fake is left behind


@pytest.mark.parametrize("position", [np.int64(7), np.int32(7), np.uint8(7)])
def test_positions_are_integers_of_any_type(position: int) -> None:
    pattern = Row(LAYOUT)
    qkv = tokens(pattern)
    cache = KVCache(pattern, 2, 3, 16, dtype=torch.float64)
    cache.prefill(*cut(qkv, 0, 7)[1:])
    whole = sparse_attention(*qkv, pattern, backend="reference")
    torch.testing.assert_close(decode_attention(*cut(qkv, 7, 8), cache, position), whole[:, :, 7:8])
    with pytest.raises(ValueError, match=r"position: got 7\.5, wanted an int"):
        decode_attention(*cut(qkv, 8, 9), cache, 7.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", CAUSAL, ids=str)
def test_padding_of_the_prompt_stays_hidden(pattern: Pattern, backend: str, chunk: int) -> None:
    torch.manual_seed(0)
    dtype = torch.float64 if backend == "reference" else torch.float32
    module = SparseSelfAttention(pattern, 24, 3, head_dim=16, backend=backend).to(dtype)
    x = torch.randn(3, pattern.length, 24, dtype=dtype)
    padding = torch.zeros(3, pattern.length, dtype=torch.bool)
    padding[0, :3] = padding[1, 4:9] = True
    with torch.no_grad():
        whole = module(x, key_padding_mask=padding)
        cache = module.new_cache(3)
        parts = [module(x[:, :9], key_padding_mask=padding[:, :9], cache=cache)]
        for position in range(9, pattern.length, chunk):
            parts.append(module.step(x[:, position : position + chunk], cache, position))
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_a_token_whose_keys_are_all_padding_gives_zeros() -> None:
    pattern = MaskPattern(torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 0]], dtype=torch.bool))
    for backend in BACKENDS:
        q, k, v = cut(tokens(pattern, dtype=torch.float32), 0, 3)
        cache = KVCache(pattern, 2, 3, 16)
        cache.prefill(k[:, :, :2], v[:, :, :2], torch.tensor([[True, False], [False, False]]))
        out = decode_attention(*cut((q, k, v), 2, 3), cache, 2, backend=backend)
        assert not out[0].any()
        torch.testing.assert_close(out[1], v[1, :, :1])


def test_padding_masks_that_do_not_fit_are_refused() -> None:
    cache, kv = KVCache(Row(LAYOUT), 2, 3, 16), torch.zeros(2, 3, 4, 16)
    refused(cache, lambda: cache.prefill(kv, kv, torch.zeros(2, 4)), "key_padding_mask: got torch.float32")
    shorter = torch.zeros(2, 3, dtype=torch.bool)
    refused(cache, lambda: cache.prefill(kv, kv, shorter), r"wanted torch.bool of shape \(2, 4\)")


@pytest.mark.parametrize("rewind", [0, 3, 40])
@pytest.mark.parametrize("pattern", CAUSAL, ids=str)
def test_going_back_and_on_again(pattern: Pattern, rewind: int) -> None:
    qkv, other = tokens(pattern), tokens(pattern)[::-1]
    whole = sparse_attention(*qkv, pattern, backend="reference")
    cache = poisoned(pattern, rewind=rewind)
    length, back = 0, min(rewind + 1, 6)
    for stop in (8, 15, 29):
        for position in range(length, stop):
            decode_attention(*cut(other, position, position + 1), cache, position)  # guesses, to be taken back
            if position - length + 1 == back or position == stop - 1:
                cache.truncate(length)
                for again in range(length, position + 1):
                    got = decode_attention(*cut(qkv, again, again + 1), cache, again)
                    torch.testing.assert_close(got, whole[:, :, again : again + 1])
                length = position + 1


@pytest.mark.parametrize("pattern", [*CAUSAL, Row(TokenLayout(3, (9, 4)))], ids=str)
def test_going_back_is_allowed_just_where_every_key_is_still_there(pattern: Pattern) -> None:
    table, mask = DecodeTable.build(pattern), pattern.mask()
    slots = table.slot.tolist()
    for length in range(pattern.length + 1):
        holder = {slots[position]: position for position in range(length)}
        for position in range(length + 1):
            seen = mask[position:].any(0)[:position].nonzero().flatten().tolist()
            latest = table.written(None, 0, length)
            assert table.holds(position, latest) == all(holder[slots[key]] == key for key in seen)


@pytest.mark.parametrize("rewind", [0, 2])
@pytest.mark.parametrize("pattern", CAUSAL, ids=str)
def test_what_tokens_further_on_took_stays_taken(pattern: Pattern, rewind: int) -> None:
    """Step back upon step back, other ones in each row: what is allowed is right, and what is promised is allowed."""
    random = Random(0)
    q, k, v = tokens(pattern, rows=2)
    whole = sparse_attention(q, k, v, pattern, backend="reference")
    cache = KVCache(pattern, 2, 3, 16, dtype=torch.float64, rewind=rewind)
    held, refusals = [0, 0], 0
    writes: list[list[int]] = [[], []]
    for _ in range(60):
        for _ in range(random.randrange(6)):
            if max(held) == pattern.length:
                break
            places = torch.tensor(held)
            step = (torch.stack([t[row, :, at : at + 1] for row, at in enumerate(held)]) for t in (q, k, v))
            got = decode_attention(*step, cache, places)
            for row, at in enumerate(held):
                torch.testing.assert_close(got[row], whole[row, :, at : at + 1])
                writes[row].append(at)
            held = [at + 1 for at in held]
        wanted = [random.randint(max(at - 2 - rewind, 0), at) for at in held]
        promised = all(not at or at >= max(seen) - rewind for seen, at in zip(writes, wanted, strict=True))
        try:
            cache.truncate(torch.tensor(wanted))
        except ValueError:
            assert not promised
            refusals += 1
            continue
        held = wanted
        for row, at in enumerate(held):
            if not at:
                writes[row] = []
    assert refusals or not isinstance(pattern, Row)


def test_going_back_too_far_is_refused() -> None:
    pattern = Row(LAYOUT)
    qkv = tokens(pattern)
    cache = KVCache(pattern, 2, 3, 16, dtype=torch.float64)
    cache.prefill(*cut(qkv, 0, 20)[1:])
    refused(cache, lambda: cache.truncate(21), "position: got 21, wanted 0 to 20, the tokens that the cache holds")
    refused(cache, lambda: cache.truncate(-1), "position: got -1, wanted 0 to 20")
    refused(cache, lambda: cache.truncate(17), "position: got 17, .* rewind=2 could go back so far")
    refused(cache, lambda: cache.truncate(torch.tensor([20])), r"position: .* wanted an int or int64 of shape \(2,\)")
    cache.truncate(19)
    refused(cache, lambda: cache.truncate(18), "position: got 18, .* rewind=1 could go back so far")
    cache.truncate(np.int64(0))
    cache.prefill(*cut(qkv, 0, 20)[1:])
    assert cache.lengths is not None
    assert cache.lengths.tolist() == [20, 20]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", CAUSAL, ids=str)
def test_several_tokens_a_step_give_what_one_by_one_gives(pattern: Pattern, backend: str) -> None:
    dtype = torch.float64 if backend == "reference" else torch.float32
    qkv = tokens(pattern, dtype=dtype)
    whole = sparse_attention(*qkv, pattern, backend="reference")
    for chunks in ([29], [1, 3, 11, 14], [5, 24]):
        cache = poisoned(pattern, dtype=dtype)
        start, outs = 0, []
        for count in chunks:
            outs.append(decode_attention(*cut(qkv, start, start + count), cache, start, backend=backend))
            start += count
        torch.testing.assert_close(torch.cat(outs, 2), whole)
        one_by_one = poisoned(pattern, dtype=dtype)
        for position in range(29):
            decode_attention(*cut(qkv, position, position + 1), one_by_one, position, backend=backend)
        for one, other in zip(state(cache), state(one_by_one), strict=True):
            assert torch.equal(one, other)
    refused(
        cache, lambda: decode_attention(*cut(qkv, 0, 3), cache, 27), "position: got 27 for 3 tokens, wanted .* 0 to 26"
    )
    empty = cut(qkv, 0, 0)
    refused(cache, lambda: decode_attention(*empty, cache, 0), r"q: got shape \(2, 3, 0, 16\), wanted \(2, 3, 1, 16\)")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", CAUSAL, ids=str)
def test_positions_may_differ_by_row(pattern: Pattern, backend: str) -> None:
    """A row that is done begins anew while the others go on."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    q, k, v = tokens(pattern, rows=4, dtype=dtype)
    whole = sparse_attention(q, k, v, pattern, backend="reference")
    cache = poisoned(pattern, rows=3, dtype=dtype)
    pictures, positions, count = [0, 1, 2], torch.tensor([0, 0, 0]), 0
    cache.prefill(*(tensor[:3, :, :4] for tensor in (k, v)))
    positions += 4
    while count < 29 + 4:
        if count == 9:
            positions = torch.where(torch.tensor([False, True, False]), 0, positions)
            cache.truncate(positions)
            pictures[1] = 3
        tokens_now = 2 if count % 3 == 2 else 1
        if int(positions.max()) + tokens_now > 29:
            break
        rows = [
            torch.stack([t[p, :, i : i + tokens_now] for p, i in zip(pictures, positions.tolist(), strict=True)])
            for t in (q, k, v)
        ]
        got = decode_attention(*rows, cache, positions, backend=backend)  # type: ignore[misc]
        for row, (picture, place) in enumerate(zip(pictures, positions.tolist(), strict=True)):
            torch.testing.assert_close(got[row], whole[picture, :, place : place + tokens_now])
        positions = positions + tokens_now
        count += 1
    assert count > 15
    positions = positions - 1
    cache.truncate(positions)
    wrong = positions + torch.tensor([0, -1, 0])
    step = tuple(torch.zeros(3, 3, 1, 16, dtype=dtype) for _ in range(3))
    held = int(positions[1])
    refused(cache, lambda: decode_attention(*step, cache, wrong), f"position: got {held - 1} for row 1, wanted {held}")  # type: ignore[misc]


def test_reorder_takes_rows_of_every_kind() -> None:
    pattern = Column(LAYOUT)
    qkv = tokens(pattern, rows=3)
    cache, index = KVCache(pattern, 3, 3, 16, dtype=torch.float64), torch.tensor([2, 0, 2])
    padding = torch.rand(3, 8) < 0.3
    cache.prefill(*cut(qkv, 0, 8)[1:], padding)
    where = cache.keys.data_ptr()
    cache.reorder(index)
    assert cache.keys.data_ptr() == where  # so that a captured graph goes on reading it
    hidden = torch.nn.functional.pad(padding, (0, 21))[index]
    chosen = tuple(tensor[index] for tensor in qkv)
    whole = sparse_attention(*chosen, pattern, key_padding_mask=hidden, backend="reference")  # type: ignore[misc]
    step = cut(chosen, 8, 9)  # type: ignore[arg-type]
    torch.testing.assert_close(decode_attention(*step, cache, 8), whole[:, :, 8:9])
    before = weakref.ref(cache.keys)
    cache.reorder(torch.tensor([1, 1, 0, 2]))
    assert before() is None
    assert cache.lengths is not None
    assert cache.lengths.tolist() == [9, 9, 9, 9]
    step = cut(tuple(tensor[[1, 1, 0, 2]] for tensor in chosen), 9, 10)  # type: ignore[arg-type]
    torch.testing.assert_close(decode_attention(*step, cache, 9), whole[[1, 1, 0, 2], :, 9:10])
    refused(cache, lambda: cache.reorder(torch.tensor([4, 0])), "index: got 0 to 4, wanted rows from 0 to 3")
    refused(cache, lambda: cache.reorder(torch.tensor([0.5])), "index: got torch.float32")
    refused(cache, lambda: cache.reorder(torch.zeros(0, dtype=torch.int64)), r"index: .* of shape \(0,\)")


def test_bytes() -> None:
    cache = KVCache(Row(LAYOUT), 2, 3, 16)
    assert cache.nbytes == 2 * 4 * cache.keys.numel()
    kv = torch.zeros(2, 3, 5, 16)
    cache.prefill(kv, kv, torch.zeros(2, 5, dtype=torch.bool))
    assert cache.nbytes == 2 * 4 * cache.keys.numel() + 2 * cache.keys.shape[2]
