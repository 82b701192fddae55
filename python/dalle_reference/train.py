"""The two stages: the dVAE on pictures, the transformer on captions and the dVAE's tokens."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalle_reference import checkpoint, render, schedules
from dalle_reference.config import TrainDVAEConfig, TrainTransformerConfig, to_json
from dalle_reference.data import PictureSet, load_pictures
from dalle_reference.dvae import DiscreteVAE, DVAEConfig
from dalle_reference.errors import UserError
from dalle_reference.evaluate import codebook_use, psnr
from dalle_reference.generate import generate
from dalle_reference.loop import Run, batch_indices, resolve_device, run_folder, step_generator
from dalle_reference.tokenizer import PADDING, CaptionTokenizer
from dalle_reference.transformer import DalleTransformer, TransformerConfig

_SHOWN = 16
_ENCODE_BATCH = 128


def train_dvae(config: TrainDVAEConfig) -> Path:
    """Trains stage 1 and returns its folder.

    Raises:
        UserError: for faults in the data, the folder or the checkpoint.
        Interrupted: when asked to stop; the state is saved.
    """
    with run_folder(config.run):
        return _train_dvae(config)


def _train_dvae(config: TrainDVAEConfig) -> Path:
    run_config, model_config = config.run, config.model
    device = resolve_device(run_config.device)
    pictures = load_pictures(config.data.source, model_config.resolution, run_config.cache)
    training, held_out = pictures.split(config.data.held_out)
    _require_pictures(training, config.data.source)
    torch.manual_seed(run_config.seed)
    model = DiscreteVAE(model_config).to(device)
    mean_model = DiscreteVAE(model_config).to(device)
    run = Run(run_config, "dvae", model, to_json(config))
    images = training.images
    shown = (held_out if len(held_out) else training).images[:_SHOWN].to(device)

    def compute_loss(step: int, detailed: bool) -> tuple[torch.Tensor, dict[str, float]]:
        chosen = torch.from_numpy(batch_indices(step, run_config.batch, len(images), run_config.seed))
        batch = images[chosen].to(device).float() / 255.0
        tau_steps = max(1, round(config.temperature_share * run_config.steps))
        tau = schedules.half_cosine(step, tau_steps, 1.0, config.temperature)
        beta_steps = max(1, round(config.kl_share * run_config.steps))
        beta = schedules.half_cosine(step, beta_steps, 0.0, config.kl_weight)
        seed = int(step_generator(run_config.seed, step).integers(2**63))
        output = model(batch, tau, seed)
        loss = output.nll + beta * output.kl + config.distance_weight * output.distance
        if not detailed:
            return loss, {}
        numbers = _floats(nll=output.nll, kl=output.kl, distance=output.distance)
        numbers.pop("kl" if model_config.quantizer == "vq" else "distance")
        numbers |= {"temperature": tau, "kl_weight": beta}
        return loss, numbers | codebook_use(output.indices, model_config.vocab)

    def draw(step: int, board: Any) -> None:
        average = run.averaged(mean_model)
        assert isinstance(average, DiscreteVAE)
        path = run_config.out / "pictures" / f"reconstructions-{step:08d}.png"
        decoded = average.decode(average.encode(shown.float() / 255.0))
        draw_pairs(path, shown, decoded, f"step {step}: held-out pictures, and what is left of them", pictures.credit)
        quality = psnr(shown.float() / 255.0, decoded)
        board.add_scalar("held_out_psnr", quality, step)
        board.add_images("reconstructions", decoded, step)

    run.train(compute_loss, draw)
    return run_config.out


def train_transformer(config: TrainTransformerConfig) -> Path:
    """Trains stage 2 and returns its folder, which holds all that generation needs: also the tokenizer and the dVAE.

    Raises:
        UserError: for faults in the data, the folders or the checkpoints.
        Interrupted: when asked to stop; the state is saved.
    """
    with run_folder(config.run):
        return _train_transformer(config)


def _train_transformer(config: TrainTransformerConfig) -> Path:
    run_config = config.run
    device = resolve_device(run_config.device)
    dvae_source = run_config.out / "dvae" if run_config.resume else config.dvae
    dvae = load_dvae(dvae_source, device)
    training = select_training(config, dvae.config, run_config.cache)
    tokens = tokenize_pictures(dvae, training.images)
    captions = [list(record.captions.values()) for record in training.records]

    tokenizer_file = run_config.out / "tokenizer.json"
    if run_config.resume:
        tokenizer = CaptionTokenizer.load(tokenizer_file)
    else:
        tokenizer = CaptionTokenizer.train((text for texts in captions for text in texts), config.vocab_text)
    torch.manual_seed(run_config.seed)
    model_config = TransformerConfig(
        vocab_text=tokenizer.vocab_size,
        text_length=config.text_length,
        grid=dvae.config.grid,
        vocab_image=dvae.config.vocab,
        layers=config.layers,
        heads=config.heads,
        head_dim=config.head_dim,
    )
    model = DalleTransformer(model_config).to(device)
    mean_model = DalleTransformer(model_config).to(device)
    document = to_json(config) | {"model": to_json(model_config)}
    document.pop("dvae")
    if not run_config.resume:
        _keep_dvae(config.dvae, run_config.out / "dvae")
        tokenizer.save(tokenizer_file)
    run = Run(run_config, "transformer", model, document)
    length = model_config.caption_length

    def compute_loss(step: int, detailed: bool) -> tuple[torch.Tensor, dict[str, float]]:
        chance = step_generator(run_config.seed, step)
        chosen = batch_indices(step, run_config.batch, len(training), run_config.seed)
        texts = [captions[i][chance.integers(len(captions[i]))] for i in chosen]
        text = tokenizer.encode(texts, length, config.bpe_dropout, chance)
        text[torch.from_numpy(chance.random(len(chosen)) < config.caption_dropout)] = PADDING
        loss = model.loss(text.to(device), tokens[torch.from_numpy(chosen)].to(device))
        return loss.total, _floats(text_loss=loss.text, image_loss=loss.image) if detailed else {}

    def draw(step: int, board: Any) -> None:
        average = run.averaged(mean_model)
        assert isinstance(average, DalleTransformer)
        chosen = np.linspace(0, len(training) - 1, min(_SHOWN, len(training))).astype(int)
        texts = [captions[i][number % len(captions[i])] for number, i in enumerate(chosen)]
        text = tokenizer.encode(texts, length).to(device)
        sampled = generate(average, text, seed=run_config.seed, guidance_scale=config.guidance_scale)
        decoded = dvae.decode(sampled.unflatten(1, dvae.config.grid))
        path = run_config.out / "pictures" / f"samples-{step:08d}.png"
        render.sheet(path, decoded, texts, heading=f"step {step}: samples", footer=training.credit)
        board.add_images("samples", decoded, step)

    run.train(compute_loss, draw)
    return run_config.out


def select_training(config: TrainTransformerConfig, model: DVAEConfig, cache: Path | None) -> PictureSet:
    """The captioned pictures that stage 2 trains on."""
    training, _ = load_pictures(config.data.source, model.resolution, cache).captioned().split(config.data.held_out)
    _require_pictures(training, f"{config.data.source}, with captions")
    if config.one_per_concept:
        first = {record.concept: index for index, record in reversed(list(enumerate(training.records)))}
        training = training.take(sorted(first.values()))
    if config.pictures is not None and config.pictures < len(training):
        training = training.take([i * len(training) // config.pictures for i in range(config.pictures)])
    return training


def _require_pictures(pictures: PictureSet, source: str) -> None:
    if not len(pictures):
        raise UserError(f"{source}: no pictures to train on")


def load_dvae(run: Path, device: torch.device) -> DiscreteVAE:
    """The dVAE of a finished (or running) stage 1, with the running mean of its weights, or one of converted weights.

    Raises:
        UserError: for a missing or damaged checkpoint, or one of another configuration.
    """
    saved = checkpoint.load(run, "dvae")
    config = _config_of(DVAEConfig, saved)
    model = DiscreteVAE(config)
    checkpoint.restore(model, saved.group("ema"), saved.path)
    return model.to(device).eval()


def load_transformer(run: Path, device: torch.device) -> tuple[DalleTransformer, CaptionTokenizer, DiscreteVAE]:
    """All that draws pictures: the transformer with the running mean of its weights, its tokenizer, its dVAE.

    Raises:
        UserError: for missing or damaged files, or ones of another configuration.
    """
    if run.is_file():
        raise UserError(f"{run}: a file of weights; wanted the folder of a stage 2, which has tokenizer and dVAE too")
    model = load_transformer_alone(run, device)
    dvae = load_dvae(run / "dvae", device)
    config = model.config
    if (dvae.config.grid, dvae.config.vocab) != (config.grid, config.vocab_image):
        raise UserError(
            f"{run / 'dvae'}: grid {dvae.config.grid} and vocabulary {dvae.config.vocab},"
            f" the transformer wants {config.grid} and {config.vocab_image}"
        )
    return model, CaptionTokenizer.load(run / "tokenizer.json"), dvae


def load_transformer_alone(run: Path, device: torch.device) -> DalleTransformer:
    """The transformer of a stage 2, or one of converted weights, without what turns captions and pictures into tokens.

    Raises:
        UserError: as `load_transformer`.
    """
    saved = checkpoint.load(run, "transformer")
    with torch.device("meta"):  # initial weights, drawn only to be replaced, take a minute for a billion
        model = DalleTransformer(_config_of(TransformerConfig, saved))
    model.to_empty(device=device)
    checkpoint.restore(model, saved.group("ema"), saved.path)
    return model.eval()


def _config_of(kind: type, saved: checkpoint.Checkpoint) -> Any:
    stored = saved.config.get("model")
    names = {entry.name for entry in fields(kind)}
    added = {entry.name for entry in fields(kind) if "added" in entry.metadata}
    if not isinstance(stored, dict) or not names - added <= stored.keys() <= names:
        raise UserError(f"{saved.path}: made with another configuration: its model is {stored}, wanted {sorted(names)}")
    try:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"{saved.path}: made with another configuration: {error}") from error


def _keep_dvae(source: Path, target: Path) -> None:
    """A copy of the dVAE's checkpoint beside the transformer, so that the pair cannot come apart."""
    if target.exists() and {entry.name for entry in target.iterdir()} - {"checkpoints"}:
        raise UserError(f"{target}: is in the way, the dVAE's copy goes there; choose another --out")
    newest = checkpoint.load(source, "dvae")
    tensors = {f"ema.{name}": value for name, value in newest.group("ema").items()}
    if target.exists():
        shutil.rmtree(target)
    checkpoint.save(target, "dvae", newest.step, newest.config, tensors)


@torch.no_grad()
def tokenize_pictures(dvae: DiscreteVAE, images: torch.Tensor) -> torch.Tensor:
    """Tokens of uint8 pictures [N, 3, S, S]: int64 [N, h * w], on the CPU."""
    device = next(dvae.parameters()).device
    parts = [dvae.encode(part.to(device).float() / 255.0).flatten(1).cpu() for part in images.split(_ENCODE_BATCH)]
    return torch.cat(parts)


def _floats(**values: torch.Tensor) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in values.items()}


def draw_pairs(path: Path, originals: torch.Tensor, decoded: torch.Tensor, heading: str, footer: str) -> None:
    """Rows of originals, each above the row of what the dVAE makes of them."""
    columns = 8
    rows: list[torch.Tensor] = []
    for start in range(0, len(originals), columns):
        above, below = originals[start : start + columns], decoded[start : start + columns]
        blank = torch.full_like(below[:1], 1.0)
        for row in (above.float() / 255.0 if above.dtype == torch.uint8 else above, below):
            rows += [*row, *[blank[0]] * (columns - len(row))]
    render.sheet(path, rows, columns=columns, heading=heading, footer=footer)
