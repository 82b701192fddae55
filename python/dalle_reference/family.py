"""The rest of the family beside a finished demo: CLIP, pixels, priors and decoder, and one table of what they do."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalle_reference import render, sheets, train, train_family
from dalle_reference.clip import CLIP, caption_tokens
from dalle_reference.config import (
    CLIP_PRESETS,
    DECODER_PRESETS,
    PIXELS_PRESETS,
    PRIOR_PRESETS,
    TRANSFORMER_PRESETS,
    TrainDecoderConfig,
    TrainPixelDecoderConfig,
    TrainPixelsConfig,
    TrainTransformerConfig,
)
from dalle_reference.data import CHANGES, OPENMOJI_CREDIT, PictureSet, load_pictures, pairs
from dalle_reference.data.openmoji import LANGUAGES
from dalle_reference.demo import SAMPLING, plan, timed
from dalle_reference.errors import UserError, require
from dalle_reference.evaluate import likelihood, pixel_loss, prior_cosines, retrieval, right_shares
from dalle_reference.files import exclusive, replacing
from dalle_reference.generate import generate
from dalle_reference.judge import agreement, caption_vectors, name_pictures, picture_vectors
from dalle_reference.load import load_clip, load_decoder, load_dvae, load_pixels, load_prior, load_transformer
from dalle_reference.loop import Interrupted
from dalle_reference.parallel import World, resolve_device
from dalle_reference.tokenizer import CaptionTokenizer
from dalle_reference.unclip import TokenDecoder

_SEED = 0
_SHARES = {
    "clip": 0.26,
    "pixels": 0.06,
    "palette": 0.07,
    "prior": 0.16,
    "autoregressive": 0.03,
    "decoder": 0.11,
    "pixel-decoder": 0.08,
    "panels": 0.23,
}
"""Of the training time."""
_KINDS = {"autoregressive": "prior", "palette": "pixels", "pixel-decoder": "decoder", "panels": "transformer"}
"""Whose folder's name, by which checkpoints go, is not the stage's."""
_ASKED = 64
"""Captions, or pictures, of a figure."""
_JUDGED, _CANDIDATES, _NUMBERS = 32, 512, (1, 8, 32, 128, 512)
"""Captions of which CLIP judges pictures, how many are drawn of each, and of how many it chooses."""
_TEMPERATURES, _SCARCE, _TRIED = (1.0, 2.0, 3.0, 4.0, 5.0), 1 / 3, 8
"""CLIP chooses at the first at which at most this share of so many pictures is right: else there is no choice."""


@dataclass(frozen=True)
class FamilyConfig:
    """Train CLIP, a transformer of pixels, unCLIP's priors and its decoder beside a finished demo, and measure them."""

    demo: Path = Path("runs/demo")
    """Folder of a finished demo, whose dVAE and transformer are used."""
    out: Path = Path("runs/family")
    """Folder for models, sheets and report.json; must not hold a family yet."""
    minutes: float = 22.0
    """What training may take, all models together: the steps are chosen so, on the speed of short trials."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    cache: Path | None = None
    """Where decoded pictures are kept; $DALLE_REFERENCE_CACHE or the user's cache folder by default."""

    def __post_init__(self) -> None:
        require(self, "a finite number above 0", lambda value: 0 < value < math.inf, "minutes")


def run(config: FamilyConfig) -> dict[str, Any]:
    """Trains what is missing and returns the report, which it also writes as report.json.

    Raises:
        UserError: if `out` holds a finished family, or `demo` no demo.
    """
    try:
        with exclusive(config.out):
            return _run(config, World(resolve_device(config.device)))
    except Interrupted as stop:
        raise Interrupted(f"{config.out}: stopped; the same command goes on") from stop
    except OSError as error:
        raise UserError(f"{config.out}: {error}") from error


