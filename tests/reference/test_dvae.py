"""The discrete VAE: its shape, its likelihood and gradients against plain PyTorch, all quantizers."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from dalle_reference.dvae import PRESETS, DiscreteVAE, DVAEConfig
from dalle_reference.evaluate import psnr

from dalle_kernels.noise import GUMBEL_STREAM, gumbel_noise

TINY = PRESETS["tiny"]


def pictures(config: DVAEConfig = TINY, batch: int = 3) -> torch.Tensor:
    side = config.resolution
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> DiscreteVAE:
    torch.manual_seed(0)
    return DiscreteVAE(TINY)


def test_paper_preset_has_the_published_shapes() -> None:
    with torch.device("meta"):
        model = DiscreteVAE(PRESETS["paper"])
    assert PRESETS["paper"].grid == (32, 32)
    assert model.encoder.stem.weight.shape == (256, 3, 7, 7)
    assert model.to_scores.weight.shape == (8192, 2048)
    assert model.quantizer.codebook.shape == (8192, 128)
    assert model.decoder.head.weight.shape == (6, 256, 1, 1)
    kernels = [c.kernel_size[0] for c in model.encoder.groups[0][0].convolutions]
    assert kernels == [3, 3, 3, 1]
    kernels = [c.kernel_size[0] for c in model.decoder.groups[0][0].convolutions]
    assert kernels == [1, 3, 3, 3]
    assert model.encoder.groups[0][0].gain == 1 / 64

    # Parameters of the published encoder and decoder, counted by hand: groups of widths 1, 2, 4, 8 times 256, two
    # blocks each with a bottleneck of a quarter.
    def block(inputs: int, outputs: int, encoder: bool) -> int:
        hidden = outputs // 4
        count = (inputs * 9 if encoder else inputs) * hidden + hidden
        count += 2 * (hidden * hidden * 9 + hidden)
        count += (hidden if encoder else hidden * 9) * outputs + outputs
        return count + (inputs * outputs + outputs if inputs != outputs else 0)

    widths = [256, 512, 1024, 2048]
    encoder = (
        256 * 3 * 49
        + 256
        + sum(
            block(before, width, True) + block(width, width, True)
            for before, width in zip([256, *widths], widths, strict=False)
        )
    )
    encoder += 2048 * 8192 + 8192
    decoder = (
        8192 * 128
        + 128
        + 6 * 256
        + 6
        + sum(
            block(before, width, False) + block(width, width, False)
            for before, width in zip([128, *widths[::-1]], widths[::-1], strict=False)
        )
    )
    assert sum(p.numel() for p in model.parameters()) == encoder + decoder


def test_forward_is_the_elbo_that_plain_pytorch_computes(model: DiscreteVAE) -> None:
    images, temperature, seed = pictures(), 0.7, 11
    output = model(images, temperature, seed)
    logits = model.scores(images)
    gumbel = gumbel_noise(torch.tensor(seed), len(logits), TINY.vocab, GUMBEL_STREAM)
    soft = torch.softmax((logits + gumbel) / temperature, dim=1) @ model.quantizer.codebook + model.code_bias
    side = TINY.grid[0]
    maps = model.decoder(soft.reshape(3, side, side, -1).permute(0, 3, 1, 2))
    mu, log_b = maps[:, :3], maps[:, 3:]
    x = 0.8 * images + 0.1
    nll = ((torch.logit(x) - mu).abs() / log_b.exp() + (2 * log_b.exp() * x * (1 - x)).log()).mean()
    log_q = torch.log_softmax(logits, dim=1)
    kl = (log_q.exp() * (log_q + math.log(TINY.vocab))).sum() / images.numel()
    torch.testing.assert_close(output.nll, nll, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.kl, kl, rtol=1e-4, atol=1e-6)
    assert torch.equal(output.indices.flatten(), (logits + gumbel).argmax(dim=1))
    ours = torch.autograd.grad(output.nll + 2.0 * output.kl, model.parameters())
    plain = torch.autograd.grad(nll + 2.0 * kl, model.parameters())
    for mine, wanted in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-5)


def test_scores_are_rows_without_a_copy(model: DiscreteVAE) -> None:
    scores = model.scores(pictures())
    assert scores.is_contiguous()
    assert scores.shape == (3 * 8 * 8, TINY.vocab)
    features = model.encoder(pictures().contiguous(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)  # so that reading them as rows copies nothing


def test_encode_takes_the_likeliest_code_and_decode_its_row(model: DiscreteVAE) -> None:
    images = pictures()
    tokens = model.encode(images)
    assert tokens.shape == (3, 8, 8)
    assert torch.equal(tokens.flatten(), model.scores(images).argmax(dim=1))
    one_hot = F.one_hot(tokens, TINY.vocab).float() @ model.quantizer.codebook + model.code_bias
    mu = model.decoder(one_hot.permute(0, 3, 1, 2))[:, :3]
    torch.testing.assert_close(model.decode(tokens), ((torch.sigmoid(mu) - 0.1) / 0.8).clamp(0, 1))


def test_vq_variant_learns_on_both_sides() -> None:
    torch.manual_seed(0)
    model = DiscreteVAE(replace(TINY, quantizer="vq"))
    output = model(pictures(), 1.0, 0)
    assert float(output.kl) == 0
    features = model.scores(pictures())
    nearest = torch.cdist(features, model.quantizer.codebook)
    assert torch.equal(output.indices.flatten(), nearest.argmin(dim=1))
    torch.testing.assert_close(
        output.distance, 1.25 * nearest.amin(dim=1).square().mean() / TINY.code_width, rtol=1e-4, atol=1e-6
    )
    (output.nll + output.distance).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert torch.equal(model.encode(pictures()).flatten(), nearest.argmin(dim=1))


def test_ema_variant_moves_codes_by_the_running_means() -> None:
    torch.manual_seed(0)
    model = DiscreteVAE(replace(TINY, quantizer="vq-ema"))
    before, features = model.quantizer.codebook.double(), model.scores(pictures()).double()
    assert "quantizer.codebook" not in dict(model.named_parameters())
    output = model(pictures(), 1.0, 0)
    chosen = F.one_hot(torch.cdist(features, before).argmin(dim=1), TINY.vocab).double()
    assert torch.equal(output.indices.flatten(), chosen.argmax(dim=1))
    used = chosen.sum(0) > 0
    assert 0 < int(used.sum()) < TINY.vocab
    means = chosen.T @ features / chosen.sum(0)[:, None]
    torch.testing.assert_close(model.quantizer.codebook.double()[used], means[used])
    torch.testing.assert_close(model.quantizer.counts.double()[used], 0.01 * chosen.sum(0)[used])
    # Codes that nothing chose were put onto features.
    gaps = torch.cdist(model.quantizer.codebook.double()[~used], features)
    torch.testing.assert_close(gaps.amin(dim=1), torch.zeros(int((~used).sum())).double(), rtol=0, atol=1e-5)
    error = (features - before[chosen.argmax(dim=1)]).square().mean()
    torch.testing.assert_close(output.distance.double(), 0.25 * error)
    (output.nll + output.distance).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    tokens = model.eval().encode(pictures())
    kept = model.quantizer.codebook.clone()
    model(pictures(), 1.0, 0)
    assert torch.equal(model.quantizer.codebook, kept)
    latents = kept[tokens].flatten(0, 2)
    torch.testing.assert_close(model.decode(tokens), _pictures_of(model, latents))


def test_lfq_variant_takes_signs_and_the_entropies_of_all_codes() -> None:
    torch.manual_seed(0)
    model = DiscreteVAE(replace(TINY, quantizer="lfq"))
    output, features = model(pictures(), 1.0, 0), model.scores(pictures()).double()
    assert features.shape == (3 * 64, 5)
    codes = torch.tensor([[1.0 if code >> (4 - bit) & 1 else -1.0 for bit in range(5)] for code in range(32)]).double()
    distances = torch.cdist(features, codes).square()
    assert torch.equal(output.indices.flatten(), distances.argmin(dim=1))
    p = (-distances).softmax(dim=1)
    wanted = torch.special.entr(p).sum(1).mean() - torch.special.entr(p.mean(0)).sum()
    torch.testing.assert_close(output.entropy.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.distance.double(), 0.25 * distances.amin(dim=1).mean() / 5)
    (output.nll + output.distance + output.entropy).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    tokens = model.encode(pictures())
    assert torch.equal(tokens, output.indices)
    torch.testing.assert_close(model.decode(tokens), _pictures_of(model, model.widen(codes[tokens].float())))


def _pictures_of(model: DiscreteVAE, latents: torch.Tensor) -> torch.Tensor:
    side = TINY.grid[0]
    mu = model.decoder((latents + model.code_bias).reshape(3, side, side, -1).permute(0, 3, 1, 2))[:, :3]
    return ((torch.sigmoid(mu) - 0.1) / 0.8).clamp(0, 1).detach()


@pytest.mark.parametrize("quantizer", ["dvae", "vq", "vq-ema", "lfq"])
def test_a_few_steps_lower_the_loss(quantizer: str) -> None:
    torch.manual_seed(0)
    model = DiscreteVAE(replace(TINY, quantizer=quantizer))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    images = torch.rand(8, 3, 1, 1, generator=torch.Generator().manual_seed(2)).expand(8, 3, 16, 16)
    losses = []
    for step in range(30):
        output = model(images, 0.5, step)
        loss = output.nll + 0.1 * output.kl + output.distance + 0.1 * output.entropy
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.nll.detach()))
    assert losses[-1] < losses[0] - 0.3


def test_bf16_autocast_stays_near_float32(model: DiscreteVAE) -> None:
    whole = model(pictures(), 1.0, 3)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(pictures(), 1.0, 3)
    assert half.nll.dtype == torch.float32
    torch.testing.assert_close(half.nll, whole.nll, rtol=0.03, atol=0.03)
    torch.testing.assert_close(half.kl, whole.kl, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_the_same_loss_in_bf16(name: str) -> None:
    """Up to the rounding of bfloat16: the terms of stage 1's loss, under autocast and without."""
    config = PRESETS[name]
    torch.manual_seed(0)
    side = min(config.resolution, 64)  # of the paper's pictures a corner, which has all of its network
    model = DiscreteVAE(replace(config, resolution=side))
    images = F.interpolate(torch.rand(2, 3, side // 4, side // 4), scale_factor=4)
    codes = copy.deepcopy(model.quantizer)
    with torch.no_grad():
        whole = model(images, 0.5, 3)
        model.quantizer = codes  # before they followed the features
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images, 0.5, 3)
    assert (half.nll.dtype, half.kl.dtype, half.distance.dtype) == (torch.float32,) * 3
    for term in ("nll", "kl", "distance"):
        torch.testing.assert_close(getattr(half, term), getattr(whole, term), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 18}, "resolution: got 18, wanted a multiple of 4"),
        ({"width": 6}, "width: got 6"),
        ({"vocab": 0}, "vocab: got 0"),
        ({"quantizer": "pq"}, "quantizer: got 'pq'"),
        ({"quantizer": "lfq", "vocab": 24}, "vocab: got 24, wanted a power of 2 from 2"),
    ],
)
def test_bad_configurations(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(replace(TINY, groups=3), **change)


def test_pictures_of_another_size(model: DiscreteVAE) -> None:
    with pytest.raises(ValueError, match=r"images: got shape \(1, 3, 8, 8\), wanted \[B, 3, 16, 16\]"):
        model(torch.rand(1, 3, 8, 8), 1.0, 0)


@pytest.mark.parametrize("quantizer", ["dvae", "vq", "vq-ema"])
@pytest.mark.parametrize(
    ("groups", "patch", "gain"),
    [(1, 2, 15.0), (1, 4, 3.0), (2, 1, 0.0)],  # pooling lets little of a square through
)
def test_it_begins_with_codes_that_mean_something(quantizer: str, groups: int, patch: int, gain: float) -> None:
    """From the first step on, pictures come back much as the nearest of so many squares would draw them."""
    torch.manual_seed(0)
    config = replace(
        PRESETS["tiny"], width=64, code_width=16, vocab=64, quantizer=quantizer, groups=groups, patch=patch
    )
    model = DiscreteVAE(config)
    colours = torch.tensor([[1.0, 1, 1], [0, 0, 0], [0.9, 0.2, 0.1], [0.1, 0.3, 0.8]])
    chance = torch.Generator().manual_seed(1)
    areas = torch.randint(4, (60, 8, 8), generator=chance).repeat_interleave(2, 1).repeat_interleave(2, 2)
    pictures = colours[areas].permute(0, 3, 1, 2).contiguous()
    training, others = pictures[:40], pictures[40:]
    before = psnr(others, model.decode(model.encode(others)))
    model.begin_with(training, seed=0)
    tokens = model.encode(others)
    assert psnr(others, model.decode(tokens)) > before + gain
    squares = others.unfold(2, config.shrink, config.shrink).unfold(3, config.shrink, config.shrink)
    if config.patch == 2:  # four squares there are: each has a code, and no code two
        kinds = squares.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
        _, which = kinds.unique(dim=0, return_inverse=True)
        pairs = {(int(kind), int(token)) for kind, token in zip(which, tokens.flatten(), strict=True)}
        assert len(pairs) == 4
    again = DiscreteVAE(config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.encode(others), tokens)
    codes = model.quantizer.codebook.detach().clone()
    loss = model.train()(training[:1], 0.5, 0)
    if quantizer == "vq-ema":  # codes that wait for their turn are not taken for dead
        waiting = torch.bincount(loss.indices.flatten(), minlength=64) == 0
        assert waiting.any()
        assert torch.equal(model.quantizer.codebook[waiting], codes[waiting])
    (loss.nll + loss.kl + loss.distance).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_patches_are_pixels_of_one_position() -> None:
    config = DVAEConfig(resolution=24, width=8, groups=2, blocks=1, patch=3, vocab=16, code_width=8)
    assert config.grid == (4, 4)
    model = DiscreteVAE(config)
    assert model.encode(torch.rand(2, 3, 24, 24)).shape == (2, 4, 4)
    assert model.decode(torch.zeros(2, 4, 4, dtype=torch.int64)).shape == (2, 3, 24, 24)
    with pytest.raises(ValueError, match="resolution: got 16, wanted a multiple of 6 for 2 groups and patches of 3"):
        replace(config, resolution=16)
