"""PatternCache, which keeps what patterns can still see, against DynamicCache, which keeps every key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from dalle_kernels import KVCache
from dalle_kernels.integrations.transformers import register
from dalle_kernels.integrations.transformers_cache import ARGUMENT, PatternCache
from tests.integrations.test_transformers import (
    LAYERS,
    LAYOUT,
    LENGTH,
    PATTERNS,
    TEXT,
    gpt2,
    llama,
    make,
    run,
    shown,
    tokens,
)


@pytest.fixture(autouse=True)
def registered(attention_names: None) -> None:
    register(LAYOUT, kernel_size=3)


def places(mask: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize(("config", "name"), [*((llama, name) for name in PATTERNS), (gpt2, "dalle")])
@torch.no_grad()
def test_prompt_and_steps_are_the_whole(config: Any, name: str, side: str | None) -> None:
    ids, mask = tokens(), side and shown(side)
    model, cache = make(config(), name), PatternCache()
    whole = run(model, ids, mask)
    stops = [TEXT, TEXT + 1, TEXT + 2, TEXT + 7, TEXT + 8, LENGTH]
    for start, stop in zip([0, *stops], stops, strict=False):
        seen = None if mask is None else mask[:, :stop]
        named = {"attention_mask": seen, "position_ids": places(mask, start, stop)}
        got = model(ids[:, start:stop], **{ARGUMENT: cache}, **named).logits
        real = slice(None) if seen is None else seen[:, start:].bool()
        torch.testing.assert_close(got[real], whole[:, start:stop][real], rtol=1e-10, atol=1e-10)
        assert cache.get_seq_length() == stop
    assert len(cache.layers) == LAYERS
    for layer, pattern in zip(cache.layers, PATTERNS[name], strict=True):
        assert layer.held.keys.shape[2] == KVCache(pattern, 1, 1, 8).keys.shape[2]


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams of one prompt": {"num_beams": 3, "copies": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2, "early_stopping": True, "copies": 3},
    "sampled beams": {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 4},
    "several samples of one prompt": {"do_sample": True, "num_return_sequences": 4, "copies": 4},
    "filters": {"do_sample": True, "top_k": 9, "top_p": 0.9, "temperature": 0.7},
    "a prompt in chunks": {"prefill_chunk_size": 3},
    "assisted": {"assistant_model": True, "rewind": 20},
    "assisted samples": {"assistant_model": True, "do_sample": True, "rewind": 20},
    "prompt lookup": {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 1, "rewind": 10},
}


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["dalle", "dalle_row"])
def test_generation_of_every_kind_token_for_token(way: str, name: str, side: str | None) -> None:
    named = {"do_sample": False, "max_new_tokens": LENGTH - TEXT} | WAYS[way]
    options = {option: named.pop(option) for option in ("copies", "rewind") if option in named}
    ids, shows = tokens(length=TEXT), torch.ones(2, TEXT, dtype=torch.int64) if side is None else shown(side, TEXT)
    if "assistant_model" in named or "prompt_lookup_num_tokens" in named:  # a batch of one, in transformers
        ids, shows = ids[1:], shows[1:]
    model = make(llama(), name, torch.float32)
    if "assistant_model" in named:
        named["assistant_model"] = make(llama(initializer_range=0.32), name, torch.float32)
    drawn = []
    for cache in (PatternCache(**options), DynamicCache(config=model.config)):
        torch.manual_seed(5)
        drawn.append(model.generate(ids, attention_mask=shows, **{ARGUMENT: cache}, **named))
    assert drawn[0].shape[1] == LENGTH
    assert len(drawn[0][:, TEXT:].unique()) > 4
    assert torch.equal(*drawn)


def test_a_prompt_is_kept_once_for_its_copies() -> None:
    model, sizes = make(llama(), "dalle_row", torch.float32), {}
    for copies in (1, 4):
        cache = PatternCache(copies=copies)
        model.generate(tokens(1, TEXT), do_sample=True, num_return_sequences=4, max_new_tokens=9, **{ARGUMENT: cache})
        sizes[copies] = cache.nbytes
    row = 2 * LAYERS * 2 * 16 * 4  # keys and values of a slot, two heads of 16, in float32
    assert sizes == {1: row * 4 * (TEXT + 6), 4: row * (TEXT + 4 * 6)}


def test_eight_bits_come_near() -> None:
    model, ids = make(llama(), "dalle_row", torch.float32), tokens()
    logits = []
    with torch.no_grad():
        for dtype in (None, torch.int8):
            cache = PatternCache(dtype=dtype)
            model(ids[:, :TEXT], **{ARGUMENT: cache})
            logits.append(model(ids[:, TEXT:], **{ARGUMENT: cache}).logits)
    error = (logits[0] - logits[1]).abs().max() / logits[0].std()
    assert 0 < error < 0.2


@pytest.mark.parametrize("argument", sorted({ARGUMENT, "past_key_values"}))
def test_a_cache_goes_on_in_the_next_call_and_begins_anew(argument: str) -> None:
    """By either name that transformers has for it."""
    model, ids, cache = make(llama(), "dalle", torch.float32), tokens(length=TEXT), PatternCache()
    wanted = model.generate(ids, max_new_tokens=11, do_sample=False)
    begun = model.generate(ids, max_new_tokens=5, do_sample=False, **{argument: cache})
    assert torch.equal(model.generate(begun, max_new_tokens=6, do_sample=False, **{argument: cache}), wanted)
    cache.reset()
    again = model.generate(ids.flip(0), max_new_tokens=5, do_sample=False, **{argument: cache})
    assert torch.equal(again, begun.flip(0))


@torch.no_grad()
def test_going_back() -> None:
    model, ids, cache = make(llama(), "dalle"), tokens(), PatternCache(rewind=3)
    whole = run(model, ids, None)
    model(ids[:, :20], **{ARGUMENT: cache})
    model(ids[:, 3:7], **{ARGUMENT: cache})  # guesses
    with pytest.raises(ValueError, match="position: got 15, which sees keys whose slots later tokens took"):
        cache.crop(-9)
    assert {layer.get_seq_length() for layer in cache.layers} == {24}
    assert all(layer.held.lengths.eq(24).all() for layer in cache.layers)
    cache.crop(-4)
    torch.testing.assert_close(model(ids[:, 20:], **{ARGUMENT: cache}).logits, whole[:, 20:])
    cache.crop(31)  # as older ones say it
    assert cache.get_seq_length() == 31
    torch.testing.assert_close(model(ids[:, 31:], **{ARGUMENT: cache}).logits, whole[:, 31:])
    cache.crop(-LENGTH)
    assert cache.nbytes == cache.get_seq_length() == 0
    torch.testing.assert_close(model(ids, **{ARGUMENT: cache}).logits, whole)
    cache.crop(-1)
    with pytest.warns(UserWarning, match="dalle: 35 tokens, where .* the others' logits are NaN"):
        logits = model(tokens(2, 3), **{ARGUMENT: cache}).logits
    assert logits[:, 1:].isnan().all()
    cache.crop(-2)  # what was guessed beyond the layout
    assert cache.get_seq_length() == LENGTH


@torch.no_grad()
def test_what_it_cannot_keep_is_refused() -> None:
    ids = tokens(2, TEXT)
    for name in ("eager", "sdpa"):
        model, cache = make(llama(), name, torch.float32), PatternCache()
        model(ids, **{ARGUMENT: cache})
        with pytest.raises(ValueError, match="got a PatternCache in a model whose attention does not go by a name of"):
            model(ids[:, :1], **{ARGUMENT: cache})
    model, cache = make(llama(), "dalle_row", torch.float32), PatternCache()
    model(ids, **{ARGUMENT: cache})
    late = torch.ones(2, TEXT + 2, dtype=torch.int64)
    late[0, -1] = 0
    with pytest.raises(ValueError, match="attention_mask: hides tokens after the first call's"):
        model(ids[:, :2], attention_mask=late, **{ARGUMENT: cache})
    with pytest.raises(ValueError, match="copies: got 2 rows in a row that are not copies of one prompt"):
        model(ids, **{ARGUMENT: PatternCache(copies=2)})
    with pytest.raises(ValueError, match="copies: got 3 for 2 rows, wanted a divisor"):
        model(ids, **{ARGUMENT: PatternCache(copies=3)})
    with pytest.raises(ValueError, match="rewind: got -1, wanted an int >= 0"):
        PatternCache(rewind=-1)
    cache = PatternCache()
    model(ids, **{ARGUMENT: cache})
    with pytest.raises(RuntimeError, match="decode_attention has no backward"), torch.enable_grad():
        model(ids[:, :1], **{ARGUMENT: cache})