def _run(config: FamilyConfig, world: World) -> dict[str, Any]:
    if (config.out / "report.json").exists():
        raise UserError(f"{config.out}: holds a family already; take it away, or choose another --out")
    dvae = load_dvae(config.demo / "dvae", world.device)
    seconds: dict[str, float] = {}
    clip_run, prior_run = config.out / "clip", config.out / "prior"
    stages: dict[str, tuple[Any, Any]] = {
        "clip": (CLIP_PRESETS["demo"][1], train.train_clip),
        "pixels": (PIXELS_PRESETS["bytes"][1], train_family.train_pixels),
        "palette": (PIXELS_PRESETS["palette"][1], train_family.train_pixels),
        "prior": (replace(PRIOR_PRESETS["diffusion"][1], clip_run=clip_run), train_family.train_prior),
        "autoregressive": (replace(PRIOR_PRESETS["autoregressive"][1], clip_run=clip_run), train_family.train_prior),
    }
    decoder: Any = DECODER_PRESETS["tokens"][1]
    shape = replace(decoder.model, grid=dvae.config.grid, vocab_image=dvae.config.vocab)
    decoder = replace(decoder, model=shape, clip_run=clip_run, dvae=config.demo / "dvae")
    stages["decoder"] = (decoder, train_family.train_decoder)
    stages["pixel-decoder"] = (
        replace(DECODER_PRESETS["pixels"][1], clip_run=clip_run),
        train_family.train_decoder,
    )
    panels = TRANSFORMER_PRESETS["panels"][1]
    shape = replace(panels.model, grid=(2 * dvae.config.grid[0], dvae.config.grid[1]), vocab_image=dvae.config.vocab)
    stages["panels"] = (replace(panels, model=shape, dvae=config.demo / "dvae"), train.train_transformer)
    planned: dict[str, Any] = {}
    for name, (stage, training) in stages.items():
        folder = config.out / name
        if name in _KINDS:
            folder /= _KINDS[name]
        often = {"out": folder, "log_every": 5, "draw_every": 0, "seed": _SEED}
        stage = replace(stage, run=replace(stage.run, device=str(world.device), cache=config.cache, **often))
        with timed(name, seconds):
            planned[name] = plan(stage, training, 60 * config.minutes * _SHARES[name], world)
            training(planned[name])
    with timed("figures", seconds), torch.no_grad():
        clip, tokenizer = load_clip(clip_run, world.device)
        table = _names(config, clip, tokenizer) | _best_of(config, clip, tokenizer)
        table |= _pixels(config, "pixels", planned["pixels"], world.device)
        table |= _pixels(config, "palette", planned["palette"], world.device)
        for name, folder in (("diffusion", prior_run), ("autoregressive", config.out / "autoregressive" / "prior")):
            table |= _prior(config, name, folder, world.device)
        table |= _decoders(config, planned["decoder"], planned["pixel-decoder"], world.device)
        table |= _panels(config, planned["panels"], world.device)
    report = {
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "steps": {name: stage.run.steps for name, stage in planned.items()},
        "figures": table,
        "credit": OPENMOJI_CREDIT,
    }
    with replacing(config.out / "report.json") as draft:
        draft.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    width = max(map(len, table))
    print("\n".join(f"{name:{width}}  {value}" for name, value in table.items()))
    print(f"sheets: {', '.join(map(str, sorted(config.out.glob('*.png'))))}; {OPENMOJI_CREDIT}", flush=True)
    return report


def _names(config: FamilyConfig, clip: CLIP, tokenizer: CaptionTokenizer) -> dict[str, str]:
    """Zero-shot: the names of held-out concepts, which CLIP has to choose among."""
    data = CLIP_PRESETS["demo"][1].data
    pictures = load_pictures(data.source, clip.config.resolution, config.cache).captioned()
    _, held_out = pictures.split(data.held_out)
    chance = 1 / len(held_out.one_per_concept())
    names = {
        f"CLIP, held-out names, {language}": f"{share:.1%} right at first guess, {share / chance:.0f} times chance"
        for language, share in name_pictures(clip, tokenizer, held_out).items()
    }
    return names | {"CLIP, held-out concepts, one of five skin tones": f"{_tones(clip, tokenizer, held_out):.1%} right"}


def _tones(clip: CLIP, tokenizer: CaptionTokenizer, pictures: PictureSet) -> float:
    """How often CLIP finds a picture's caption among those of its concept in all five skin tones."""
    toned: dict[str, list[int]] = {}
    for index, record in enumerate(pictures.records):
        if record.captions.get("en", "").endswith("skin tone"):
            toned.setdefault(record.concept, []).append(index)
    right = []
    for variants in toned.values():
        if len(variants) == 5:
            shown = pictures.take(variants)
            said = caption_vectors(clip, tokenizer, [record.captions["en"] for record in shown.records])
            guesses = (picture_vectors(clip, shown.images) @ said.T).argmax(dim=1)
            right.append(guesses.cpu() == torch.arange(5))
    return float(torch.cat(right).double().mean())


