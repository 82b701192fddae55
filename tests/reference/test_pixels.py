"""Pictures as pixels: tokens and back, palettes, the likelihood, completions."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from dalle_reference.pixels import PRESETS, PixelConfig, PixelTransformer, bits_per_dimension, fit_palette
from dalle_reference.transformer import NO_TOKEN

from dalle_kernels import Column, Row

BYTES = PixelConfig(resolution=4, layers=2, heads=2, head_dim=16)
PALETTE = replace(BYTES, colours=8)


def pictures(count: int = 3, side: int = 4) -> torch.Tensor:
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make(config: PixelConfig) -> PixelTransformer:
    torch.manual_seed(0)
    model = PixelTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    if config.colours:
        model.palette.copy_(torch.rand(config.colours, 3))
    return model


def test_bytes_are_tokens_in_the_order_of_rows_pixels_and_channels() -> None:
    model, given = make(BYTES), pictures()
    tokens = model.encode(given)
    assert tokens.shape == (3, 48)
    for picture in range(3):
        for row in range(4):
            for column in range(4):
                for channel in range(3):
                    token = tokens[picture, row * 12 + column * 3 + channel]
                    assert token == given[picture, channel, row, column]
    assert torch.equal((model.decode(tokens) * 255).round().to(torch.uint8), given)


def test_a_pixel_s_token_is_its_nearest_colour() -> None:
    model, given = make(PALETTE), pictures()
    tokens = model.encode(given).reshape(3, 4, 4)
    pixels = given.permute(0, 2, 3, 1).double() / 255
    wanted = torch.cdist(pixels.reshape(-1, 3), model.palette.double()).argmin(dim=1)
    assert torch.equal(tokens.flatten(), wanted)
    shown = model.decode(tokens.flatten(1))
    torch.testing.assert_close(shown[1, :, 2, 3], model.palette[tokens[1, 2, 3]])


def test_the_loss_is_the_pictures_likelihood_from_what_stood_before() -> None:
    model, given = make(BYTES), pictures()
    tokens = model.encode(given)
    total = torch.zeros((), dtype=torch.float64)
    for cell in range(48):  # each token predicted alone, from a stream that ends before it
        hidden = model.transformer.hidden(tokens.new_empty(3, 0), tokens[:, :cell])
        logits = model.transformer.image_head(hidden[:, -1]).double()
        total -= logits.log_softmax(-1).gather(1, tokens[:, cell : cell + 1]).sum()
    torch.testing.assert_close(model.loss(given).double(), total / (3 * 48), rtol=1e-5, atol=0)
    assert bits_per_dimension(math.log(256)) == pytest.approx(8.0)


def test_a_palette_is_found_that_serves_its_pixels() -> None:
    colours = torch.randint(256, (6, 3), generator=torch.Generator().manual_seed(1))
    which = torch.randint(6, (5, 8, 8), generator=torch.Generator().manual_seed(2))
    given = colours[which].permute(0, 3, 1, 2).to(torch.uint8).contiguous()
    exact = fit_palette(given, 6, seed=0)
    found = (exact * 255).round().long().tolist()
    assert sorted(found) == sorted(colours.tolist())
    many = fit_palette(given, 9, seed=0)  # more than there are
    assert many.shape == (9, 3)
    assert {tuple(colour) for colour in (many * 255).round().long().tolist()} == set(map(tuple, colours.tolist()))

    given = pictures(4, 32)
    rows = given.permute(0, 2, 3, 1).reshape(-1, 3).double() / 255

    def error(palette: torch.Tensor) -> float:
        return float(torch.cdist(rows, palette.double()).amin(dim=1).square().mean())

    palette = fit_palette(given, 16, seed=0)
    assert torch.equal(palette, fit_palette(given, 16, seed=0))
    assert error(palette) < 0.8 * error(rows[:16])
    nearest = torch.cdist(rows, palette.double()).argmin(dim=1)
    means = torch.stack([rows[nearest == code].mean(dim=0) for code in range(16)])
    assert error(means) > 0.98 * error(palette), "another round hardly helps"


@pytest.mark.parametrize("config", [BYTES, PALETTE], ids=["bytes", "palette"])
def test_a_completion_keeps_the_top_and_draws_the_rest(config: PixelConfig) -> None:
    model, given = make(config), pictures()
    kept = model.decode(model.encode(given))
    whole = model.complete(given, rows=2, number=5, seed=1)
    assert whole.shape == (3, 5, 3, 4, 4)
    assert torch.equal(whole[:, :, :, :2], kept[:, None, :, :2].expand(-1, 5, -1, -1, -1))
    assert len(whole[0, :, :, 2:].flatten(1).unique(dim=0)) > 1
    below = given.clone()
    below[:, :, 2:] = 0
    assert torch.equal(model.complete(below, rows=2, number=5, seed=1), whole), "what is below is not looked at"
    assert torch.equal(model.complete(given, rows=4, seed=0)[:, 0], kept)
    with pytest.raises(ValueError, match="rows: got 5, wanted 0 to 4"):
        model.complete(given, rows=5, seed=0)


def test_bert_predicts_what_is_hidden_from_all_the_rest() -> None:
    model, given = make(replace(BYTES, objective="bert")), pictures()
    hidden = model.hide(map(np.random.default_rng, range(3)))
    assert hidden is not None
    assert hidden.shape == (3, 7)  # 15% of 48
    assert all(len(row.unique()) == 7 for row in hidden)
    assert not torch.equal(hidden[0], hidden[1])
    tokens = model.encode(given)
    total = torch.zeros((), dtype=torch.float64)
    for picture, places in enumerate(hidden.tolist()):
        seen = tokens[picture : picture + 1].clone()
        seen[:, places] = NO_TOKEN
        states = model.transformer.hidden(tokens.new_empty(1, 0), seen)[0, 2:]
        for place in places:
            total -= model.transformer.image_head(states[place]).double().log_softmax(-1)[tokens[picture, place]]
    loss = model.loss(given, hidden)
    torch.testing.assert_close(loss.double(), total / 21, rtol=1e-5, atol=0)
    # Any other token may matter, before or after, but not what is hidden.
    first = int(hidden[0].min())
    after = next(place for place in range(47, 0, -1) if place not in hidden[0].tolist())
    assert after > first
    for place, matters in ((after, True), (first, False)):
        states = []
        for value in (0, 200):
            changed = tokens[:1].clone()
            changed[0, place] = value
            changed[0, hidden[0]] = NO_TOKEN
            states.append(model.transformer.hidden(tokens.new_empty(1, 0), changed)[0, 2 + first])
        assert torch.equal(*states) != matters
    with pytest.raises(ValueError, match="objective: got 'bert', wanted 'next'"):
        model.complete(given, rows=2, seed=0)
    with pytest.raises(ValueError, match="hidden: got None with objective 'bert'"):
        model.loss(given)
    plain = make(BYTES)
    assert plain.hide([np.random.default_rng(0)]) is None
    with pytest.raises(ValueError, match="hidden: got tokens with objective 'next'"):
        plain.loss(given, hidden)


def test_it_learns_what_is_regular() -> None:
    torch.manual_seed(0)
    model = PixelTransformer(replace(BYTES, schedule="rowcol"))
    assert [type(pattern) for pattern in model.config.transformer.patterns] == [Row, Column]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    chance = torch.Generator().manual_seed(0)
    for _ in range(120):
        stripes = torch.randint(2, (16, 1, 1, 4), generator=chance).expand(-1, 3, 4, -1) * 255
        loss = model.loss(stripes.to(torch.uint8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Whoever knows only which two bytes there are pays log 2 for each; all but four of 48 follow from those before.
    assert float(loss.detach()) < 0.5 * math.log(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 0}, "resolution: got 0"),
        ({"colours": 1}, "colours: got 1, wanted 0"),
        ({"layers": 0}, "layers: got 0"),
        ({"schedule": "none"}, "schedule: got 'none'"),
        ({"objective": "all"}, "objective: got 'all'"),
    ],
)
def test_bad_configurations_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(BYTES, **changes)


@pytest.mark.parametrize("wrong", [torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 5, 4, dtype=torch.uint8)])
def test_bad_pictures_are_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="pictures: got"):
        make(BYTES).loss(wrong)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_state_whole_models(name: str) -> None:
    with torch.device("meta"):
        PixelTransformer(PRESETS[name])
