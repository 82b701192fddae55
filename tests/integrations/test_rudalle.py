"""ruDALL-E's own models, before and after `accelerate`: masks, outputs, gradients, sampling, and what stays theirs."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle_kernels import Column, Convolution, MaskPattern, Row, TokenLayout
from dalle_kernels.integrations.rudalle import LayerCache, accelerate

from .peers import peer

TEXT, GRID, VOCABULARY, IMAGE_VOCABULARY = 8, 8, 64 + 8, 32
LENGTH = TEXT + GRID * GRID


def make(**changes: Any) -> Any:
    """A small model of theirs: a row, a column, a row and a convolutional layer."""
    torch.manual_seed(0)
    settings = {
        "device": "cpu",
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "embedding_dropout_prob": 0.0,
        "output_dropout_prob": 0.0,
        "attention_dropout_prob": 0.0,
        "text_seq_length": TEXT,
        "image_tokens_per_dim": GRID,
        "cogview_sandwich_layernorm": True,
        "cogview_pb_relax": True,
        "vocab_size": VOCABULARY,
        "image_vocab_size": IMAGE_VOCABULARY,
    }
    model = peer("rudalle.dalle.model").DalleModel(**settings | changes)
    for name, parameter in model.named_parameters():
        if name.endswith("query_key_value.weight"):  # sharper attention than fresh weights give: errors would show
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def pair(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Any]:
    theirs = make(**changes).to("cpu", dtype)
    return theirs, accelerate(copy.deepcopy(theirs))


def inputs(batch: int = 2, image: int = GRID * GRID) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, VOCABULARY - TEXT, (batch, TEXT), generator=generator)
    text[:, TEXT - 3 :] = 0  # ruDALL-E gives each such position a token of its own
    return torch.cat([text, torch.randint(IMAGE_VOCABULARY, (batch, image), generator=generator)], 1)


def causal(batch: int = 2, dtype: torch.dtype = torch.float32, length: int = LENGTH) -> Tensor:
    return torch.ones(batch, 1, length, length, dtype=dtype).tril()


def padded(dtype: torch.dtype = torch.float32) -> Tensor:
    """The second sample's last text tokens are hidden from everyone."""
    mask = causal(dtype=dtype)
    mask[1, :, :, TEXT - 3 : TEXT] = 0
    return mask


@pytest.fixture(autouse=True)
def no_warning_but_expected():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


@pytest.mark.parametrize(("text", "grid"), [(1, 3), (8, 8), (5, 12)])
def test_their_masks_are_our_patterns(text, grid):
    masks, layout = peer("rudalle.dalle.image_attention"), TokenLayout(text, (grid, grid))
    assert torch.equal(masks.get_row_mask(text, grid, is_bool_mask=True), Row(layout).mask())
    assert torch.equal(masks.get_col_mask(text, grid, is_bool_mask=True), Column(layout).mask())
    for kernel in (1, 3, 5, 11):
        for version, boundary in (("v2", "torus"), ("v3", "clamp")):
            wanted = masks.get_conv_mask(text, grid, kernel, is_bool_mask=True, hf_version=version)
            assert torch.equal(wanted, Convolution(layout, kernel, boundary).mask()), (kernel, version)


@pytest.mark.parametrize(("version", "boundary"), [("v2", "torus"), ("v3", "clamp")])
def test_each_layer_finds_its_pattern(version, boundary):
    layout = TokenLayout(TEXT, (16, 16))
    patterns = accelerate(make(hf_version=version, image_tokens_per_dim=16)).transformer._patterns
    assert patterns == [Row(layout), Column(layout), Row(layout), Convolution(layout, 11, boundary)]


@pytest.mark.parametrize("mask", [causal, padded])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hf_version": "v2"},
        {"cogview_pb_relax": False, "is_bool_mask": False},
        {"cogview_sandwich_layernorm": False, "image_tokens_per_dim": 6, "num_layers": 6},
    ],
    ids=["v3", "v2", "no PB-relax", "no sandwich"],
)
def test_outputs_and_gradients_in_float64(changes, mask):
    theirs, ours = pair(torch.float64, **changes)
    ids = inputs(image=theirs.image_seq_length)
    seen = mask(dtype=torch.float64)[:, :, : theirs.total_seq_length, : theirs.total_seq_length]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, seen)[0], theirs(ids, seen)[0], rtol=1e-10, atol=1e-10)
    for model in (theirs, ours):
        model(ids, seen, return_loss=True)[0].backward()
    for (name, wanted), got in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        if wanted.grad is not None:
            torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_outputs_and_gradients_in_float32_to_rounding():
    """At most twice as far from the float64 model as theirs in float32, which PB-relax costs a few bits."""
    exact, (theirs, ours) = make().to("cpu", torch.float64), pair()
    found = []
    for model, dtype in ((exact, torch.float64), (theirs, torch.float32), (ours, torch.float32)):
        logits = model(inputs(), causal(dtype=dtype))[0]
        model(inputs(), causal(dtype=dtype), return_loss=True)[0].backward()
        grads = [parameter.grad.double().flatten() for parameter in model.parameters() if parameter.grad is not None]
        found.append((logits.detach().double(), torch.cat(grads)))
    for wanted, rough, got in zip(*found, strict=True):
        assert (got - wanted).abs().max() <= 2 * (rough - wanted).abs().max() + 1e-6 * wanted.abs().max()


