"""The two stages, the dVAE on pictures and the transformer on captions and the dVAE's tokens; and CLIP, the judge."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalle_kernels.nn import VectorQuantizer
from dalle_reference import checkpoint, render, schedules
from dalle_reference.clip import CLIP, CLIPLoss, caption_tokens
from dalle_reference.config import DataConfig, TrainCLIPConfig, TrainDVAEConfig, TrainTransformerConfig, to_json
from dalle_reference.data import PictureSet, load_pictures, open_pictures, pairs, split_pictures
from dalle_reference.data.sources import find_shards
from dalle_reference.dvae import DiscreteVAE, DVAEOutput
from dalle_reference.errors import UserError
from dalle_reference.evaluate import codebook_use, psnr
from dalle_reference.generate import generate
from dalle_reference.judge import name_pictures
from dalle_reference.load import load_dvae, require_grid
from dalle_reference.loop import (
    Run,
    alone_in_its_folder,
    batch_indices,
    distinct_indices,
    sample_generator,
    step_generator,
)
from dalle_reference.parallel import World
from dalle_reference.picture_tokens import TokenSet, TokenShards, is_tokens, tokenize, tokenize_pictures
from dalle_reference.tokenizer import PADDING, CaptionTokenizer
from dalle_reference.transformer import NO_TOKEN, DalleTransformer, TransformerLoss

_SHOWN = 16


@alone_in_its_folder
def train_dvae(config: TrainDVAEConfig, world: World) -> Path:
    """Trains stage 1 and returns its folder.

    Raises:
        UserError: for faults in the data, the folder or the checkpoint.
        Interrupted: when asked to stop; the state is saved.
    """
    run_config, kind = config.run, config.model.quantizer
    device = world.device
    if run_config.accumulate > 1 and kind in ("vq-ema", "lfq"):
        raise UserError(
            f"accumulate: got {run_config.accumulate}, wanted 1: {kind} goes by a batch's features as a whole"
        )
    pictures = world.main_first(lambda: open_pictures(config.data, config.model.resolution, run_config.cache))
    training, held_out = split_pictures(pictures, config.data)
    kept = held_out if len(held_out) else training
    shown = world.first(lambda: kept.pictures(range(min(_SHOWN, len(kept))))).to(device).float() / 255.0
    torch.manual_seed(run_config.seed)
    model = DiscreteVAE(config.model).to(device)
    if config.fitted and not run_config.resume:
        count = min(config.model.fitting_pictures, len(training))
        some = torch.linspace(0, len(training) - 1, count).long().tolist()
        model.begin_with(world.first(lambda: training.pictures(some)).to(device).float() / 255.0, run_config.seed)
    feed = training.feed(lambda step: batch_indices(step, run_config.batch, len(training), run_config.seed))

    def prepare(step: int, parts: list[range]) -> list[tuple[Any, ...]]:
        seed = int(step_generator(run_config.seed, step).integers(2**63))
        return [(step, images, seed, part.start) for part, images in zip(parts, feed(step, parts), strict=True)]

    def objective(
        model: DiscreteVAE, step: int, pictures: torch.Tensor, seed: int, first: int
    ) -> tuple[torch.Tensor, DVAEOutput]:
        output = model(pictures.to(device).float() / 255.0, schedule(step)[0], seed, first, world)
        if isinstance(model.quantizer, VectorQuantizer):
            world.least(model.quantizer.idle)  # a code is as idle as where it was chosen last
        loss = output.nll + schedule(step)[1] * output.kl + config.distance_weight * output.distance
        return loss + config.entropy_weight * output.entropy, output

    def schedule(step: int) -> tuple[float, float]:
        """The relaxation's temperature, and the weight of the KL."""
        tau_steps = max(1, round(config.temperature_share * run_config.steps))
        beta_steps = max(1, round(config.kl_share * run_config.steps))
        tau = schedules.half_cosine(step, tau_steps, 1.0, config.temperature)
        return tau, schedules.half_cosine(step, beta_steps, 0.0, config.kl_weight)

    def describe(step: int, outputs: list[DVAEOutput]) -> dict[str, float]:
        terms = {"dvae": ["kl"], "lfq": ["distance", "entropy"]}.get(kind, ["distance"])
        numbers = means(world, outputs, "nll", *terms)
        numbers |= dict(zip(("temperature", "kl_weight"), schedule(step), strict=True))
        used = world.gather(torch.cat([output.indices for output in outputs]))
        return numbers | codebook_use(used, config.model.vocab)

    def draw(mean: DiscreteVAE, step: int, board: Any) -> None:
        decoded = mean.decode(mean.encode(shown))
        path = run_config.out / "pictures" / f"reconstructions-{step:08d}.png"
        heading = f"step {step}: held-out pictures, and what is left of them"
        render.pairs(path, shown, decoded, heading=heading, footer=pictures.credit)
        board.add_scalar("held_out_psnr", psnr(shown, decoded), step)
        board.add_images("reconstructions", decoded, step)

    run = Run(run_config, "dvae", model, objective, to_json(config), world)
    run.train(prepare, describe, draw)
    return run_config.out


