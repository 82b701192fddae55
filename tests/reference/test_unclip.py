"""unCLIP: diffusion against its closed form, both priors, both decoders."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from dalle_reference.diffusion import add_noise, amounts, sample, time_features
from dalle_reference.generate import generate
from dalle_reference.prior import AutoregressivePrior, DiffusionPrior, Prior, PriorConfig, make_prior
from dalle_reference.transformer import NO_TOKEN, DalleTransformer
from dalle_reference.unclip import PixelDecoder, PixelDecoderConfig, between, decoder_config

CPU = torch.device("cpu")
TINY = PriorConfig(
    embedding=12, vocab_text=20, text_length=5, layers=2, heads=2, head_dim=16, noise_steps=8, components=6, buckets=8
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    """Unit vectors with a mean and with components of different size, as CLIP's have."""
    spread = torch.linspace(1.0, 0.05, 12)
    return F.normalize(torch.randn(count, 12, generator=generator(seed)) * spread + 1.0, dim=-1)


def captions(count: int) -> torch.Tensor:
    tokens = torch.randint(20, (count, 5), generator=generator(3))
    tokens[::2, 3:] = NO_TOKEN
    return tokens


@pytest.fixture(params=["diffusion", "autoregressive"])
def prior(request: pytest.FixtureRequest) -> Prior:
    torch.manual_seed(0)
    model = make_prior(replace(TINY, kind=request.param))
    model.fit(vectors(400, seed=1), vectors(400, seed=2))
    return model


