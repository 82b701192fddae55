"""Decoding: token by token against sparse attention at once, the cache's length, bad input."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from dalle_kernels import (
    AxialRow,
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
from dalle_kernels.patterns.decode_table import DecodeTable
from tests.oracles import every_pattern

LAYOUT = TokenLayout(5, (4, 6))
PAPER = TokenLayout(256, (32, 32))
CAUSAL = [pattern for pattern in every_pattern(LAYOUT) if not isinstance(pattern, MaskPattern)]


def tokens(pattern: Pattern, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(2)
    return [torch.randn(2, 3, pattern.length, 16, dtype=dtype) for _ in range(3)]


def decode(cache: KVCache, qkv: list[torch.Tensor], start: int = 0, backend: str = "auto") -> torch.Tensor:
    steps = [
        decode_attention(*(t[:, :, i : i + 1] for t in qkv), cache, i, backend=backend)  # type: ignore[misc]
        for i in range(start, qkv[0].shape[2])
    ]
    return torch.cat(steps, dim=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("pattern", CAUSAL, ids=str)
def test_token_by_token_equals_all_at_once(pattern: Pattern, dtype: torch.dtype) -> None:
    qkv = tokens(pattern, dtype)
    cache = KVCache(pattern, 2, 3, 16, dtype=dtype)
    cache.keys.fill_(torch.nan)  # a slot that is read before it is written would show
    cache.values.fill_(torch.nan)
    torch.testing.assert_close(decode(cache, qkv), sparse_attention(*qkv, pattern, backend="reference"))


@pytest.mark.parametrize("length", [1, 5, 14, 28])
def test_prefill_leaves_what_decoding_would(length: int) -> None:
    for pattern in CAUSAL:
        qkv = tokens(pattern)
        decoded, filled = (KVCache(pattern, 2, 3, 16, dtype=torch.float64) for _ in range(2))
        decode(decoded, [t[:, :, :length] for t in qkv])
        filled.prefill(qkv[1][:, :, :length], qkv[2][:, :, :length])
        assert torch.equal(decoded.keys, filled.keys), pattern
        assert torch.equal(decoded.values, filled.values), pattern
        assert torch.equal(decode(decoded, qkv, length), decode(filled, qkv, length)), pattern


@pytest.mark.parametrize(
    ("pattern", "length"),
    [
        (Row(PAPER), 256 + 32 + 1),
        (Convolution(PAPER, 11), 256 + 5 * 32 + 6),
        (AxialRow(PAPER), 256 + 32),
        (Column(PAPER), 256 + 31 * 32 + 1),
    ],
    ids=str,
)
def test_the_cache_is_as_short_as_the_pattern_allows(pattern: Pattern, length: int) -> None:
    assert KVCache(pattern, 1, 1, 8).keys.shape == (1, 1, length, 8)


@pytest.mark.parametrize("pattern", [*CAUSAL, Row(PAPER), Column(PAPER), Convolution(PAPER, 11, "torus")], ids=str)
def test_the_table_reads_just_the_visible_keys(pattern: Pattern) -> None:
    table, mask = DecodeTable.build(pattern), pattern.mask()
    holder = [-1] * table.cache_length
    offsets, slots, slot_of, prefix = (t.tolist() for t in (table.offsets, table.slots, table.slot, table.prefix))
    for position in range(pattern.length):
        holder[slot_of[position]] = position
        listed = slots[offsets[position] : offsets[position + 1]]
        assert len(listed) <= table.max_list
        read = [holder[slot] for slot in [*range(prefix[position]), *listed]]
        assert sorted(read) == mask[position].nonzero().flatten().tolist()


def test_position_as_a_tensor_and_opcheck() -> None:
    pattern = Row(LAYOUT)
    q, k, v = (t[:, :, :1] for t in tokens(pattern))
    one, other = (KVCache(pattern, 2, 3, 16, dtype=torch.float64) for _ in range(2))
    assert torch.equal(
        decode_attention(q, k, v, one, 0), decode_attention(q, k, v, other, torch.tensor(0, dtype=torch.int64))
    )
    for name, tensor in (("keys", one.keys), ("values", one.values)):
        assert torch.equal(tensor, getattr(other, name))
    position = torch.tensor(3)
    hidden, lengths = torch.zeros(one.keys.shape[::2], dtype=torch.bool), torch.full((2,), 3)
    for carried in ((None,) * 6 + (lengths,), (None, None, hidden, None, None, None, None)):
        step = q, k, v, one.keys, one.values, position, pattern.spec, None, None
        opcheck(
            torch.ops.dalle_kernels.decode_forward.default,
            (*step, *carried, 0, 0, "auto"),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_a_prompt_as_it_casts_the_tokens_after_it(dtype: torch.dtype) -> None:
    """Float32 keys, as a rotation leaves them, meet a cache of autocast's dtype; float64 ones stay what they are."""
    pattern = CAUSAL[0]
    qkv = tokens(pattern, torch.float32)
    whole = decode(KVCache(pattern, 2, 3, 16, dtype=dtype), [tensor.to(dtype) for tensor in qkv])
    for eight_bit in (False, True):
        cache = KVCache(pattern, 2, 3, 16, dtype=torch.int8 if eight_bit else dtype)
        with torch.autocast("cpu", dtype):
            cache.prefill(qkv[1][:, :, :7], qkv[2][:, :, :7])
            rest = decode(cache, qkv, start=7)
        if not eight_bit:
            assert torch.equal(rest, whole[:, :, 7:])
        assert rest.dtype == dtype
    wide = KVCache(pattern, 2, 3, 16, dtype=torch.float64)
    with torch.autocast("cpu", dtype):
        wide.prefill(qkv[1].double(), qkv[2].double())