def _best_of(config: FamilyConfig, clip: CLIP, judge_tokenizer: CaptionTokenizer) -> dict[str, str]:
    """How often the demo's picture is the right one, if CLIP chooses among more and more of them, or chance does.

    The candidates of a caption are taken in groups of each size, so that small ones are judged many times.
    """
    device = clip.log_scale.device
    model, tokenizer, dvae = load_transformer(config.demo / "transformer", device)
    data = TRANSFORMER_PRESETS["demo"][1].data
    training = train.captioned_training(data, dvae.config.resolution, config.cache)
    gallery = train.tokenize_pictures(dvae, training.images)
    chosen = _some(len(training))[:_JUDGED]
    texts = _captions(training.records, chosen)

    def right_ones(temperature: float, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of each caption: tokens [count, cells], and how right they are."""
        for number, (text, wanted) in enumerate(zip(texts, chosen.tolist(), strict=True)):
            prompt = tokenizer.encode([text], model.config.caption_length).to(device)
            drawn = generate(model, prompt, seed=_SEED + number, number=count, temperature=temperature)
            yield drawn, right_shares(drawn.cpu(), torch.full((count,), wanted), gallery)

    table: dict[str, str] = {}
    for temperature in _TEMPERATURES:
        share = float(torch.cat([shares for _, shares in right_ones(temperature, _TRIED)]).mean())
        table[f"DALL-E at temperature {temperature:g}"] = f"{share:.1%} right of {len(gallery)}"
        if share <= _SCARCE:
            break
    right, agreed = [], []
    for text, (drawn, shares) in zip(texts, right_ones(temperature, _CANDIDATES), strict=True):
        pictures = torch.cat([dvae.decode(part) for part in drawn.unflatten(1, model.config.grid).split(16)])
        agreed.append(agreement(clip, judge_tokenizer, pictures, text).cpu())
        right.append(shares)
    curve: dict[str, list[float]] = {"CLIP's choice": [], "any": [], "the best there is": []}
    numbers = [number for number in _NUMBERS if number <= _CANDIDATES]
    for number in numbers:
        groups = torch.stack(right).unflatten(1, (-1, number))
        best = torch.stack(agreed).unflatten(1, (-1, number)).argmax(dim=-1, keepdim=True)
        by_chance = torch.from_numpy(np.random.default_rng(_SEED).integers(number, size=tuple(best.shape)))
        found = [groups.gather(-1, best), groups.gather(-1, by_chance), groups.amax(dim=-1)]
        for name, each in zip(curve, found, strict=True):
            curve[name].append(float(each.mean()))
        ours, control, most = (f"{values[-1]:.1%}" for values in curve.values())
        table[f"DALL-E at temperature {temperature:g}, CLIP's best of {number}"] = (
            f"{ours} right of {len(gallery)} (any of them {control}, at best {most})"
        )
    render.lines(config.out / "best-of.png", numbers, curve, "candidates", f"right of {len(gallery)} pictures")
    return table


def _panels(config: FamilyConfig, stage: TrainTransformerConfig, device: torch.device) -> dict[str, str]:
    """Pictures that were seen, changed in ways that were seen, but not of these pictures: how often that was done."""
    model, tokenizer, dvae = load_transformer(stage.run.out, device)
    _, held_out = pairs(train.captioned_training(stage.data, dvae.config.resolution, config.cache))
    held_out = held_out.take(_some(len(held_out)).tolist())
    above = held_out.images[:, :, : dvae.config.resolution]
    given = train.tokenize_pictures(dvae, above)
    captions = [record.captions["en"] for record in held_out.records]
    text = tokenizer.encode(captions, model.config.caption_length).to(device)
    drawn = generate(model, text, seed=_SEED, image_prefix=given.to(device), **SAMPLING)
    below = drawn[:, given.shape[1] :].cpu()
    changed = torch.stack([train.tokenize_pictures(dvae, change(above)) for change in CHANGES.values()], dim=1)
    targets = torch.tensor([list(CHANGES).index(caption) for caption in captions])
    judged = zip(below.split(1), targets.split(1), changed, strict=True)
    right = torch.cat([right_shares(*each) for each in judged])
    shown = [number for change in range(len(CHANGES)) for number in (targets == change).nonzero()[:4, 0].tolist()]
    render.sheet(
        config.out / "panels.png",
        dvae.decode(drawn.unflatten(1, model.config.grid))[shown],
        [captions[number] for number in shown],
        heading="Above what was given, below what was drawn: combinations that were held out",
        footer=held_out.credit,
    )
    return {"picture to picture, held-out combinations": f"{right.mean():.1%} the change asked for, of {len(CHANGES)}"}


def _pixels(config: FamilyConfig, name: str, stage: TrainPixelsConfig, device: torch.device) -> dict[str, str]:
    model = load_pixels(stage.run.out, device)
    pictures = load_pictures(stage.data.source, model.config.resolution, config.cache)
    held_out = pictures.split(stage.data.held_out)[1].one_per_concept()
    nats = pixel_loss(model, held_out)
    which = torch.linspace(0, len(held_out) - 1, min(6, len(held_out))).long()
    sheets.completion_sheet(
        config.out / f"{name}.png",
        model,
        held_out.images[which].to(device),
        model.config.resolution // 2,
        number=4,
        seed=_SEED,
        heading="Held-out pictures: what was given, what the transformer of pixels makes of it, and the picture",
        footer=pictures.credit,
    )
    return {f"{name}, held-out pictures": likelihood(stage.model, nats)}


def _prior(config: FamilyConfig, name: str, folder: Path, device: torch.device) -> dict[str, str]:
    prior, clip, tokenizer = load_prior(folder, device)
    data = PRIOR_PRESETS["diffusion"][1].data
    pictures = load_pictures(data.source, clip.config.resolution, config.cache).captioned()
    training, held_out = pictures.split(data.held_out)
    mean = picture_vectors(clip, training.images).mean(dim=0)
    cosines = prior_cosines(prior, clip, tokenizer, held_out, mean, _SEED)
    return {f"{name} prior, held-out cosine": ", ".join(f"{what} {value:.3f}" for what, value in cosines.items())}


def _decoders(
    config: FamilyConfig, tokens_stage: TrainDecoderConfig, pixels_stage: TrainPixelDecoderConfig, device: torch.device
) -> dict[str, str]:
    """What the decoders make of pictures' own vectors, of those the prior draws, and of the captions' own.

    Into tokens: how often that is the right picture. Into pixels, for which a CPU's minutes are too few to ask that:
    how near CLIP's vector of it is to the right picture's.
    """
    decoder, clip = load_decoder(tokens_stage.run.out, device)
    painter, _ = load_decoder(pixels_stage.run.out, device)
    prior, _, tokenizer = load_prior(config.out / "prior", device)
    assert isinstance(decoder, TokenDecoder)
    training = train.captioned_training(tokens_stage.data, decoder.dvae.config.resolution, config.cache)
    gallery = train.tokenize_pictures(decoder.dvae, training.images)
    chosen = _some(len(training))
    texts = _captions(training.records, chosen)
    seen = train.captioned_training(tokens_stage.data, clip.config.resolution, config.cache).take(chosen.tolist())
    tokens = caption_tokens(texts, tokenizer, clip.config).to(device)
    said, shown = caption_vectors(clip, tokenizer, texts), picture_vectors(clip, seen.images)
    drawing: dict[str, Any] = {"seed": _SEED, "guidance_scale": 1.5}
    table, cosines = {}, []
    for name, vectors in (
        ("the picture's vector", shown),
        ("the prior's", prior.draw(tokens, said, seed=_SEED)),
        ("the caption's", said),
    ):
        found = retrieval(decoder.draw_tokens(vectors, **drawing).cpu(), torch.from_numpy(chosen), gallery)
        table[f"unCLIP's decoder of {name}"] = f"{found.right:.1%} right of {found.candidates}"
        painted = picture_vectors(clip, painter.draw(vectors, **drawing))
        cosines.append(f"{name} {float((painted * shown).sum(dim=-1).mean()):.3f}")
    table["unCLIP's pixel decoder, cosine to the picture"] = ", ".join(cosines)
    for sheet, model in (("variations", decoder), ("variations-pixels", painter)):
        sheets.variation_sheet(
            config.out / f"{sheet}.png",
            model,
            training.images[torch.from_numpy(chosen[:6])],
            shown[:6],
            number=6,
            heading="Training pictures, and what unCLIP's decoder draws of their vectors",
            footer=OPENMOJI_CREDIT,
            **drawing,
        )
    return table


def _some(count: int) -> np.ndarray:
    return np.random.default_rng(_SEED).choice(count, size=min(_ASKED, count), replace=False)


def _captions(records: Any, chosen: np.ndarray) -> list[str]:
    """A caption of each, in one language after the other, where there is one."""
    texts = []
    for number, index in enumerate(chosen):
        captions = records[index].captions
        texts.append(captions.get(LANGUAGES[number % len(LANGUAGES)]) or next(iter(captions.values())))
    return texts
