"""Hugging Face's own models with our attention, against theirs with the pattern's dense mask: SDPA where float64
counts, since some eager attentions compute their softmax in float32, and eager for what they generate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    StaticCache,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dalle_kernels import (
    AxialRow,
    Causal,
    Column,
    Convolution,
    MaskPattern,
    Pattern,
    Row,
    TokenLayout,
    dalle_pattern_schedule,
)
from dalle_kernels.integrations.transformers import register, register_patterns
from dalle_kernels.integrations.transformers_cache import ARGUMENT

TEXT, VOCABULARY, LAYERS = 8, 40, 4
LAYOUT = TokenLayout(TEXT, (5, 5))
LENGTH = LAYOUT.length
SINGLE = {
    "dalle_causal": Causal(LAYOUT),
    "dalle_row": Row(LAYOUT),
    "dalle_column": Column(LAYOUT),
    "dalle_axial_row": AxialRow(LAYOUT),
    "dalle_convolution": Convolution(LAYOUT, 3),
}
PATTERNS = {"dalle": dalle_pattern_schedule(LAYERS, LAYOUT, 3)} | {
    name: (pattern,) * LAYERS for name, pattern in SINGLE.items()
}


@pytest.fixture(autouse=True)
def registered(attention_names: None) -> None:
    """Each test begins with the names of one layout."""
    assert set(register(LAYOUT, kernel_size=3)) == set(PATTERNS)


def llama(**changes: Any) -> LlamaConfig:
    """Two query heads to a key head."""
    settings = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    common = {"num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "eos_token_id": None, "pad_token_id": 0}
    # Larger weights than usual: sharp attention, and tokens that differ.
    return LlamaConfig(**settings | common | {"initializer_range": 0.3} | changes)


def gpt2(**changes: Any) -> GPT2Config:
    settings = {"n_embd": 64, "n_head": 4, "n_layer": LAYERS, "n_positions": 64, "attn_pdrop": 0.0}
    dropouts = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "scale_attn_by_inverse_layer_idx": True}
    common = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return GPT2Config(**settings | dropouts | common | {"initializer_range": 0.3} | changes)


def gemma2(**changes: Any) -> Gemma2Config:
    """Scores softly capped where they are."""
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": None, "query_pre_attn_scalar": 4}
    layers = {"layer_types": ["full_attention"] * LAYERS, "head_dim": 16}
    return Gemma2Config(**llama().to_diff_dict() | {"model_type": "gemma2"} | caps | layers | changes)


def make(config: Any, name: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=name).to(dtype).eval()
    for holder in list(model.modules()):
        for child, module in list(holder.named_children()):
            if isinstance(module, LlamaRMSNorm):  # it computes in float32 whatever it gets; torch's does not
                norm = torch.nn.RMSNorm(len(module.weight), module.variance_epsilon, dtype=dtype)
                norm.weight = module.weight
                setattr(holder, child, norm)
    return model


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def shown(side: str, length: int = LENGTH) -> Tensor:
    """An attention_mask whose second sample lacks three text tokens, on that side of the text."""
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, slice(0, 3) if side == "left" else slice(TEXT - 3, TEXT)] = 0
    return mask


@contextmanager
def masked(model: Any, patterns: Sequence[Pattern], mask: Tensor | None = None) -> Iterator[None]:
    """The model's own attention sees each layer's dense mask, with the padding's keys taken out."""

    def replace(module: Any, arguments: Any, named: dict[str, Any]) -> Any:
        length = named["hidden_states"].shape[1] if "hidden_states" in named else arguments[0].shape[1]
        seen = patterns[module.layer_idx].mask(length)[None, None]
        if mask is not None:
            seen = seen & mask.bool()[:, None, None, :length]
        if model.config._attn_implementation == "eager":
            dtype = next(module.parameters()).dtype
            seen = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        return arguments, named | {"attention_mask": seen}

    layers = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "is_causal")]
    assert len(layers) == len(patterns)
    hooks = [layer.register_forward_pre_hook(replace, with_kwargs=True) for layer in layers]
    yield
    for hook in hooks:
        hook.remove()