def test_torch_compile_makes_one_graph() -> None:
    pattern = Row(LAYOUT)
    qkv = tokens(pattern, torch.float32)
    eager, compiled = (KVCache(pattern, 2, 3, 16) for _ in range(2))

    @torch.compile(fullgraph=True)
    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return decode_attention(q, k, v, compiled, position)

    got = [step(*(t[:, :, i : i + 1] for t in qkv), torch.tensor(i)) for i in range(8)]
    torch.testing.assert_close(torch.cat(got, dim=2), decode(eager, [t[:, :, :8] for t in qkv]))


Q = torch.zeros(2, 3, 1, 16)


@pytest.mark.parametrize(
    ("tensors", "position", "error", "message"),
    [
        ((Q[..., :8], Q, Q), 0, ValueError, r"q: got shape \(2, 3, 1, 8\), wanted \(2, 3, 1, 16\)"),
        ((Q, Q.double(), Q), 0, TypeError, "k: got torch.float64, wanted torch.float32 as the cache has"),
        ((Q, Q, Q), 29, ValueError, "position: got 29, wanted an int from 0 to 28"),
        ((Q, Q, Q), -1, ValueError, "position: got -1"),
        ((Q, Q, Q), torch.tensor(29), ValueError, "position: got 29, wanted 0 to 28"),
        ((Q, Q, Q), torch.tensor(1.0), ValueError, "position: got torch.float32"),
        ((Q.clone().requires_grad_(), Q, Q), 0, RuntimeError, "decode_attention has no backward"),
    ],
)
def test_bad_input_is_refused(tensors, position, error, message: str) -> None:  # type: ignore[no-untyped-def]
    cache = KVCache(Row(LAYOUT), 2, 3, 16)
    with pytest.raises(error, match=message):
        decode_attention(*tensors, cache, position)
    assert not cache.keys.any()  # nothing is written before the refusal


