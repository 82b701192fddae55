"""The transformer: its stream, its losses, its patterns, and the 12-billion preset."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dalle_reference import dvae
from dalle_reference.load import require_grid
from dalle_reference.transformer import NO_TOKEN, PRESETS, DalleTransformer, Recompute, TransformerConfig
from torch.utils._python_dispatch import TorchDispatchMode

from dalle_kernels import AxialRow, Causal, Column, Convolution, Fixed, Row, Strided, dalle_pattern_schedule

TINY = TransformerConfig(vocab_text=30, text_length=6, grid=(4, 3), vocab_image=20, layers=3, heads=2, head_dim=16)


def make(config: TransformerConfig = TINY, std: float = 0.1) -> DalleTransformer:
    """A model whose weights are large enough for every input to matter."""
    torch.manual_seed(0)
    model = DalleTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    return model


def batch(config: TransformerConfig = TINY) -> tuple[torch.Tensor, torch.Tensor]:
    """A short caption, a full one and an empty one, with pictures."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(config.vocab_text, (3, config.caption_length), generator=generator)
    text[0, 2:] = NO_TOKEN
    text[2] = NO_TOKEN
    return text, torch.randint(config.vocab_image, (3, config.image_length), generator=generator)


def plain_logits(model: DalleTransformer, text: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The model said again, token by token and with dense masks, in plain PyTorch."""
    config, weights = model.config, dict(model.named_parameters())
    rows = []
    for caption, picture in zip(text.tolist(), image.tolist(), strict=True):
        stream = []
        for position, token in enumerate([NO_TOKEN, *caption]):
            row = config.vocab_text + position if token == NO_TOKEN else token
            stream.append(weights["text_embedding.weight"][row] + weights["text_position"][position])
        for cell, token in enumerate(picture):
            row, column = divmod(cell, config.grid[1])
            position = weights["row_position"][row, 0] + weights["column_position"][0, column]
            stream.append(weights["image_embedding.weight"][token] + position)
        rows.append(torch.stack(stream))
    x = torch.stack(rows)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (config.width,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    patterns = dalle_pattern_schedule(config.layers, config.layout)
    for layer, pattern in enumerate(patterns):
        name = f"blocks.{layer}"
        qkv = linear(norm(x, f"{name}.attention_norm"), f"{name}.attention.project_qkv")
        heads = [part.unflatten(-1, (config.heads, config.head_dim)).transpose(1, 2) for part in qkv.chunk(3, -1)]
        scores = heads[0] @ heads[1].transpose(-1, -2) * config.head_dim**-0.5
        weight = scores.masked_fill(~pattern.mask(), float("-inf")).softmax(-1)
        x = x + linear((weight @ heads[2]).transpose(1, 2).flatten(2), f"{name}.attention.project_out")
        inner = F.gelu(linear(norm(x, f"{name}.mlp_norm"), f"{name}.expand"), approximate="tanh")
        x = x + linear(inner, f"{name}.contract")
    x = norm(x, "final_norm")
    text_length = config.text_length
    return linear(x[:, : text_length - 1], "text_head"), linear(x[:, text_length - 1 : -1], "image_head")


def test_logits_and_loss_agree_with_plain_pytorch_in_float64() -> None:
    model, (text, image) = make().double(), batch()
    text_logits, image_logits = plain_logits(model, text, image)
    got_text, got_image = model(text, image)
    torch.testing.assert_close(got_text, text_logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got_image, image_logits, rtol=1e-10, atol=1e-10)

    text_loss = -torch.stack(
        [
            text_logits[b, i].log_softmax(-1)[token]
            for b, caption in enumerate(text.tolist())
            for i, token in enumerate(caption)
            if token != NO_TOKEN
        ]
    ).mean()
    image_loss = -image_logits.log_softmax(-1).gather(-1, image[..., None]).mean()
    total = text_loss / 8 + image_loss * 7 / 8
    got = model.loss(text, image)
    # `loss` computes its cross-entropies in float32.
    torch.testing.assert_close(got.total.double(), total, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.text.double(), text_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.image.double(), image_loss, rtol=1e-6, atol=0)

    wanted = torch.autograd.grad(total, list(model.parameters()))
    gradients = torch.autograd.grad(got.total, list(model.parameters()))
    for (name, _), gradient, want in zip(model.named_parameters(), gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", [Row, Column, AxialRow, Convolution])
def test_each_cell_is_predicted_from_the_tokens_that_stand_where_the_pattern_looks(kind: type) -> None:
    """Cell p is predicted at cell p - 1, by the tokens of exactly those cells that p - 1 sees, and by all text."""
    config = replace(TINY, layers=1, grid=(5, 4))
    model, (text, image) = make(config), batch(config)
    pattern = Convolution(config.layout, kernel_size=3) if kind is Convolution else kind(config.layout)
    model.blocks[0].attention.pattern = pattern
    seen = pattern.mask()[config.text_length :, config.text_length :]

    embedded: dict[str, torch.Tensor] = {}
    model.image_embedding.register_forward_hook(lambda *call: embedded.update(image=call[2]))
    model.text_embedding.register_forward_hook(lambda *call: embedded.update(text=call[2]))
    _, logits = model(text, image)
    for cell in range(config.image_length):
        score = logits[1, cell].logsumexp(-1)
        by_image, by_text = torch.autograd.grad(score, [embedded["image"], embedded["text"]], retain_graph=True)
        used = by_image[1].abs().sum(-1) > 0
        wanted = seen[cell - 1, :-1] if cell else torch.zeros(config.image_length - 1, dtype=torch.bool)
        assert torch.equal(used, wanted), f"cell {cell}"
        assert (by_text[1].abs().sum(-1) > 0).all()
        assert not by_image[0].any(), "one picture leaks into another"


def test_text_is_causal_and_never_sees_the_picture() -> None:
    model, (text, image) = make(), batch()
    logits, _ = model(text, image)
    other = text.clone()
    other[1, 3] = (other[1, 3] + 1) % TINY.vocab_text
    changed, _ = model(other, (image + 1) % TINY.vocab_image)
    assert torch.equal(changed[:, :4], logits[:, :4])
    assert not torch.allclose(changed[1, 4], logits[1, 4])


def test_positions_without_a_token_hold_their_own_learned_vector() -> None:
    model = make()
    embedded = model.embed_text(torch.full((1, TINY.caption_length), NO_TOKEN))
    assert torch.equal(embedded[0], model.text_embedding.weight[TINY.vocab_text :] + model.text_position)
    text, image = batch()
    text[1, 2:] = NO_TOKEN
    whole = model.hidden(text, image)
    short = model.hidden(text[:, :2], image)
    assert torch.equal(whole, short), "a caption may be given without its padding"


def test_the_first_caption_token_is_predicted_and_the_start_has_a_row_of_its_own() -> None:
    model, (text, image) = make(), batch()
    model.loss(text, image).text.backward()
    gradient = model.text_embedding.weight.grad
    assert gradient[TINY.vocab_text].any()
    assert not model.image_embedding.weight.grad.any()


def test_losses_are_divided_by_their_own_counts() -> None:
    model, (text, image) = make(), batch()
    whole = model.loss(text, image)
    parts = [model.loss(text[b : b + 1], image[b : b + 1]) for b in range(3)]
    counts = (text >= 0).sum(1)
    text_mean = sum(part.text * count for part, count in zip(parts, counts, strict=True)) / counts.sum()
    torch.testing.assert_close(whole.text, text_mean)
    torch.testing.assert_close(whole.image, sum(part.image for part in parts) / 3)
    torch.testing.assert_close(whole.total, whole.text / 8 + whole.image * 7 / 8)


def test_the_text_s_share_is_what_the_configuration_says() -> None:
    model, (text, image) = make(replace(TINY, text_weight=0.25)), batch()
    loss = model.loss(text, image)
    torch.testing.assert_close(loss.total, loss.text / 4 + loss.image * 3 / 4)


def test_a_batch_of_empty_captions_trains_the_picture_alone() -> None:
    model, (text, image) = make(), batch()
    loss = model.loss(torch.full_like(text, NO_TOKEN), image)
    assert loss.text.item() == 0
    loss.total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert not model.text_head.weight.grad.any()


def test_a_hidden_cell_is_predicted_but_not_read() -> None:
    model, (text, image) = make(), batch()
    seen = image.clone()
    seen[:, 4] = NO_TOKEN
    other = image.clone()
    other[:, 4] = (other[:, 4] + 1) % TINY.vocab_image
    _, hidden = model(text, seen)
    _, shown = model(text, image)
    torch.testing.assert_close(hidden[:, :5], shown[:, :5])
    assert not torch.allclose(hidden[:, 5], shown[:, 5])
    loss = model.loss(text, image, seen=seen)
    torch.testing.assert_close(loss.image, F.cross_entropy(hidden.flatten(0, 1), image.flatten()))
    assert loss.image != model.loss(text, other, seen=seen).image, "the cell is still to be guessed"
    loss.total.backward()
    rest = model.loss(text, image, seen=seen, given=3)
    torch.testing.assert_close(rest.image, F.cross_entropy(hidden[:, 3:].flatten(0, 1), image[:, 3:].flatten()))
    everything = model.loss(text, image, seen=torch.full_like(image, NO_TOKEN))
    assert everything.image.isfinite()


def test_a_latent_reaches_every_cell_and_none_is_a_row_of_zeros() -> None:
    config = replace(TINY, latent=7)
    model, (text, image) = make(config), batch()
    latents = torch.randn(3, 7, generator=torch.Generator().manual_seed(2), requires_grad=True)
    plain_text, plain = model(text, image)
    zero_text, zero = model(text, image, torch.zeros(3, 7))
    assert torch.equal(zero, plain)
    assert torch.equal(zero_text, plain_text)
    _, told = model(text, image, latents)
    for cell in range(config.image_length):
        (gradient,) = torch.autograd.grad(told[1, cell].logsumexp(-1), latents, retain_graph=True)
        assert gradient[1].abs().min() > 0
        assert not gradient[[0, 2]].any(), "one picture's latent leaks into another"
    for wrong in (torch.zeros(2, 7), torch.zeros(3, 6)):
        with pytest.raises(ValueError, match=r"latents: got shape .* wanted \[3, 7\]"):
            model(text, image, wrong)
    with pytest.raises(ValueError, match="wanted none"):
        make()(text, image, latents)


@pytest.mark.parametrize(
    ("schedule", "kinds"),
    [
        ("dalle", [Row, Column, Row, Row, Row, Convolution]),
        ("rowcol", [Row, Column, Row, Row, Row, Column]),
        ("strided", [Strided] * 6),
        ("fixed", [Fixed] * 6),
        ("causal", [Causal] * 6),
    ],
)
def test_a_schedule_says_what_each_layer_sees(schedule: str, kinds: list[type]) -> None:
    config = replace(TINY, layers=6, schedule=schedule)
    assert [type(pattern) for pattern in config.patterns] == kinds
    assert {pattern.length for pattern in config.patterns} == {config.layout.length}
    text, image = batch()
    assert make(config).loss(text, image).total.isfinite()
    if schedule == "strided":  # a row's cells, and the column's: stride is the grid's width
        assert config.patterns[0].mask()[16].nonzero().flatten().tolist() == [1, 4, 7, 10, 13, 14, 15, 16]


def test_bfloat16_autocast_stays_close_and_trains_every_parameter() -> None:
    model, (text, image) = make(std=0.05), batch()
    exact = model.loss(text, image)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(text, image)
    assert loss.total.dtype == torch.float32
    # A product of bfloat16 numbers carries 2^-8 of relative error; a dozen of them in a row stay within 2%.
    torch.testing.assert_close(loss.total, exact.total, rtol=0.02, atol=0)
    loss.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_the_model_is_one_graph_to_the_compiler() -> None:
    model, (text, image) = make(), batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(text, image), model(text, image), strict=True):
        torch.testing.assert_close(got, wanted)


def test_paper_preset_is_the_twelve_billion_model() -> None:
    config = PRESETS["paper"]
    assert (config.width, config.layers, config.layout.length) == (3968, 64, 1280)
    with torch.device("meta"):
        model = DalleTransformer(config)
    width, ends = 3968, 16384 + 8192
    layer = 12 * width**2 + 13 * width  # four and eight square matrices, their biases, two norms
    positions = 256 + 256 + 32 + 32  # without a token, text, rows, columns
    count = 64 * layer + 2 * ends * width + ends + positions * width + 2 * width
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert round(count / 1e9) == 12
    kinds = [type(block.attention.pattern) for block in model.blocks]
    assert [kinds.count(kind) for kind in (Row, Column, Convolution)] == [47, 16, 1]
    assert kinds[-1] is Convolution
    assert kinds[1] is kinds[61] is Column


@pytest.mark.parametrize("name", PRESETS)
def test_presets_state_whole_models(name: str) -> None:
    config = PRESETS[name]
    with torch.device("meta"):
        model = DalleTransformer(config)
    assert len(model.blocks) == config.layers
    require_grid(config, dvae.PRESETS[name], Path("dvae"))  # the two stages' presets are of one picture


def test_initial_losses_are_those_of_uniform_guesses() -> None:
    torch.manual_seed(0)
    config = replace(TINY, vocab_text=1000, vocab_image=500)
    text, image = batch(config)
    loss = DalleTransformer(config).loss(text, image)
    assert loss.text.item() == pytest.approx(torch.tensor(1000.0).log().item(), rel=0.03)
    assert loss.image.item() == pytest.approx(torch.tensor(500.0).log().item(), rel=0.03)


@pytest.mark.parametrize(
    ("text", "image", "error", "message"),
    [
        (torch.zeros(2, 5), torch.zeros(2, 12, dtype=torch.int64), TypeError, "text_tokens: got torch.float32"),
        (torch.zeros(2, 5).long(), torch.zeros(2, 12), TypeError, "image_tokens: got torch.float32"),
        (torch.zeros(2, 6).long(), torch.zeros(2, 12).long(), ValueError, r"text_tokens: got shape \(2, 6\)"),
        (torch.zeros(2, 5).long(), torch.zeros(2, 11).long(), ValueError, r"image_tokens: got shape \(2, 11\)"),
        (torch.zeros(2, 5).long(), torch.zeros(12).long(), ValueError, r"image_tokens: got shape \(12,\)"),
        (
            torch.zeros(2, 5).long(),
            torch.zeros(3, 12).long(),
            ValueError,
            r"image_tokens: got shape \(3, 12\)",
        ),
    ],
)
def test_bad_tokens_are_refused(text: torch.Tensor, image: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make().loss(text, image)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers: got 0"),
        ({"text_length": 1}, "text_length: got 1"),
        ({"grid": (4, 0)}, r"grid: got \(4, 0\)"),
        ({"vocab_image": -3}, "vocab_image: got -3"),
        ({"convolution": "corner"}, "convolution: got 'corner'"),
        ({"schedule": "dense"}, "schedule: got 'dense'"),
        ({"latent": -1}, "latent: got -1"),
        ({"text_weight": 1.5}, "text_weight: got 1.5"),
        ({"latent": 8, "text_length": 4}, "text_length: got 4"),
    ],
)
def test_bad_configurations_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


@pytest.mark.parametrize(("recompute", "attentions"), [("none", 2), ("blocks", 4), ("selective", 2)])
def test_what_is_computed_anew_changes_no_gradient(recompute: Recompute, attentions: int) -> None:
    class Counts(TorchDispatchMode):
        attentions = products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.attentions += func is torch.ops.dalle_kernels.attention_forward.default
            self.products += func is torch.ops.aten.addmm.default
            return func(*args, **(kwargs or {}))

    config = TransformerConfig(vocab_text=20, text_length=5, grid=(3, 3), vocab_image=16, layers=2, head_dim=16)
    text, image = torch.randint(20, (2, 4)), torch.randint(16, (2, 9))
    gradients, products = {}, {}
    for mode in ("none", recompute):
        torch.manual_seed(0)
        model = DalleTransformer(config)
        model.recompute = mode
        with Counts() as counts:
            model.loss(text, image).total.backward()
        gradients[mode] = [parameter.grad for parameter in model.parameters()]
        products[mode] = counts.products
    assert counts.attentions == attentions
    assert (products[recompute] > products["none"]) == (recompute != "none")
    assert all(map(torch.equal, gradients["none"], gradients[recompute]))