def run(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Logits without a cache; places count from the first token that is shown, as in `generate`."""
    places = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    return model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits


def logits_and_grads(model: Any, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    real = torch.ones(2, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    logits = run(model, tokens(), mask)[real]
    model.zero_grad()
    torch.nn.functional.cross_entropy(logits, tokens().flip(1)[real]).backward()
    return logits.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize(
    ("config", "name"),
    [*[(llama, name) for name in PATTERNS], (gpt2, "dalle")],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_outputs_and_gradients_in_float64(config, name, side):
    mask = side and shown(side)
    ours, theirs = make(config(), name).train(), make(config(), "sdpa").train()
    with masked(theirs, PATTERNS[name], mask):
        wanted = logits_and_grads(theirs, mask)
    torch.testing.assert_close(logits_and_grads(ours, mask), wanted, rtol=1e-10, atol=1e-10)


def test_outputs_and_gradients_in_float32_to_rounding():
    exact, rough = make(llama(), "sdpa"), make(llama(), "sdpa").float()
    found = []
    for model in (exact, rough):
        with masked(model, PATTERNS["dalle"]):
            found.append(logits_and_grads(model, None))
    found.append(logits_and_grads(make(llama(), "dalle").float(), None))
    for wanted, theirs, got in zip(*found, strict=True):
        assert (got - wanted).abs().max() <= 2 * (theirs - wanted).abs().max() + 1e-6 * wanted.abs().max()


def test_gradient_checkpointing():
    model = make(llama(), "dalle").train()
    wanted = logits_and_grads(model, shown("left"))
    model.activation_checkpointing_enable()
    torch.testing.assert_close(logits_and_grads(model, shown("left")), wanted, rtol=0, atol=1e-14)


def new_cache(kind: str, config: Any) -> Any:
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=LENGTH + 4)


@pytest.mark.parametrize("chunk", [5, 64])  # from so many tokens on they are sparse_attention's
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_prompt_and_steps_are_the_whole(kind, side, chunk, monkeypatch):
    monkeypatch.setattr("dalle_kernels.integrations.transformers._CHUNK", chunk)
    config, ids, mask = llama(), tokens(), side and shown(side)
    model, cache = make(config, "dalle"), new_cache(kind, llama())
    with torch.no_grad():
        whole = run(model, ids, mask)
        stops = [TEXT, TEXT + 1, TEXT + 2, TEXT + 7, TEXT + 8, LENGTH]
        for start, stop in zip([0, *stops], stops, strict=False):
            places = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
            seen = None if mask is None else mask[:, :stop]
            got = model(ids[:, start:stop], attention_mask=seen, position_ids=places, **{ARGUMENT: cache}).logits
            real = slice(None) if seen is None else seen[:, start:].bool()
            torch.testing.assert_close(got[real], whole[:, start:stop][real], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize(
    ("config", "name"), [(llama, "dalle"), (gpt2, "dalle"), (gemma2, "dalle"), (llama, "dalle_column")]
)
def test_greedy_generation_token_for_token(config, name, side, cache):
    prompt = shown(side, TEXT) if side else torch.ones(2, TEXT, dtype=torch.int64)
    ids, new = tokens(length=TEXT) * prompt, LENGTH - TEXT
    model, eager = make(config(), name, torch.float32), make(config(), "eager", torch.float32)
    got = model.generate(
        ids,
        attention_mask=prompt,
        max_new_tokens=new,
        do_sample=False,
        cache_implementation=cache,
        disable_compile=True,
    )
    wanted, mask = ids, torch.cat([prompt, torch.ones(2, new, dtype=torch.int64)], 1)
    with torch.no_grad(), masked(eager, PATTERNS[name], mask):
        for length in range(TEXT, LENGTH):
            logits = run(eager, wanted, mask[:, :length])
            wanted = torch.cat([wanted, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert len(wanted[:, TEXT:].unique()) > 4
    assert torch.equal(got, wanted)


def test_a_soft_cap_makes_a_difference_and_its_gradients_are_right():
    """Their eager attention takes its softmax in float32; SDPA has no cap."""
    found = []
    for name in ("dalle", "eager"):
        model = make(gemma2(), name, torch.float32).train()
        if name == "dalle":
            found.append(logits_and_grads(model, shown("left")))
            continue
        with masked(model, PATTERNS["dalle"], shown("left")):
            found.append(logits_and_grads(model, shown("left")))
    for got, wanted in zip(*found, strict=True):
        assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    without = logits_and_grads(make(gemma2(attn_logit_softcapping=None), "dalle", torch.float32), shown("left"))
    assert (without[0] - found[0][0]).abs().max() > 0.1 * found[0][0].abs().max()


def test_other_layouts_patterns_and_schedules_have_their_own_names():
    wide = TokenLayout(TEXT, (3, 9))
    assert register(wide, "wide") == (
        "wide",
        "wide_causal",
        "wide_row",
        "wide_column",
        "wide_axial_row",
        "wide_convolution",
    )
    mixed = (Convolution(LAYOUT, 3, "clamp"), Row(LAYOUT), MaskPattern(Column(LAYOUT).mask()), Causal(LAYOUT))
    register_patterns("mixed", mixed)
    register_patterns("torus", Convolution(LAYOUT, 3, "torus"))
    for name, patterns in {
        "wide": dalle_pattern_schedule(LAYERS, wide),
        "mixed": mixed,
        "torus": (Convolution(LAYOUT, 3, "torus"),) * LAYERS,
    }.items():
        model = make(llama(), "sdpa")
        with torch.no_grad():
            with masked(model, patterns):
                wanted = run(model, tokens(), None)
            model.set_attn_implementation(name)  # of a model that is there already
            torch.testing.assert_close(run(model, tokens(), None), wanted, rtol=1e-10, atol=1e-10)


def test_names_keep_their_meaning():
    register(LAYOUT, kernel_size=3)  # the same again
    with pytest.raises(ValueError, match="name: 'dalle' already stands for"):
        register(LAYOUT, kernel_size=5)
    register_patterns("one_row", Row(LAYOUT))
    with pytest.raises(ValueError, match="name: 'one_row' already stands for"):
        register_patterns("one_row", Column(LAYOUT))
    with pytest.raises(ValueError, match="name: 'one_row' already stands for"):
        register(TokenLayout(2, (2, 2)), "one")
    assert "one" not in AttentionInterface()  # all names or none
    for name in ("my_sdpa", "flash_row", "a/b", "Row", ""):
        with pytest.raises(ValueError, match=f"name: got '{name}"):
            register_patterns(name, Row(LAYOUT))
    with pytest.raises(TypeError, match="layout: got tuple"):
        register((8, 5, 5), "three")
    for patterns in ([], 5, [Row(LAYOUT), "row"]):
        with pytest.raises(TypeError, match="patterns: got"):
            register_patterns("none", patterns)
    with pytest.raises(ValueError, match="kernel_size: got 4"):
        register(LAYOUT, "even", kernel_size=4)


def test_what_cannot_be_served_is_refused():
    ids, mask = tokens(), torch.ones(2, LENGTH, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"dropout: got 0\.1, wanted 0\.0: dalle_row drops no attention; set attention_d"
    ):
        make(gpt2(attn_pdrop=0.1), "dalle_row").train()(ids)
    model = make(llama(), "dalle_row")
    with pytest.raises(
        ValueError, match=r"attention_mask: got torch.float64 of shape \(2, 1, 33, 33\), wanted 0 and 1"
    ):
        model(ids, attention_mask=torch.zeros(2, 1, LENGTH, LENGTH, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"attention_mask: got torch.int32 of shape \(2, 1, 1, 1\), wanted 0 and 1"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1, 1, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="attention_mask: this call asks for more than a causal mask"):
        model(ids, position_ids=torch.arange(LENGTH).remainder(10)[None], use_cache=False)
    with pytest.raises(ValueError, match="dalle_row: got 35 tokens, wanted at most 33, the length of Row"):
        model(tokens(length=LENGTH + 2))
    with pytest.raises(ValueError, match="output_attentions: got True, but dalle_row never makes the weights"):
        model(ids, output_attentions=True)
    sliding = MistralConfig(**llama().to_diff_dict() | {"sliding_window": 4, "model_type": "mistral"})
    with pytest.raises(ValueError, match="attention_mask: this call asks for more than a causal mask"):
        make(sliding, "dalle_row")(ids, attention_mask=mask)
    q = torch.randn(1, 4, LENGTH, 16)
    for argument in ("s_aux", "position_bias", "cache", "cu_seq_lens_q"):
        with pytest.raises(ValueError, match=f"{argument}: Module passes one, which dalle_row does not take"):
            AttentionInterface()["dalle_row"](torch.nn.Module(), q, q, q, None, **{argument: 1.0})
    with pytest.raises(ValueError, match="dalle_row: Module is not causal"):
        AttentionInterface()["dalle_row"](torch.nn.Module(), q, q, q, None, is_causal=False)
    register_patterns("three", (Row(LAYOUT),) * 3)
    with pytest.raises(ValueError, match="three: got 3 patterns, wanted 4, one for each layer"):
        make(llama(), "three")(ids)
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    register_patterns("later", MaskPattern(later))
    with pytest.raises(ValueError, match=r"pattern: .* lets a query see later keys, so it cannot be decoded"):
        make(llama(), "later").generate(ids[:, :TEXT], max_new_tokens=2, do_sample=False)


# --- Generation of every kind -----------------------------------------------------------------------------------------


@pytest.fixture
def dense_row() -> str:
    """A name under which SDPA attends by the row pattern's dense mask, in calls of every kind."""
    from transformers import AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    row = torch.eye(LENGTH + 20, dtype=torch.bool)
    row[:LENGTH, :LENGTH] = Row(LAYOUT).mask()

    def mask(**named: Any) -> Tensor:
        first, keys = int(named["q_offset"]), named["kv_length"]
        seen = row[first : first + named["q_length"], :keys]
        return sdpa_mask(**named | {"allow_is_causal_skip": False}) & seen

    AttentionInterface.register("dense_row", sdpa_attention_forward)
    AttentionMaskInterface.register("dense_row", mask)
    return "dense_row"


GENERATION: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "beams of a static cache": {"num_beams": 3, "cache_implementation": "static", "disable_compile": True},
    "several beams": {"num_beams": 3, "num_return_sequences": 2, "early_stopping": True, "length_penalty": 0.5},
    "sampled beams": {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 4},
    "filters": {"do_sample": True, "top_k": 9, "top_p": 0.9, "min_p": 0.05, "temperature": 0.7},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[5]], "min_new_tokens": 5},
    "guidance": {"guidance_scale": 2.0},
    "no cache": {"use_cache": False},
    "a prompt in chunks": {"prefill_chunk_size": 3},
    "assisted": {"assistant_model": True},
    "assisted samples": {"assistant_model": True, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 1},
}


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("kind", GENERATION)
def test_generation_of_every_kind_token_for_token(kind: str, side: str | None, dense_row: str) -> None:
    named = {"do_sample": False, "max_new_tokens": LENGTH - TEXT} | GENERATION[kind]
    ids, shows = tokens(length=TEXT), torch.ones(2, TEXT, dtype=torch.int64) if side is None else shown(side, TEXT)
    if "assistant_model" in named or "prompt_lookup_num_tokens" in named:  # a batch of one, in transformers
        ids, shows = ids[1:], shows[1:]
    drawn = []
    for name in ("dalle_row", dense_row):
        model = make(llama(), name, torch.float32)
        if "assistant_model" in named:
            named["assistant_model"] = make(llama(initializer_range=0.32), name, torch.float32)
        torch.manual_seed(5)
        drawn.append(model.generate(ids, attention_mask=shows, **named))
    assert drawn[0].shape[1] == LENGTH
    assert len(drawn[0][:, TEXT:].unique()) > 4
    assert torch.equal(*drawn)