@alone_in_its_folder
def train_transformer(config: TrainTransformerConfig, world: World) -> Path:
    """Trains stage 2 and returns its folder, which holds all that generation needs: also the tokenizer and the dVAE.

    Raises:
        UserError: for faults in the data, the folders or the checkpoints.
        Interrupted: when asked to stop; the state is saved.
    """
    run_config = config.run
    device = world.device
    kept_dvae, kept_tokenizer = run_config.out / "dvae", run_config.out / "tokenizer.json"
    dvae_source = kept_dvae if run_config.resume else config.dvae
    dvae = world.main_first(lambda: load_dvae(dvae_source, device))
    require_grid(config.model, dvae.config, dvae_source, panels=1 + config.panels)
    training = _training_tokens(config, dvae, world)

    def begin() -> None:
        said = (text for index in range(len(training)) for text in training.captions(index))
        CaptionTokenizer.train(said, config.model.vocab_text).save(kept_tokenizer)
        keep_checkpoint(config.dvae, kept_dvae, "dvae")

    if not run_config.resume:
        world.first(begin)
    tokenizer = CaptionTokenizer.load(kept_tokenizer)
    length = config.model.caption_length
    torch.manual_seed(run_config.seed)
    model = DalleTransformer(config.model).to(device)
    model.recompute = config.recompute
    given = config.model.image_length // 2 if config.panels else 0  # the upper panel always is

    def prepare(step: int, parts: list[range]) -> list[tuple[Any, ...]]:
        chosen = batch_indices(step, run_config.batch, len(training), run_config.seed)

        def sample(place: int) -> tuple[torch.Tensor, ...]:
            chance = sample_generator(run_config.seed, step, place)
            picture = int(chosen[place])
            epoch = (step * run_config.batch + place) // len(training)
            captions = training.captions(picture)
            caption = captions[(picture + epoch) % len(captions)]  # each as often as the others
            text = tokenizer.encode([caption], length, config.bpe_dropout, chance)
            if chance.random() < config.caption_dropout:
                text.fill_(PADDING)
            cells = training.cells(picture)
            return text, cells, hide_cells(cells, config.cell_dropout, chance)

        shares = [[torch.cat(rows) for rows in zip(*map(sample, part), strict=True)] for part in parts]
        count = int(world.total(torch.stack([(text >= 0).sum() for text, *_ in shares]).sum()))
        mean_count = max(count, 1) / (world.size * len(parts))
        return [(*(rows.to(device) for rows in share), mean_count) for share in shares]

    def objective(
        model: DalleTransformer, text: torch.Tensor, image: torch.Tensor, seen: torch.Tensor, text_count: float
    ) -> tuple[torch.Tensor, TransformerLoss]:
        loss = model.loss(text, image, seen=seen, given=given, text_count=text_count)
        return loss.total, loss

    def describe(step: int, losses: list[TransformerLoss]) -> dict[str, float]:
        found = means(world, losses, "text", "image")
        return {"text_loss": found["text"], "image_loss": found["image"]}

    def draw(mean: DalleTransformer, step: int, board: Any) -> None:
        chosen = np.linspace(0, len(training) - 1, min(_SHOWN, len(training))).astype(int)
        captions = [training.captions(i) for i in chosen]
        texts = [said[number % len(said)] for number, said in enumerate(captions)]
        text = tokenizer.encode(texts, length).to(device)
        above = torch.cat([training.cells(i)[:, :given] for i in chosen]).to(device)
        scale = config.guidance_scale
        sampled = generate(mean, text, seed=run_config.seed, guidance_scale=scale, image_prefix=above)
        decoded = dvae.decode(sampled.unflatten(1, config.model.grid))
        path = run_config.out / "pictures" / f"samples-{step:08d}.png"
        render.sheet(path, decoded, texts, heading=f"step {step}: samples", footer=training.credit)
        board.add_images("samples", decoded, step)

    run = Run(run_config, "transformer", model, objective, to_json(config), world)
    run.train(prepare, describe, draw)
    return run_config.out