def test_bad_caches_are_refused() -> None:
    with pytest.raises(ValueError, match="lets a query see later keys"):
        KVCache(MaskPattern(torch.ones(4, 4, dtype=torch.bool)), 1, 1, 8)
    with pytest.raises(ValueError, match="heads: got 0"):
        KVCache(Row(LAYOUT), 1, 0, 8)
    with pytest.raises(TypeError, match="cache: got Tensor, wanted a KVCache"):
        decode_attention(Q, Q, Q, Q, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k: got 30 tokens, wanted at most 29"):
        KVCache(Row(LAYOUT), 1, 1, 8).prefill(torch.zeros(1, 1, 30, 8), torch.zeros(1, 1, 30, 8))


def test_caches_that_lost_their_shape_are_refused() -> None:
    """Their tensors may be exchanged, as beam search does; what does not fit must not be written to."""
    pattern = Row(TokenLayout(4, (3, 3)))
    token = torch.randn(2, 2, 1, 16)

    def cache() -> KVCache:
        return KVCache(pattern, 1, 2, 16)

    one_grown, shorter, other_dtype, both_grown, expanded = (cache() for _ in range(5))
    one_grown.keys = one_grown.keys.repeat(2, 1, 1, 1)
    with pytest.raises(
        ValueError, match=r"cache.values: got shape \(1, 2, 8, 16\), wanted \(2, 2, 8, 16\) as keys has"
    ):
        decode_attention(token, token, token, one_grown, 0)
    shorter.keys, shorter.values = shorter.keys[:, :, :4], shorter.values[:, :, :4]
    with pytest.raises(ValueError, match=r"cache.keys: got shape \(1, 2, 4, 16\), wanted \[B, H, 8, D\]"):
        shorter.prefill(token[:1], token[:1])
    other_dtype.values = other_dtype.values.bfloat16()
    with pytest.raises(TypeError, match=r"cache.values: got torch\.bfloat16, wanted torch\.float32 as cache.keys has"):
        decode_attention(token[:1], token[:1], token[:1], other_dtype, 0)
    both_grown.keys, both_grown.values = both_grown.keys.repeat(2, 1, 1, 1), both_grown.values.repeat(2, 1, 1, 1)
    with pytest.raises(ValueError, match=r"cache\.keys: got 2 rows, wanted 1, as many as lengths; `reorder` makes"):
        decode_attention(token, token, token, both_grown, 0)
    expanded.reorder(torch.zeros(2, dtype=torch.int64))
    assert decode_attention(token, token, token, expanded, 0).shape == token.shape


@pytest.mark.parametrize("name", ["keys", "values"])
def test_caches_of_foreign_strides_are_refused(name: str) -> None:
    """Rows that share memory would be written over each other, and kernels count on whole 16-byte pieces."""
    token = torch.randn(4, 2, 1, 16)
    views = {
        "expanded": lambda tensor: tensor[:1].expand(4, -1, -1, -1),
        "transposed": lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2),
        "a part of wider rows": lambda tensor: torch.zeros(*tensor.shape[:3], 17)[..., :16],
    }
    for view in views.values():
        cache = KVCache(Row(TokenLayout(4, (3, 3))), 4, 2, 16)
        setattr(cache, name, view(getattr(cache, name)))
        for call in (
            lambda cache=cache: decode_attention(token, token, token, cache, 0),
            lambda cache=cache: cache.prefill(token, token),
        ):
            with pytest.raises(ValueError, match=rf"cache.{name}: got strides .*, wanted a contiguous tensor"):
                call()
        assert not cache.keys.any()


def test_keys_and_values_in_the_same_memory_are_refused() -> None:
    token, cache = torch.randn(1, 2, 1, 16), KVCache(Row(TokenLayout(4, (3, 3))), 1, 2, 16)
    cache.values = cache.keys
    for call in (lambda: decode_attention(token, token, token, cache, 0), lambda: cache.prefill(token, token)):
        with pytest.raises(ValueError, match=r"cache.values: got the memory of cache.keys"):
            call()
    assert not cache.keys.any()