@pytest.mark.filterwarnings("error:dalle_row")
def test_no_more_tokens_than_the_layout_has() -> None:
    """The last token that is drawn need not be attended to, so one more than the layout has can be drawn."""
    model, ids = make(llama(), "dalle_row", torch.float32), tokens(1, TEXT)
    named = {"do_sample": False, "attention_mask": torch.ones_like(ids)}
    lookup = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    most = LENGTH - TEXT + 1
    plain = model.generate(ids, max_new_tokens=most, **named)
    with pytest.warns(UserWarning, match=r"dalle_row: 3\d tokens, where Row.* has 33: the others' logits are NaN"):
        assert torch.equal(model.generate(ids, max_new_tokens=most, **named, **lookup), plain)
    with pytest.raises(ValueError, match="dalle_row: got 34 tokens, wanted at most 33"):
        model.generate(ids, max_new_tokens=most + 1, **named)
    cache = DynamicCache(config=llama())
    model(tokens(1, LENGTH - 2), **{ARGUMENT: cache})
    with pytest.warns(UserWarning, match="dalle_row: 35 tokens"):
        logits = model(tokens(1, 4), **{ARGUMENT: cache}).logits
    assert logits[:, :2].isfinite().all()
    assert logits[:, 2:].isnan().all()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_goes_on_in_the_next_call(kind: str) -> None:
    model, ids, cache = make(llama(), "dalle", torch.float32), tokens(length=TEXT), new_cache(kind, llama())
    named = {"do_sample": False, "disable_compile": True}
    wanted = model.generate(ids, max_new_tokens=11, **named)
    begun = model.generate(ids, max_new_tokens=5, **{ARGUMENT: cache}, **named)
    assert torch.equal(model.generate(begun, max_new_tokens=6, **{ARGUMENT: cache}, **named), wanted)
    cache.reset()
    assert torch.equal(model.generate(ids.flip(0), max_new_tokens=5, **{ARGUMENT: cache}, **named), begun.flip(0))