@alone_in_its_folder
def train_clip(config: TrainCLIPConfig, world: World) -> Path:
    """Trains CLIP and returns its folder, which holds its tokenizer too.

    Raises:
        UserError: for faults in the data, the folder or the checkpoint; if a batch has no room in as many concepts.
        Interrupted: when asked to stop; the state is saved.
    """
    run_config, model_config = config.run, config.model
    device = world.device
    if run_config.accumulate > 1:
        raise UserError(f"accumulate: got {run_config.accumulate}, wanted 1: CLIP compares all pictures of a batch")
    data, side = config.data, model_config.resolution
    pictures = world.main_first(lambda: load_pictures(data.source, side, run_config.cache, data.caption_field))
    training, held_out = split_pictures(pictures.captioned(), data, "captioned pictures")
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
    if not run_config.resume:
        said = (text for texts in captions for text in texts)
        world.first(lambda: CaptionTokenizer.train(said, model_config.vocab_text - 1).save(kept_tokenizer))
    tokenizer = CaptionTokenizer.load(kept_tokenizer)
    torch.manual_seed(run_config.seed)
    model = CLIP(model_config).to(device)

    def prepare(step: int, parts: list[range]) -> list[tuple[Any, ...]]:
        shown = distinct_indices(step, run_config.batch, len(concepts), run_config.seed)
        images, tokens = [], []
        for place in parts[0]:
            chance = sample_generator(run_config.seed, step, place)
            picture = concepts[shown[place]][chance.integers(len(concepts[shown[place]]))]
            texts, first = captions[picture], 0
            if len(texts) > config.captions:
                first = int(chance.integers(len(texts)))
            said = [texts[(first + number) % len(texts)] for number in range(config.captions)]
            tokens.append(caption_tokens(said, tokenizer, model_config, config.bpe_dropout, chance))
            images.append(shifted(training.images[picture], config.shift, chance))
        return [(torch.stack(images).to(device).float() / 255.0, torch.stack(tokens, dim=1).to(device))]

    def objective(model: CLIP, pictures: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, CLIPLoss]:
        loss = model.loss(pictures, tokens, world)
        return loss.total, loss

    def describe(step: int, losses: list[CLIPLoss]) -> dict[str, float]:
        return means(world, losses, "right") | {"scale": float(model.scale.detach())}

    def draw(mean: CLIP, step: int, board: Any) -> None:
        shown = held_out if len(held_out) else training
        for language, share in name_pictures(mean, tokenizer, shown).items():
            board.add_scalar(f"names_right/{language}", share, step)

    run = Run(run_config, "clip", model, objective, to_json(config), world)
    run.train(prepare, describe, draw)
    return run_config.out


def shifted(image: torch.Tensor, shift: int, chance: np.random.Generator) -> torch.Tensor:
    """A picture [3, S, S] moved by up to `shift` pixels either way, down and sideways, its edge repeated."""
    if not shift:
        return image
    last = image.shape[-1] - 1
    rows, columns = ((torch.arange(last + 1) + int(chance.integers(-shift, shift + 1))).clamp(0, last) for _ in "yx")
    return image[:, rows[:, None], columns]


def _training_tokens(config: TrainTransformerConfig, dvae: DiscreteVAE, world: World) -> TokenSet | TokenShards:
    """The pictures' tokens that stage 2 trains on. Those of pictures that do not fit memory are kept with the run."""
    source, resolution = Path(config.data.source), dvae.config.resolution

    def in_memory() -> bool:
        if not is_tokens(source) and not find_shards(config.data.source):
            return True
        if config.panels:
            raise UserError(f"panels: got {config.panels} with shards, wanted pictures that fit memory")
        return False

    if world.first(in_memory):
        training = world.main_first(lambda: captioned_training(config.data, resolution, config.run.cache))
        if config.panels:
            training, _ = pairs(training)
        return TokenSet(tokenize_pictures(dvae, training.images, world), training)
    if not is_tokens(source):
        pictures = world.main_first(lambda: open_pictures(config.data, resolution, config.run.cache))
        source = config.run.out / "tokens"
        tokenize(dvae, pictures, source, world)
    with world.together():
        shards = TokenShards.open(source, dvae)
    return split_pictures(shards, config.data, "captioned pictures")[0]


def captioned_training(data: DataConfig, resolution: int, cache: Path | None) -> PictureSet:
    """The captioned pictures that stage 2, or a decoder, trains on."""
    pictures = load_pictures(data.source, resolution, cache, data.caption_field)
    return split_pictures(pictures.captioned(), data, "captioned pictures")[0]


def hide_cells(tokens: torch.Tensor, most: float, chance: np.random.Generator) -> torch.Tensor:
    """Tokens of pictures, int64 [B, L], with `NO_TOKEN` in place of a share of each one's, drawn from 0 to `most`."""
    share = most * chance.random((len(tokens), 1))
    return tokens.masked_fill(torch.from_numpy(chance.random(tokens.shape) < share), NO_TOKEN)


def keep_checkpoint(source: Path, target: Path, kind: str) -> None:
    """A copy of another model's checkpoint beside the one that needs it, so that the pair cannot come apart."""
    if target.exists() and {entry.name for entry in target.iterdir()} - {"checkpoints", "tokenizer.json"}:
        raise UserError(f"{target}: is in the way, the {kind}'s copy goes there; choose another --out")
    newest = checkpoint.load(source, kind)
    tensors = {f"ema.{name}": value for name, value in newest.group("ema").items()}
    if target.exists():
        shutil.rmtree(target)
    checkpoint.save(target, kind, newest.step, newest.config, tensors)


def means(world: World, outputs: list[Any], *names: str) -> dict[str, float]:
    """The means of 0-dim tensors, over the parts and the processes."""
    own = torch.stack([torch.stack([getattr(output, name).detach() for output in outputs]).mean() for name in names])
    return dict(zip(names, world.mean(own).tolist(), strict=True))