def test_the_same_weights_under_the_same_names():
    theirs = make()
    before = {name: tensor.data_ptr() for name, tensor in theirs.state_dict().items()}
    ours = accelerate(theirs)
    assert ours is theirs
    assert {name: tensor.data_ptr() for name, tensor in ours.state_dict().items()} == before
    assert isinstance(ours, peer("rudalle.dalle.model").DalleModel)
    again = copy.deepcopy(ours)  # as for a moving average of the weights
    del theirs
    with torch.no_grad():
        assert torch.equal(again(inputs(), causal())[0], ours(inputs(), causal())[0])
    kinds = [type(module) for module in ours.modules()]
    assert [type(module) for module in accelerate(ours).modules()] == kinds  # a second time changes nothing


def test_loaded_masks_are_read_again():
    torus = make(hf_version="v2", image_tokens_per_dim=16)
    ours = accelerate(make(hf_version="v3", image_tokens_per_dim=16))
    ours.load_state_dict(torus.state_dict())
    assert ours.transformer._patterns[-1] == Convolution(TokenLayout(TEXT, (16, 16)), 11, "torus")
    odd = torus.state_dict()
    odd["transformer.row_mask"][:, 3:5] = torch.eye(TEXT + 256, dtype=torch.bool)[:, 3:5]
    ours.load_state_dict(odd)
    assert ours.transformer._patterns[0] == MaskPattern(odd["transformer.row_mask"])


def test_gradient_checkpointing_gives_the_same_gradients():
    """Ours only: their own call fails in 1.1.3, which passes its layers an argument that they do not take."""
    ours = accelerate(make(output_dropout_prob=0.1))
    grads = []
    for segments in (None, 2):
        ours.zero_grad()
        torch.manual_seed(3)
        ours(inputs(), causal(), return_loss=True, gradient_checkpointing=segments)[0].backward()
        grads.append([parameter.grad for parameter in ours.parameters() if parameter.grad is not None])
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_one_mask_serves_a_batch():
    theirs, ours = pair(torch.float64)
    for mask in (causal(1, torch.float64), padded(torch.float64)[1:]):
        with torch.no_grad():
            got, wanted = ours(inputs(), mask)[0], theirs(inputs(), mask)[0]
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


