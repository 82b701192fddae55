"""Prompts that are kept once for their continuations: the same as a cache for each, for every pattern."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from dalle_kernels import (
    Column,
    Convolution,
    KVCache,
    MaskPattern,
    Pattern,
    Row,
    TokenLayout,
    decode_attention,
    sparse_attention,
)
from dalle_kernels.backends.choice import Call
from dalle_kernels.decode import cpu
from dalle_kernels.decode.contract import call_of
from dalle_kernels.nn import SparseSelfAttention
from dalle_kernels.patterns.decode_table import DecodeTable
from tests.decode.test_cache import cut, refused
from tests.oracles import every_pattern

LAYOUT = TokenLayout(5, (4, 6))
CAUSAL = [pattern for pattern in every_pattern(LAYOUT) if not isinstance(pattern, MaskPattern)]
SHARED = Call(torch.device("cpu"), torch.float32, 16, ("shared prompts",))
BACKENDS = ["reference", *(["cpu"] if cpu.refuse(SHARED) is None else [])]
PROMPTS, COPIES = 2, 3

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def continuations(pattern: Pattern, prompt: int, dtype: torch.dtype, copies: int = COPIES) -> QKV:
    """q, k, v [PROMPTS * copies, 3, S, 16] whose rows share the first `prompt` tokens by prompt."""
    torch.manual_seed(6)
    q, k, v = (torch.randn(PROMPTS * copies, 3, pattern.length, 16, dtype=dtype) for _ in range(3))
    for tensor in (q, k, v):
        tensor[:, :, :prompt] = tensor[::copies, :, :prompt].repeat_interleave(copies, 0)
    return q, k, v


def shared_cache(pattern: Pattern, prompt: int, qkv: QKV, copies: int = COPIES, **options: int) -> KVCache:
    cache = KVCache(pattern, PROMPTS, 3, 16, dtype=qkv[0].dtype, copies=copies, **options)
    cache.prefill(*(tensor[::copies, :, :prompt] for tensor in qkv[1:]))
    cache.keys.fill_(torch.nan)  # a slot that is read before it is written shows
    cache.values.fill_(torch.nan)
    return cache


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prompt", [0, 1, 4, 5, 14, 28])
@pytest.mark.parametrize("pattern", CAUSAL, ids=str)
def test_a_shared_prompt_gives_what_separate_caches_give(pattern: Pattern, prompt: int, backend: str) -> None:
    dtype = torch.float64 if backend == "reference" else torch.float32
    qkv = continuations(pattern, prompt, dtype)
    whole = sparse_attention(*qkv, pattern, backend="reference")
    for chunk in (1, 4):
        cache, outs = shared_cache(pattern, prompt, qkv), []
        for start in range(prompt, pattern.length, chunk):
            stop = min(start + chunk, pattern.length)
            outs.append(decode_attention(*cut(qkv, start, stop), cache, start, backend=backend))
        torch.testing.assert_close(torch.cat(outs, 2), whole[:, :, prompt:])


@pytest.mark.parametrize("prompt", [0, 1])
def test_of_a_prompt_without_tokens_backends_are_handed_nothing(prompt: int) -> None:
    """So a backend that knows no shared prompts serves it."""
    qkv = continuations(CAUSAL[0], prompt, torch.float32)
    cache = shared_cache(CAUSAL[0], prompt, qkv)
    assert cache.shared_keys is not None
    given = cache.inputs(*cut(qkv, prompt, prompt + 1), prompt)
    for tensor in (given.shared_keys, given.shared_values):
        assert (tensor is None) == (prompt == 0)
    assert call_of(given).extras == (() if prompt == 0 else ("shared prompts",))


@pytest.mark.parametrize("prompt", [0, 1, 5, 9, 28, 29])
@pytest.mark.parametrize("pattern", [*CAUSAL, Row(TokenLayout(9, (4, 5))), Convolution(LAYOUT, 3, "torus")], ids=str)
def test_the_tables_read_just_the_visible_keys(pattern: Pattern, prompt: int) -> None:
    mask = pattern.mask()
    own = DecodeTable.build(pattern, prompt)
    tables = [own] if own.shared is None else [own.shared, own]
    holders = [[-1] * table.cache_length for table in tables]
    slots = [table.slot.tolist() for table in tables]
    if own.shared is not None:
        for position in range(prompt):
            if (slot := slots[0][position]) >= 0:
                assert holders[0][slot] == -1
                holders[0][slot] = position
        assert -1 not in holders[0]
        assert sorted(holders[0]) == mask[prompt:, :prompt].any(0).nonzero().flatten().tolist()
    for position in range(prompt, pattern.length):
        holders[-1][slots[-1][position]] = position
        read = []
        for table, holder in zip(tables, holders, strict=True):
            listed = table.slots[table.offsets[position] : table.offsets[position + 1]].tolist()
            assert len(listed) <= table.max_list
            read += [holder[slot] for slot in [*range(int(table.prefix[position])), *listed]]
        assert sorted(read) == mask[position].nonzero().flatten().tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_of_a_shared_prompt_stays_hidden(backend: str) -> None:
    dtype = torch.float64 if backend == "reference" else torch.float32
    for pattern in (Row(LAYOUT), Column(LAYOUT), MaskPattern(torch.rand(20, 20).tril() > 0.6)):
        module = SparseSelfAttention(pattern, 24, 3, head_dim=16, backend=backend).to(dtype)
        x = torch.randn(PROMPTS * COPIES, pattern.length, 24, dtype=dtype)
        x[:, :7] = x[::COPIES, :7].repeat_interleave(COPIES, 0)
        padding = torch.zeros(PROMPTS, pattern.length, dtype=torch.bool)
        padding[0, :3] = padding[1, 2:6] = True
        with torch.no_grad():
            whole = module(x, key_padding_mask=padding.repeat_interleave(COPIES, 0))
            cache = module.new_cache(PROMPTS, copies=COPIES)
            prompt = module(x[::COPIES, :7], key_padding_mask=padding[:, :7], cache=cache)
            torch.testing.assert_close(prompt, whole[::COPIES, :7])
            for position in range(7, pattern.length):
                step = module.step(x[:, position : position + 1], cache, position)
                torch.testing.assert_close(step, whole[:, position : position + 1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", [Row(LAYOUT), Column(LAYOUT), Convolution(LAYOUT, 3)], ids=str)
def test_continuations_may_stand_at_different_positions(pattern: Pattern, backend: str) -> None:
    dtype, prompt = torch.float64 if backend == "reference" else torch.float32, 8
    qkv = continuations(pattern, prompt, dtype)
    whole = sparse_attention(*qkv, pattern, backend="reference")
    cache = shared_cache(pattern, prompt, qkv, rewind=2)
    rows, positions = torch.arange(PROMPTS * COPIES), torch.full((PROMPTS * COPIES,), prompt)
    for turn in range(18):
        step = tuple(tensor[rows, :, positions][:, :, None] for tensor in qkv)
        got = decode_attention(*step, cache, positions, backend=backend)  # type: ignore[misc]
        torch.testing.assert_close(got, whole[rows, :, positions][:, :, None])
        positions = positions + 1
        if turn in (5, 11):  # some guesses were wrong
            positions -= torch.tensor([0, 1, 2, 0, 0, 3])
            cache.truncate(positions)


def test_rows_of_one_prompt_may_change_places_and_prompts_too() -> None:
    pattern, prompt = Row(LAYOUT), 8
    qkv = continuations(pattern, prompt, torch.float64)
    cache, index = shared_cache(pattern, prompt, qkv), torch.tensor([5, 5, 3, 0, 2, 1])
    decode_attention(*cut(qkv, 8, 9), cache, 8)
    refused(cache, lambda: cache.reorder(torch.tensor([0, 1, 3, 4, 5, 2])), "index: got rows of several prompts")
    refused(cache, lambda: cache.reorder(torch.tensor([0, 1])), "wanted int64 of shape .* n a positive multiple of 3")
    cache.reorder(index)
    chosen: QKV = tuple(tensor[index] for tensor in qkv)  # type: ignore[assignment]
    whole = sparse_attention(*chosen, pattern, backend="reference")
    torch.testing.assert_close(decode_attention(*cut(chosen, 9, 10), cache, 9), whole[:, :, 9:10])
    cache.reorder(torch.tensor([4, 3, 5]))
    torch.testing.assert_close(
        decode_attention(*cut(tuple(t[[4, 3, 5]] for t in chosen), 10, 11), cache, 10),  # type: ignore[arg-type]
        whole[[4, 3, 5], :, 10:11],
    )


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    pattern, prompt = Row(LAYOUT), 8
    qkv = continuations(pattern, prompt, torch.float64)
    empty = KVCache(pattern, PROMPTS, 3, 16, dtype=torch.float64, copies=COPIES)
    step = cut(qkv, 8, 9)
    refused(
        empty, lambda: decode_attention(*step, empty, 0), "the prompt that its 3 copies share, wanted a prefill first"
    )
    refused(empty, lambda: empty.prefill(*cut(qkv, 0, 8)[1:]), r"k: got shape \(6, .*, wanted \(2, 3, n, 16\)")
    cache = shared_cache(pattern, prompt, qkv)
    one_each = tuple(tensor[::COPIES] for tensor in step)
    refused(cache, lambda: decode_attention(*one_each, cache, 8), r"q: got shape \(2, .*, wanted \(6, 3, 1, 16\)")  # type: ignore[misc]
    again = [tensor[::COPIES] for tensor in cut(qkv, 0, 8)[1:]]
    refused(cache, lambda: cache.prefill(*again), r"k: the cache holds 8 tokens already; .*truncate\(0\)")
    decode_attention(*step, cache, 8)
    refused(cache, lambda: cache.truncate(7), "position: got 7, wanted at least the 8 tokens of the prompt, or 0")
    refused(cache, lambda: cache.truncate(torch.tensor([9, 0, 9, 9, 9, 9])), "position: got 0, wanted at least the 8")
    refused(cache, lambda: decode_attention(*cut(qkv, 0, 1), cache, 28), "position: got 28, wanted 9")
    with pytest.raises(ValueError, match="copies: got 0, wanted an int >= 1"):
        KVCache(pattern, 1, 3, 16, copies=0)
    cache.truncate(0)
    assert cache.nbytes == 0
    cache.prefill(*again)
    whole = sparse_attention(*qkv, pattern, backend="reference")
    torch.testing.assert_close(decode_attention(*step, cache, 8), whole[:, :, 8:9])
    cache.truncate(8)
    cache.shared_values = cache.shared_values[:, :, :7]  # type: ignore[index]
    refused(cache, lambda: decode_attention(*step, cache, 8), r"cache.shared_values: got shape \(2, 3, 7, 16\)")


def test_bytes_are_those_of_one_prompt() -> None:
    pattern = Row(TokenLayout(256, (32, 32)))
    cache = KVCache(pattern, 1, 2, 16, copies=64)
    kv = torch.zeros(1, 2, 256, 16)
    cache.prefill(kv, kv)
    assert cache.nbytes == 2 * 4 * 2 * 16 * (256 + 64 * 33)


def test_compiled_and_checked() -> None:
    pattern, prompt = Row(LAYOUT), 8
    qkv = continuations(pattern, prompt, torch.float32)
    compiled, eager = (shared_cache(pattern, prompt, qkv) for _ in range(2))

    @torch.compile(fullgraph=True)
    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return decode_attention(q, k, v, compiled, position)

    for position in range(8, 12):
        got = step(*cut(qkv, position, position + 1), torch.tensor(position))
        torch.testing.assert_close(got, decode_attention(*cut(qkv, position, position + 1), eager, position))
    hidden, shared_hidden = (torch.zeros(t.shape[::2], dtype=torch.bool) for t in (eager.keys, eager.shared_keys))  # type: ignore[union-attr]
    step = *cut(qkv, 12, 13), eager.keys, eager.values, torch.tensor(12), pattern.spec, None, torch.tensor(2.0)
    carried = eager.shared_keys, eager.shared_values, hidden, shared_hidden, None, None, eager.lengths
    opcheck(
        torch.ops.dalle_kernels.decode_forward.default,
        (*step, *carried, prompt, 0, "auto"),
    )
