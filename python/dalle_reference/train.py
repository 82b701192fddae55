"""The two stages, the dVAE on pictures and the transformer on captions and the dVAE's tokens; and CLIP, the judge."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalle_reference import checkpoint, render, schedules
from dalle_reference.clip import CLIP, caption_tokens
from dalle_reference.config import TrainCLIPConfig, TrainDVAEConfig, TrainTransformerConfig, to_json
from dalle_reference.data import PictureSet, load_pictures
from dalle_reference.dvae import DiscreteVAE, DVAEConfig
from dalle_reference.errors import UserError
from dalle_reference.evaluate import codebook_use, psnr
from dalle_reference.generate import generate
from dalle_reference.load import load_dvae, require_grid
from dalle_reference.loop import (
    Run,
    alone_in_its_folder,
    batch_indices,
    distinct_indices,
    resolve_device,
    step_generator,
)
from dalle_reference.tokenizer import PADDING, CaptionTokenizer
from dalle_reference.transformer import NO_TOKEN, DalleTransformer

_SHOWN = 16
_ENCODE_BATCH = 128


@alone_in_its_folder
def train_dvae(config: TrainDVAEConfig) -> Path:
    """Trains stage 1 and returns its folder.

    Raises:
        UserError: for faults in the data, the folder or the checkpoint.
        Interrupted: when asked to stop; the state is saved.
    """
    run_config = config.run
    device = resolve_device(run_config.device)
    pictures = load_pictures(config.data.source, config.model.resolution, run_config.cache)
    training, held_out = pictures.split(config.data.held_out)
    require_pictures(training, config.data.source)
    images = training.images
    shown = (held_out if len(held_out) else training).images[:_SHOWN].to(device).float() / 255.0
    torch.manual_seed(run_config.seed)
    run = Run(run_config, "dvae", DiscreteVAE(config.model).to(device), to_json(config))

    def compute_loss(step: int, detailed: bool) -> tuple[torch.Tensor, dict[str, float]]:
        chosen = torch.from_numpy(batch_indices(step, run_config.batch, len(images), run_config.seed))
        batch = images[chosen].to(device).float() / 255.0
        tau_steps = max(1, round(config.temperature_share * run_config.steps))
        tau = schedules.half_cosine(step, tau_steps, 1.0, config.temperature)
        beta_steps = max(1, round(config.kl_share * run_config.steps))
        beta = schedules.half_cosine(step, beta_steps, 0.0, config.kl_weight)
        seed = int(step_generator(run_config.seed, step).integers(2**63))
        output = run.model(batch, tau, seed)
        loss = output.nll + beta * output.kl + config.distance_weight * output.distance
        if not detailed:
            return loss, {}
        numbers = _floats(nll=output.nll, kl=output.kl, distance=output.distance)
        numbers.pop("kl" if config.model.quantizer == "vq" else "distance")
        numbers |= {"temperature": tau, "kl_weight": beta}
        return loss, numbers | codebook_use(output.indices, config.model.vocab)

    def draw(step: int, board: Any) -> None:
        mean = run.average.module
        decoded = mean.decode(mean.encode(shown))
        path = run_config.out / "pictures" / f"reconstructions-{step:08d}.png"
        heading = f"step {step}: held-out pictures, and what is left of them"
        render.pairs(path, shown, decoded, heading=heading, footer=pictures.credit)
        board.add_scalar("held_out_psnr", psnr(shown, decoded), step)
        board.add_images("reconstructions", decoded, step)

    run.train(compute_loss, draw)
    return run_config.out


@alone_in_its_folder
def train_transformer(config: TrainTransformerConfig) -> Path:
    """Trains stage 2 and returns its folder, which holds all that generation needs: also the tokenizer and the dVAE.

    Raises:
        UserError: for faults in the data, the folders or the checkpoints.
        Interrupted: when asked to stop; the state is saved.
    """
    run_config = config.run
    device = resolve_device(run_config.device)
    kept_dvae, kept_tokenizer = run_config.out / "dvae", run_config.out / "tokenizer.json"
    dvae_source = kept_dvae if run_config.resume else config.dvae
    dvae = load_dvae(dvae_source, device)
    require_grid(config.model, dvae.config, dvae_source)
    training = select_training(config, dvae.config)
    tokens = tokenize_pictures(dvae, training.images)
    captions = [list(record.captions.values()) for record in training.records]
    if run_config.resume:
        tokenizer = CaptionTokenizer.load(kept_tokenizer)
    else:
        tokenizer = CaptionTokenizer.train((text for texts in captions for text in texts), config.model.vocab_text)
        _keep_dvae(config.dvae, kept_dvae)
        tokenizer.save(kept_tokenizer)
    length = config.model.caption_length
    torch.manual_seed(run_config.seed)
    run = Run(run_config, "transformer", DalleTransformer(config.model).to(device), to_json(config))

    def compute_loss(step: int, detailed: bool) -> tuple[torch.Tensor, dict[str, float]]:
        chance = step_generator(run_config.seed, step)
        chosen = batch_indices(step, run_config.batch, len(training), run_config.seed)
        texts = [captions[i][chance.integers(len(captions[i]))] for i in chosen]
        text = tokenizer.encode(texts, length, config.bpe_dropout, chance)
        text[torch.from_numpy(chance.random(len(chosen)) < config.caption_dropout)] = PADDING
        cells = tokens[torch.from_numpy(chosen)]
        seen = hide_cells(cells, config.cell_dropout, chance)
        loss = run.model.loss(text.to(device), cells.to(device), seen=seen.to(device))
        return loss.total, _floats(text_loss=loss.text, image_loss=loss.image) if detailed else {}

    def draw(step: int, board: Any) -> None:
        chosen = np.linspace(0, len(training) - 1, min(_SHOWN, len(training))).astype(int)
        texts = [captions[i][number % len(captions[i])] for number, i in enumerate(chosen)]
        text = tokenizer.encode(texts, length).to(device)
        sampled = generate(run.average.module, text, seed=run_config.seed, guidance_scale=config.guidance_scale)
        decoded = dvae.decode(sampled.unflatten(1, dvae.config.grid))
        path = run_config.out / "pictures" / f"samples-{step:08d}.png"
        render.sheet(path, decoded, texts, heading=f"step {step}: samples", footer=training.credit)
        board.add_images("samples", decoded, step)

    run.train(compute_loss, draw)
    return run_config.out


@alone_in_its_folder
def train_clip(config: TrainCLIPConfig) -> Path:
    """Trains CLIP and returns its folder, which holds its tokenizer too.

    Raises:
        UserError: for faults in the data, the folder or the checkpoint; if a batch has no room in as many concepts.
        Interrupted: when asked to stop; the state is saved.
    """
    run_config, model_config = config.run, config.model
    device = resolve_device(run_config.device)
    pictures = load_pictures(config.data.source, model_config.resolution, run_config.cache).captioned()
    training, held_out = pictures.split(config.data.held_out)
    variants: dict[str, list[int]] = {}
    for index, record in enumerate(training.records):
        variants.setdefault(record.concept, []).append(index)
    concepts = list(variants.values())
    if len(concepts) < run_config.batch:
        raise UserError(
            f"batch: got {run_config.batch}, but {config.data.source} shows {len(concepts)} concepts to learn"
        )
    captions = [list(record.captions.values()) for record in training.records]
    kept_tokenizer = run_config.out / "tokenizer.json"
    if run_config.resume:
        tokenizer = CaptionTokenizer.load(kept_tokenizer)
    else:
        tokenizer = CaptionTokenizer.train((text for texts in captions for text in texts), model_config.vocab_text - 1)
        tokenizer.save(kept_tokenizer)
    torch.manual_seed(run_config.seed)
    run = Run(run_config, "clip", CLIP(model_config).to(device), to_json(config))

    def compute_loss(step: int, detailed: bool) -> tuple[torch.Tensor, dict[str, float]]:
        chance = step_generator(run_config.seed, step)
        chosen = [
            concepts[i][chance.integers(len(concepts[i]))]
            for i in distinct_indices(step, run_config.batch, len(concepts), run_config.seed)
        ]
        texts = [captions[i][chance.integers(len(captions[i]))] for i in chosen]
        tokens = caption_tokens(texts, tokenizer, model_config, config.bpe_dropout, chance)
        loss = run.model.loss(training.images[chosen].to(device).float() / 255.0, tokens.to(device))
        return loss.total, _floats(right=loss.right, scale=run.model.scale) if detailed else {}

    def draw(step: int, board: Any) -> None:
        shown = held_out if len(held_out) else training
        for language, share in name_pictures(run.average.module, tokenizer, shown).items():
            board.add_scalar(f"names_right/{language}", share, step)

    run.train(compute_loss, draw)
    return run_config.out


@torch.no_grad()
def name_pictures(model: CLIP, tokenizer: CaptionTokenizer, pictures: PictureSet) -> dict[str, float]:
    """How often the nearest of all concepts' captions is a picture's own, by language; one picture a concept."""
    device = next(model.parameters()).device
    shares = {}
    for language in sorted({language for record in pictures.records for language in record.captions}):
        named = [index for index, record in enumerate(pictures.records) if language in record.captions]
        chosen = pictures.take(named).one_per_concept()
        names = [record.captions[language] for record in chosen.records]
        vectors = model.encode_captions(caption_tokens(names, tokenizer, model.config).to(device))
        guesses = [
            (model.encode_pictures(part.to(device).float() / 255.0) @ vectors.T).argmax(dim=1)
            for part in chosen.images.split(_ENCODE_BATCH)
        ]
        shares[language] = float((torch.cat(guesses).cpu() == torch.arange(len(chosen))).double().mean())
    return shares


def select_training(config: TrainTransformerConfig, dvae: DVAEConfig) -> PictureSet:
    """The captioned pictures that stage 2 trains on."""
    pictures = load_pictures(config.data.source, dvae.resolution, config.run.cache)
    training, _ = pictures.captioned().split(config.data.held_out)
    require_pictures(training, f"{config.data.source}, with captions")
    if config.one_per_concept:
        training = training.one_per_concept()
    if config.pictures is not None and config.pictures < len(training):
        training = training.take([i * len(training) // config.pictures for i in range(config.pictures)])
    return training


@torch.no_grad()
def tokenize_pictures(dvae: DiscreteVAE, images: torch.Tensor) -> torch.Tensor:
    """Tokens of uint8 pictures [N, 3, S, S]: int64 [N, h * w], on the CPU."""
    device = next(dvae.parameters()).device
    parts = [dvae.encode(part.to(device).float() / 255.0).flatten(1).cpu() for part in images.split(_ENCODE_BATCH)]
    return torch.cat(parts)


def hide_cells(tokens: torch.Tensor, most: float, chance: np.random.Generator) -> torch.Tensor:
    """Tokens of pictures, int64 [B, L], with `NO_TOKEN` in place of a share of each one's, drawn from 0 to `most`."""
    share = most * chance.random((len(tokens), 1))
    return tokens.masked_fill(torch.from_numpy(chance.random(tokens.shape) < share), NO_TOKEN)


def require_pictures(pictures: PictureSet, source: str) -> None:
    """Raises UserError where there are none."""
    if not len(pictures):
        raise UserError(f"{source}: no pictures to train on")


def _keep_dvae(source: Path, target: Path) -> None:
    """A copy of the dVAE's checkpoint beside the transformer, so that the pair cannot come apart."""
    if target.exists() and {entry.name for entry in target.iterdir()} - {"checkpoints"}:
        raise UserError(f"{target}: is in the way, the dVAE's copy goes there; choose another --out")
    newest = checkpoint.load(source, "dvae")
    tensors = {f"ema.{name}": value for name, value in newest.group("ema").items()}
    if target.exists():
        shutil.rmtree(target)
    checkpoint.save(target, "dvae", newest.step, newest.config, tensors)


def _floats(**values: torch.Tensor) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in values.items()}