class Graphs:
    """A compiler that counts its graphs."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.made = 0

    def __call__(self, graph: Any, _: Any) -> Any:
        self.made += 1
        return graph.forward


@pytest.mark.parametrize("mask", [causal, padded])
def test_a_training_call_is_one_graph(mask):
    theirs, ours = pair(torch.float64)
    seen, graphs = mask(dtype=torch.float64), Graphs()
    compiled = torch.compile(ours, backend=graphs, fullgraph=True)
    got, wanted = (model(inputs(), seen, return_loss=True)[0] for model in (compiled, theirs))
    assert graphs.made == 1
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    with pytest.raises(RuntimeError, match="attention_mask: a compiled model wants a causal one"):
        compiled(inputs(), window(seen), return_loss=True)


def test_sampling_compiles():
    """A graph for the prompt, one for the first token, and one for all others."""
    _, ours = pair()
    wanted, graphs = greedy(ours, inputs(image=0)), Graphs()
    assert torch.equal(greedy(torch.compile(ours, backend=graphs), inputs(image=0)), wanted)
    assert graphs.made == 3


# --- What ruDALL-E's own code serves ----------------------------------------------------------------------------------


def test_attention_dropout_stays_theirs_in_training_alone():
    theirs, ours = pair(torch.float64, attention_dropout_prob=0.2)
    mask = causal(dtype=torch.float64)
    with torch.no_grad():
        got, wanted = ours.eval()(inputs(), mask)[0], theirs.eval()(inputs(), mask)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    results = []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(5)
        if model is ours:
            with pytest.warns(UserWarning, match=r"attention_dropout_prob=0\.2; make the model with"):
                results.append(model(inputs(), mask)[0])
        else:
            results.append(model(inputs(), mask)[0])
    assert torch.equal(*results)


def window(mask: Tensor) -> Tensor:
    return mask.triu(-20)


def fractions(mask: Tensor) -> Tensor:
    return mask * 0.5


def first_key_hidden(mask: Tensor) -> Tensor:
    mask = mask.clone()
    mask[..., 0] = 0  # the first query sees nothing, and theirs then averages over every token, later ones too
    return mask


def hidden_but_from_itself(mask: Tensor) -> Tensor:
    mask = mask.clone()
    mask[..., 5] = 0
    mask[..., 5, 5] = 1
    return mask


@pytest.mark.parametrize("change", [window, fractions, first_key_hidden, hidden_but_from_itself])
def test_other_masks_stay_theirs(change):
    theirs, ours = pair()
    with pytest.warns(UserWarning, match="attention_mask is not a causal mask with"):
        got = ours(inputs(), change(causal()))[0]
    assert torch.equal(got, theirs(inputs(), change(causal()))[0])


@pytest.mark.parametrize("mask", [padded, lambda: window(causal())], ids=["padding", "window"])
def test_caches_with_other_masks_stay_theirs(mask):
    theirs, ours = pair()
    ids, caches = inputs(), [None, None]
    with torch.no_grad():
        for stop in (TEXT + 20, TEXT + 21, TEXT + 24):
            wanted, caches[0] = theirs(ids[:, :stop], mask(), use_cache=True, cache=caches[0])
            if caches[1] is None:
                with pytest.warns(UserWarning, match="attention_mask"):
                    got, caches[1] = ours(ids[:, :stop], mask(), use_cache=True, cache=caches[1])
            else:  # goes on as it began, and has said so
                got, caches[1] = ours(ids[:, :stop], mask(), use_cache=True, cache=caches[1])
            assert torch.equal(got, wanted)


def test_a_cache_with_gradients_stays_theirs():
    theirs, ours = pair()
    with pytest.warns(UserWarning, match=r"torch\.no_grad"):
        got, cache = ours(inputs()[:, :30], causal(), use_cache=True)
    assert torch.equal(got, theirs(inputs()[:, :30], causal(), use_cache=True)[0])
    assert isinstance(cache[0], tuple)


# --- Sampling ---------------------------------------------------------------------------------------------------------


def greedy(model: Any, ids: Tensor, use_cache: bool = True) -> Tensor:
    """What `generate_images` does, taking the likeliest token."""
    mask, cache = causal(len(ids)), None
    with torch.no_grad():
        while ids.shape[1] < LENGTH:
            logits, cache = model(ids, mask, use_cache=use_cache, cache=cache, return_loss=False)
            ids = torch.cat([ids, logits[:, -1, VOCABULARY:].argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("prompt", [0, 13])
def test_greedy_sampling_token_for_token(version, prompt):
    theirs, ours = pair(hf_version=version)
    ids = inputs(image=prompt)
    wanted = greedy(theirs, ids)
    assert len(wanted[:, TEXT:].unique()) > 4  # no constant picture
    assert torch.equal(greedy(ours, ids), wanted)
    assert torch.equal(greedy(ours, ids, use_cache=False), wanted)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_cached_logits_are_those_of_the_whole(version):
    _, ours = pair(torch.float64, hf_version=version)
    ids, mask, cache = inputs(), causal(dtype=torch.float64), {}
    ahead = version == "v2"  # of the tokens, by the one that v2 puts first
    with torch.no_grad():
        whole, before = ours(ids[:, :-ahead] if ahead else ids, mask)[0], 0
        for stop in (TEXT, TEXT + 1, TEXT + 2, TEXT + 9, TEXT + 10, LENGTH - ahead):
            logits, returned = ours(ids[:, :stop], mask, use_cache=True, cache=cache)
            assert returned is cache  # theirs fills the caller's dict as well
            assert logits.shape[1] == stop + ahead - before
            torch.testing.assert_close(logits, whole[:, before : stop + ahead], rtol=1e-10, atol=1e-10)
            before = stop + ahead
    assert all(isinstance(layer, LayerCache) for layer in cache.values())
    assert cache[0].keys.shape[2] == TEXT + GRID + 1  # a row layer keeps no more than a row


def test_half_precision_wrapper():
    module = peer("rudalle.dalle.fp16").FP16Module(make())
    wanted = greedy_module(module)
    assert accelerate(module) is module
    got = greedy_module(module)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0.02)  # float16 on the way, logits of about 1


def greedy_module(module: Any) -> Tensor:
    ids, mask = inputs(), causal()
    with torch.no_grad():
        logits = [module(ids, mask)[0]]
        cache = None
        for stop in (TEXT + 3, TEXT + 4):
            step, cache = module(ids[:, :stop], mask, use_cache=True, cache=cache)
            logits.append(step[:, -1:])
    assert logits[0].dtype == torch.float32
    return torch.cat(logits, 1)


class Tokenizer:
    def encode_text(self, text: str, text_seq_length: int) -> Tensor:
        return torch.tensor([ord(letter) % 50 + 1 for letter in text.ljust(text_seq_length)[:text_seq_length]])


class Vae:
    """Keeps the tokens that it should have decoded."""

    def __init__(self):
        self.tokens = []

    def decode(self, tokens: Tensor) -> Tensor:
        self.tokens.append(tokens)
        return tokens


@pytest.mark.parametrize("prompted", [False, True])
def test_generate_images_runs_unchanged(prompted, monkeypatch):
    pipelines = peer("rudalle.pipelines")
    chunks = SimpleNamespace(
        chunked=lambda items, size: [list(items)[at : at + size] for at in range(0, len(items), size)]
    )
    likeliest = SimpleNamespace(
        top_k_top_p_filtering=lambda logits, top_k, top_p: logits.masked_fill(
            logits < logits.topk(top_k)[0][:, -1:], -torch.inf
        )
    )
    utils = SimpleNamespace(torch_tensors_to_pil_list=list, seed_everything=torch.manual_seed)
    for name, stand_in in (("more_itertools", chunks), ("transformers", likeliest), ("utils", utils)):
        monkeypatch.setattr(pipelines, name, stand_in)
    monkeypatch.setattr(pipelines, "tqdm", lambda items: items)
    prompts = None
    if prompted:  # two whole rows and the left part of the others, as ImagePrompts' borders give
        index = {cell for cell in range(GRID * GRID) if cell < 2 * GRID or cell % GRID < 3}
        prompts = SimpleNamespace(image_prompts_idx=index, image_prompts=inputs(1)[:, TEXT:])
    theirs, ours = pair()
    drawn = []
    for model in (theirs, ours):
        vae = Vae()
        _, scores = pipelines.generate_images(
            "кот", Tokenizer(), model.eval(), vae, top_k=3, top_p=1.0, images_num=3, bs=2, seed=7, image_prompts=prompts
        )
        drawn.append((torch.cat(vae.tokens), scores))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert drawn[1][1] == pytest.approx(drawn[0][1], rel=1e-4)


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input():
    with pytest.raises(TypeError, match="model: got Linear, wanted a rudalle DalleModel"):
        accelerate(torch.nn.Linear(2, 2))
    ours, ids, mask = accelerate(make()), inputs(), causal()
    with pytest.raises(ValueError, match="gradient_checkpointing: got it with use_cache"), torch.no_grad():
        ours(ids, mask, use_cache=True, gradient_checkpointing=2)
    with torch.no_grad():
        _, cache = ours(ids[:, :20], mask, use_cache=True)
        with pytest.raises(ValueError, match="return_loss: got True with a cache"):
            ours(ids[:, :21], mask, return_loss=True, use_cache=True, cache=cache)
        with pytest.raises(ValueError, match="input_ids: got 20 tokens, wanted more than the 20"):
            ours(ids[:, :20], mask, use_cache=True, cache=cache)
        with pytest.raises(ValueError, match="cannot go on: attention_mask hides keys"):
            ours(ids[:, :21], padded(), use_cache=True, cache=cache)
        with pytest.raises(ValueError, match=r"got shape \(1, 2, 1, 32\), wanted \(2, 2, 1, 32\) to suit the cache"):
            ours(ids[:1, :21], mask[:1], use_cache=True, cache=cache)
    with pytest.raises(ValueError, match="cannot go on: sampling with a cache has a gradient only there"):
        ours(ids[:, :21], mask, use_cache=True, cache=cache)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_candidates_of_one_caption_are_run_and_kept_once(version: str) -> None:
    ours = pair(torch.float64, hf_version=version)[1].eval()
    ids, mask = inputs()[:1].repeat(5, 1), causal(5, torch.float64)
    ids[:, TEXT + 9 :] = inputs(5)[:, TEXT + 9 :]
    rows: list[int] = []
    hook = ours.transformer.layers[0].register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    cache = None
    with torch.no_grad():
        whole = ours(ids, mask)[0]
        for stop in (TEXT + 9, TEXT + 10, TEXT + 12):
            logits, cache = ours(ids[:, :stop], mask, use_cache=True, cache=cache)
            logits /= 2  # as `generate_images` does
            torch.testing.assert_close(
                logits, whole[:, stop + (version == "v2") - logits.shape[1] :][:, : logits.shape[1]] / 2
            )
    hook.remove()
    assert rows == [5, 1, 5, 5]
    assert cache[0].shared_keys.shape[0] == 1
    assert cache[0].keys.shape[0] == 5
    for different in (ids[:, : TEXT + 11], ids[:1]):  # rows that differ, and one alone
        with torch.no_grad():
            _, cache = ours(different, mask[: len(different)], use_cache=True)
        assert cache[0].shared_keys is None
    with torch.no_grad():
        _, cache = ours.train()(ids[:, : TEXT + 9], mask, use_cache=True)
    assert cache[0].shared_keys is None