def test_noise_takes_the_place_of_the_signal() -> None:
    signal, noise = amounts(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(signal.square() + noise.square(), torch.ones(3, dtype=torch.float64))
    middle = math.cos(0.508 / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
    assert signal.tolist() == pytest.approx([1.0, middle, 0.0], abs=1e-12)
    x, e = torch.randn(2, 2, 3, 4, dtype=torch.float64, generator=generator())
    mixed = add_noise(x, e, torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(mixed[0], x[0])
    torch.testing.assert_close(mixed[1], e[1])


def test_the_best_guess_of_a_gaussian_draws_that_gaussian() -> None:
    mean, deviation = torch.tensor([1.5, -0.5]), torch.tensor([0.3, 1.2])

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        signal, noise = (part[:, None] for part in amounts(t))
        gain = signal * deviation**2 / (signal**2 * deviation**2 + noise**2)
        return mean + gain * (x - signal * mean)

    drawn = sample(predict, (20_000, 2), steps=400, seed=0, device=CPU)
    torch.testing.assert_close(drawn.mean(dim=0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(drawn.std(dim=0), deviation, rtol=0.04, atol=0)
    assert drawn.T.corrcoef()[0, 1].abs() < 0.03
    assert torch.equal(drawn, sample(predict, (20_000, 2), steps=400, seed=0, device=CPU))
    assert not torch.equal(drawn[:5], sample(predict, (5, 2), steps=400, seed=1, device=CPU))
    assert len(time_features(torch.linspace(0, 1, 200), 16).unique(dim=0)) == 200


def test_a_prior_learns_to_draw_the_vector_of_its_caption(prior: Prior) -> None:
    chance, tokens, shown = generator(), captions(4), vectors(4, seed=2)
    said = F.normalize(shown + 0.1 * torch.randn(4, 12, generator=chance), dim=-1)

    def pictures(count: int) -> torch.Tensor:
        """Of each caption `count`, which agree with it more or less."""
        some = shown.repeat(count, 1)
        return F.normalize(some + 0.1 * torch.randn(some.shape, generator=chance), dim=-1)

    prior.fit(said.repeat(100, 1), pictures(100))
    optimizer = torch.optim.Adam(prior.parameters(), lr=5e-3)
    for _ in range(150):
        noise = torch.rand(32, generator=chance), torch.randn(32, 12, generator=chance)
        loss = prior.loss(tokens.repeat(8, 1), said.repeat(8, 1), pictures(8), *noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prior.eval()
    drawn = prior.draw(tokens, said, seed=0)
    torch.testing.assert_close(drawn.norm(dim=-1), torch.ones(4))
    assert ((drawn @ shown.T).argmax(dim=1) == torch.arange(4)).all()
    assert torch.equal(drawn, prior.draw(tokens, said, seed=0))


def test_every_input_of_a_prior_matters_and_rows_do_not_mix(prior: Prior) -> None:
    tokens, said, shown = captions(3), vectors(3, seed=1).requires_grad_(), vectors(3, seed=2)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    if isinstance(prior, DiffusionPrior):
        noised, t = torch.randn(3, 12, requires_grad=True, generator=generator()), torch.full((3,), 0.3)
        out = prior.predict(tokens, said, noised, t)
        assert not torch.allclose(out, prior.predict(tokens, said, noised, t + 0.1))
        by_said, by_noised = torch.autograd.grad(out[1].sum(), [said, noised])
        assert by_noised[1].any()
        assert not by_noised[[0, 2]].any()
        changed = prior.predict(captions(3).roll(1, 0), said, noised, t)
        assert not torch.allclose(changed, out)
    else:
        agreement = torch.zeros(3, dtype=torch.int64)
        prompt = prior._prompt(tokens, agreement)
        assert prompt[:, 0].tolist() == [20] * 3
        _, logits = prior.transformer(prompt, prior.encode(shown), said)
        (by_said,) = torch.autograd.grad(logits[1].logsumexp(-1).sum(), [said])
        _, other = prior.transformer(prior._prompt(tokens, agreement + 1), prior.encode(shown), said)
        assert not torch.allclose(other, logits)
        empty = prior._prompt(torch.full_like(tokens, NO_TOKEN), agreement)
        assert (empty == NO_TOKEN).all()
    assert by_said[1].any()
    assert not by_said[[0, 2]].any()


def test_more_candidates_agree_more_with_the_caption(prior: Prior) -> None:
    tokens, said = captions(16), vectors(16, seed=1)
    one = (prior.draw(tokens, said, seed=0, among=1) * said).sum(dim=-1)
    many = (prior.draw(tokens, said, seed=0, among=8) * said).sum(dim=-1)
    assert many.mean() > one.mean()
    guided = prior.draw(tokens, said, seed=0, among=1, guidance_scale=3.0)
    torch.testing.assert_close(guided.norm(dim=-1), torch.ones(16))
    assert not torch.equal((guided * said).sum(dim=-1), one)


def test_components_and_buckets_keep_what_they_can() -> None:
    prior = AutoregressivePrior(replace(TINY, components=12, buckets=64))
    training = vectors(4000, seed=1)
    prior.fit(training, training)
    tokens = prior.encode(training)
    assert tokens.shape == (4000, 12)
    counts = torch.stack([torch.bincount(column, minlength=64) for column in tokens.T])
    assert counts.min() > 55, "buckets are equally full"
    assert counts.max() < 70
    held_out = vectors(500, seed=2)
    assert (prior.decode(prior.encode(held_out)) * held_out).sum(dim=-1).mean() > 0.995
    deviations = ((training - prior.mean) @ prior.axes).std(dim=0)
    assert torch.equal(deviations, deviations.sort(descending=True).values), "the largest component is drawn first"
    identity = prior.axes.T @ prior.axes
    torch.testing.assert_close(identity, torch.eye(12), rtol=0, atol=1e-5)


def test_the_decoder_into_tokens_is_told_by_the_vector() -> None:
    torch.manual_seed(0)
    config = decoder_config(12, (3, 3), 10, layers=2, heads=2)
    model = DalleTransformer(config)
    said, pictures = vectors(3, seed=1), torch.randint(10, (3, 9), generator=generator())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    nothing = pictures.new_empty(3, 0)
    for _ in range(100):
        loss = model.loss(nothing, pictures, latents=said).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(generate(model, nothing, seed=0, temperature=0.0, latents=said), pictures)


def test_the_decoder_into_pixels_draws_what_the_vector_says() -> None:
    torch.manual_seed(0)
    model = PixelDecoder(PixelDecoderConfig(embedding=12, resolution=8, patch=4, layers=2, head_dim=16, noise_steps=8))
    said = vectors(2, seed=1)
    pictures = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    pictures[0, 0, :4] = 1.0  # red above black
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    chance = generator()
    for _ in range(120):
        noise = torch.rand(8, generator=chance), torch.randn(8, 3, 8, 8, generator=chance)
        loss = model.loss(said.repeat(4, 1), pictures.repeat(4, 1, 1, 1), *noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    drawn = model.draw(said, seed=0)
    assert drawn.shape == (2, 3, 8, 8)
    assert 0 <= float(drawn.min()) <= float(drawn.max()) <= 1
    assert (drawn - pictures).abs().mean() < 0.1
    assert (drawn[0, 0, :4].mean() > 0.8) & (drawn[0, 0, 4:].mean() < 0.2), "patches stand where they belong"
    assert torch.equal(drawn, model.draw(said, seed=0))
    assert not torch.equal(model.draw(said, seed=0, guidance_scale=2.0), drawn)
    _, t = torch.zeros(2), torch.tensor([0.2, 0.7])
    noised = torch.randn(2, 3, 8, 8, generator=chance)
    assert not torch.allclose(model.predict(said, noised, t), model.predict(torch.zeros_like(said), noised, t))


def test_the_way_between_two_vectors_is_the_arc() -> None:
    first, second = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    way = between(first, second, 5)
    torch.testing.assert_close(way[[0, 4]], torch.stack([first, second]), rtol=0, atol=1e-6)
    torch.testing.assert_close(way.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close((way[1:] * way[:-1]).sum(dim=-1), torch.full((4,), torch.pi / 8).cos())
    torch.testing.assert_close(between(first, first, 3), first.expand(3, -1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "linear"}, "kind: got 'linear'"),
        ({"buckets": 1}, "buckets: got 1"),
        ({"components": 13}, "components: got 13, wanted at most the embedding, 12"),
        ({"noise_steps": 0}, "noise_steps: got 0"),
    ],
)
def test_bad_priors_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_bad_decoders_are_refused() -> None:
    with pytest.raises(ValueError, match="patch: got 5, wanted a divisor of the resolution 32"):
        PixelDecoderConfig(patch=5)