# --- Windows, compilers, weights --------------------------------------------------------------------------------------


def gemma(*kinds: str) -> Any:
    changes = {"layer_types": list(kinds), "sliding_window": 4, "head_dim": 16, "model_type": "gemma3_text"}
    return Gemma3TextConfig(**llama().to_diff_dict() | changes)


def test_only_layers_with_a_window_are_refused() -> None:
    full = make(gemma(*["full_attention"] * 4), "dalle", torch.float32)
    with torch.no_grad():
        whole = full(tokens()).logits
        assert whole.isfinite().all()
    assert full.generate(tokens(length=TEXT), max_new_tokens=9, do_sample=False).shape == (2, TEXT + 9)
    with pytest.raises(ValueError, match="attention_mask: this call asks for more than a causal mask"):
        make(gemma(*["full_attention", "sliding_attention"] * 2), "dalle", torch.float32)(tokens())


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_window_wider_than_the_sequence_is_none(kind: str) -> None:
    wide = MistralConfig(**llama().to_diff_dict() | {"sliding_window": LENGTH + 4, "model_type": "mistral"})
    model, plain = make(wide, "dalle", torch.float32), make(llama(), "dalle", torch.float32)
    plain.load_state_dict(model.state_dict())
    named = {"max_new_tokens": LENGTH - TEXT, "do_sample": False, "disable_compile": True, "cache_implementation": kind}
    assert torch.equal(*(one.generate(tokens(length=TEXT), **named) for one in (model, plain)))


@pytest.mark.parametrize("config", [llama, gpt2])
def test_weights_of_attention_are_refused_however_they_are_asked_for(config: Any) -> None:
    model = make(config(), "dalle_row", torch.float32)
    with pytest.raises(ValueError, match="output_attentions: got True, but dalle_row never makes the weights"):
        model(tokens(), output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions: got True"):
        model.generate(tokens(length=TEXT), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    model.config._output_attentions = True  # as a configuration that was loaded says it
    with pytest.raises(ValueError, match="output_attentions: got True"):
        model(tokens())


class Graphs:
    """A compiler that counts its graphs."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.made = 0

    def __call__(self, graph: Any, _: Any) -> Any:
        self.made += 1
        return graph.forward


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", ["dalle", "dalle_row"])
def test_a_training_call_is_one_graph(name: str, side: str | None) -> None:
    model, ids, graphs = make(llama(), name), tokens(), Graphs()
    named = {"labels": ids, "use_cache": False, "attention_mask": None if side is None else shown(side)}
    wanted = model(ids, **named)
    got = torch.compile(model, backend=graphs, fullgraph=True)(ids, **named)
    assert graphs.made == 1
    torch.testing.assert_close(got.loss, wanted.loss, rtol=0, atol=0)
    packed = torch.arange(LENGTH).remainder(10)[None]
    with pytest.raises(RuntimeError, match="attention_mask: packed sequences or a sliding window"):
        torch.compile(model, backend=graphs)(ids, position_ids=packed, use_cache=False)


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize(("kind", "graphs"), [("static", 2), ("dynamic", 3)])
def test_generation_compiles_without_asking_for_the_position(kind: str, graphs: int, side: str | None) -> None:
    """fullgraph: nothing waits for a value of the device. A prompt is a graph, and a token (a growing cache: two)."""
    model, ids, counted = make(llama(), "dalle", torch.float32), tokens(length=TEXT), Graphs()
    shows = torch.ones_like(ids) if side is None else shown(side, TEXT)
    named = {"attention_mask": shows, "max_new_tokens": LENGTH - TEXT, "do_sample": False, "disable_compile": True}
    wanted = model.generate(ids, **named)
    model.forward = torch.compile(model.forward, backend=counted, fullgraph=True)
    assert torch.equal(model.generate(ids, cache_implementation=kind, **named), wanted)
    assert counted.made == graphs


def test_tokens_at_a_position_that_the_host_does_not_know() -> None:
    """Several tokens of a static cache, compiled."""
    model, ids = make(llama(), "dalle"), tokens()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        step = torch.compile(model, backend=Graphs(), fullgraph=True)
        cache = new_cache("static", llama())
        model(ids[:, : TEXT + 3], **{ARGUMENT: cache})
        for start, stop in ((TEXT + 3, TEXT + 8), (TEXT + 8, TEXT + 13), (TEXT + 13, TEXT + 14)):
            got = step(ids[:, start:stop], **{ARGUMENT: cache}).logits
            torch.testing.assert_close(got, whole[:, start:stop], rtol=1e-10, atol=1e-10)


def test_whatever_else_reads_the_mask_is_an_error() -> None:
    from dalle_kernels.integrations.transformers import _Mask

    mask, scores = _Mask("bloom", 0, None), torch.randn(2, 1, 4, 4)
    uses = [
        lambda: scores + mask,
        lambda: mask + scores,
        lambda: scores.masked_fill(mask, 0),
        lambda: torch.where(mask, scores, 0),
        lambda: mask[:, :, :, :4],
        lambda: mask.to(torch.float32),
        lambda: mask == 0,
        lambda: ~mask,
        lambda: (1 - mask) * 3,
        lambda: torch.nn.functional.scaled_dot_product_attention(scores, scores, scores, attn_mask=mask),
        lambda: bool(mask),
        lambda: mask.shape,
    ]
    for use in uses:
        with pytest.raises(ValueError, match="attn_implementation: bloom computes attention itself"):
            use()
