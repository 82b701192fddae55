"""The relatives of DALL-E: a transformer of pixels, and unCLIP's priors and decoders."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalle_reference.clip import caption_tokens
from dalle_reference.config import (
    TrainDecoderConfig,
    TrainPixelDecoderConfig,
    TrainPixelsConfig,
    TrainPriorConfig,
    to_json,
)
from dalle_reference.data import PictureSet, load_pictures, split_pictures
from dalle_reference.errors import UserError
from dalle_reference.evaluate import likelihood, pixel_loss, prior_cosines
from dalle_reference.judge import caption_vectors, picture_vectors
from dalle_reference.load import load_clip, load_dvae, require_grid
from dalle_reference.loop import Run, alone_in_its_folder, batch_indices, sample_generator
from dalle_reference.parallel import World
from dalle_reference.pixels import PixelTransformer, fit_palette
from dalle_reference.prior import Prior, make_prior
from dalle_reference.sheets import completion_sheet, variation_sheet
from dalle_reference.train import captioned_training, hide_cells, keep_checkpoint, tokenize_pictures
from dalle_reference.transformer import NO_TOKEN, DalleTransformer
from dalle_reference.unclip import PixelDecoder, TokenDecoder

_SHOWN, _WAYS = 6, 4
"""Pictures that are completed, or varied, as a run goes on, and how often each."""


@alone_in_its_folder
def train_pixels(config: TrainPixelsConfig, world: World) -> Path:
    """Trains a transformer of pixels and returns its folder.

    Raises:
        UserError: for faults in the data, the folder or the checkpoint.
        Interrupted: when asked to stop; the state is saved.
    """
    run_config = config.run
    device = world.device
    pictures = world.main_first(lambda: load_pictures(config.data.source, config.model.resolution, run_config.cache))
    training, held_out = split_pictures(pictures, config.data)
    images = training.images
    shown = (held_out if len(held_out) else training).one_per_concept()
    torch.manual_seed(run_config.seed)
    model = PixelTransformer(config.model)
    if config.model.colours:
        model.palette.copy_(fit_palette(images, config.model.colours, run_config.seed))

    def prepare(step: int, parts: list[range]) -> list[tuple[Any, ...]]:
        chosen = torch.from_numpy(batch_indices(step, run_config.batch, len(images), run_config.seed))

        def part_of(part: range) -> tuple[torch.Tensor, torch.Tensor | None]:
            hidden = model.hide(sample_generator(run_config.seed, step, place) for place in part)
            return images[chosen[part.start : part.stop]].to(device), None if hidden is None else hidden.to(device)

        return [part_of(part) for part in parts]

    def objective(
        model: PixelTransformer, pictures: torch.Tensor, hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor, None]:
        return model.loss(pictures, hidden), None

    def draw(mean: PixelTransformer, step: int, board: Any) -> None:
        nats = pixel_loss(mean, shown)
        board.add_scalar("held_out_nats", nats, step)
        if config.model.objective == "bert":
            return
        which = torch.linspace(0, len(shown) - 1, min(_SHOWN, len(shown))).long()
        completion_sheet(
            run_config.out / "pictures" / f"completions-{step:08d}.png",
            mean,
            shown.images[which].to(device),
            config.model.resolution // 2,
            number=_WAYS,
            seed=run_config.seed,
            heading=f"step {step}: {likelihood(config.model, nats)}",
            footer=pictures.credit,
        )

    run = Run(run_config, "pixels", model.to(device), objective, to_json(config), world)
    run.train(prepare, lambda step, outputs: {}, draw)
    return run_config.out


@alone_in_its_folder
def train_prior(config: TrainPriorConfig, world: World) -> Path:
    """Trains a prior and returns its folder, which holds its CLIP too.

    Raises:
        UserError: for faults in the data, the folders or the checkpoints.
        Interrupted: when asked to stop; the state is saved.
    """
    run_config, kept = config.run, config.run.out / "clip"
    device = world.device
    source = kept if run_config.resume else config.clip_run
    clip, tokenizer = world.main_first(lambda: load_clip(source, device))
    wanted = (clip.config.embedding, clip.config.vocab_text, clip.config.text_length)
    if (config.model.embedding, config.model.vocab_text, config.model.text_length) != wanted:
        raise UserError(
            f"{source}: this CLIP has --embedding {wanted[0]} --vocab-text {wanted[1]} --text-length {wanted[2]},"
            f" the prior {config.model.embedding}, {config.model.vocab_text} and {config.model.text_length}"
        )
    data, side = config.data, clip.config.resolution
    pictures = world.main_first(lambda: load_pictures(data.source, side, run_config.cache, data.caption_field))
    training, held_out = split_pictures(pictures.captioned(), data, "captioned pictures")
    captions = [list(record.captions.values()) for record in training.records]
    first = np.cumsum([0, *map(len, captions[:-1])])
    said = caption_vectors(clip, tokenizer, [text for texts in captions for text in texts])
    shown = picture_vectors(clip, training.images)
    if not run_config.resume:
        world.first(lambda: keep_clip(config.clip_run, kept))
    torch.manual_seed(run_config.seed)
    model = make_prior(config.model).to(device)
    model.fit(said, shown.repeat_interleave(torch.tensor([len(texts) for texts in captions], device=device), 0))

    def prepare(step: int, parts: list[range]) -> list[tuple[Any, ...]]:
        chosen = batch_indices(step, run_config.batch, len(training), run_config.seed)

        def sample(place: int) -> tuple[torch.Tensor, ...]:
            chance = sample_generator(run_config.seed, step, place)
            picture = int(chosen[place])
            which = int(chance.integers(len(captions[picture])))
            tokens = caption_tokens([captions[picture][which]], tokenizer, clip.config, config.bpe_dropout, chance)
            vector = said[first[picture] + which]
            if chance.random() < config.caption_dropout:
                tokens.fill_(NO_TOKEN)
                vector = torch.zeros_like(vector)
            return tokens[0].to(device), vector, shown[picture], *_noise(chance, (clip.config.embedding,), device)

        return [_stacked(map(sample, part)) for part in parts]

    def objective(model: Prior, *arguments: torch.Tensor) -> tuple[torch.Tensor, None]:
        return model.loss(*arguments), None

    def draw(model: Prior, step: int, board: Any) -> None:
        judged = held_out if len(held_out) else training
        figures = prior_cosines(model, clip, tokenizer, judged, shown.mean(dim=0), run_config.seed)
        for name, value in figures.items():
            board.add_scalar(f"cosine/{name}", value, step)

    run: Run[Any] = Run(run_config, "prior", model, objective, to_json(config), world)
    run.train(prepare, lambda step, outputs: {}, draw)
    return run_config.out


def _stacked(samples: Iterable[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """The samples of a part of a batch, argument by argument."""
    return tuple(torch.stack(rows) for rows in zip(*samples, strict=True))


def _noise(
    chance: np.random.Generator, shape: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a diffusion's loss draws for one sample: the time, and noise of `shape`."""
    t = torch.tensor(chance.random(), dtype=torch.float32)
    return t.to(device), torch.from_numpy(chance.standard_normal(shape, dtype=np.float32)).to(device)


@alone_in_its_folder
def train_decoder(config: TrainDecoderConfig | TrainPixelDecoderConfig, world: World) -> Path:
    """Trains a decoder, into tokens or into pixels, and returns its folder, which holds its CLIP (and its dVAE) too.

    Raises:
        UserError: for faults in the data, the folders or the checkpoints.
        Interrupted: when asked to stop; the state is saved.
    """
    if isinstance(config, TrainDecoderConfig):
        return _train_token_decoder(config, world)
    run_config, model_config, device = config.run, config.model, world.device
    training, shown = _vectors_to_decode(config, model_config.resolution, model_config.embedding, world)
    torch.manual_seed(run_config.seed)
    model = PixelDecoder(model_config).to(device)

    def prepare(step: int, parts: list[range]) -> list[tuple[Any, ...]]:
        chosen = batch_indices(step, run_config.batch, len(training), run_config.seed)

        def sample(place: int) -> tuple[torch.Tensor, ...]:
            chance = sample_generator(run_config.seed, step, place)
            picture = int(chosen[place])
            vector = shown[picture] * float(chance.random() >= config.vector_dropout)
            image = training.images[picture].to(device).float() / 255.0
            return vector, image, *_noise(chance, tuple(image.shape), device)

        return [_stacked(map(sample, part)) for part in parts]

    def objective(model: PixelDecoder, *arguments: torch.Tensor) -> tuple[torch.Tensor, None]:
        return model.loss(*arguments), None

    def draw(mean: PixelDecoder, step: int, board: Any) -> None:
        _draw_variations(config, step, mean, training, shown)

    run = Run(run_config, "decoder", model, objective, to_json(config), world)
    run.train(prepare, lambda step, outputs: {}, draw)
    return run_config.out


def _train_token_decoder(config: TrainDecoderConfig, world: World) -> Path:
    run_config, model_config, device = config.run, config.model, world.device
    kept = run_config.out / "dvae"
    source = kept if run_config.resume else config.dvae
    dvae = world.main_first(lambda: load_dvae(source, device))
    require_grid(model_config, dvae.config, source)
    training, shown = _vectors_to_decode(config, dvae.config.resolution, model_config.latent, world)
    tokens = tokenize_pictures(dvae, training.images, world)
    if not run_config.resume:
        world.first(lambda: keep_checkpoint(config.dvae, kept, "dvae"))
    torch.manual_seed(run_config.seed)
    model = DalleTransformer(model_config).to(device)

    def prepare(step: int, parts: list[range]) -> list[tuple[Any, ...]]:
        chosen = batch_indices(step, run_config.batch, len(training), run_config.seed)

        def sample(place: int) -> tuple[torch.Tensor, ...]:
            chance = sample_generator(run_config.seed, step, place)
            picture = int(chosen[place])
            cells = tokens[picture : picture + 1]
            seen = hide_cells(cells, config.cell_dropout, chance)
            vector = shown[picture] * float(chance.random() >= config.vector_dropout)
            return cells[0].to(device), seen[0].to(device), vector

        return [_stacked(map(sample, part)) for part in parts]

    def objective(
        model: DalleTransformer, cells: torch.Tensor, seen: torch.Tensor, vectors: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        return model.loss(cells.new_empty(len(cells), 0), cells, seen=seen, latents=vectors).total, None

    def draw(mean: DalleTransformer, step: int, board: Any) -> None:
        decoder = TokenDecoder(mean, dvae, temperature=0.4)
        _draw_variations(config, step, decoder, training, shown)

    run = Run(run_config, "decoder", model, objective, to_json(config), world)
    run.train(prepare, lambda step, outputs: {}, draw)
    return run_config.out


def _vectors_to_decode(
    config: TrainDecoderConfig | TrainPixelDecoderConfig, resolution: int, embedding: int, world: World
) -> tuple[PictureSet, torch.Tensor]:
    """The pictures to train on, and the vectors of a CLIP of which the folder keeps a copy."""
    kept = config.run.out / "clip"
    source = kept if config.run.resume else config.clip_run
    clip, _ = world.main_first(lambda: load_clip(source, world.device))
    if embedding != clip.config.embedding:
        option = "--latent" if isinstance(config, TrainDecoderConfig) else "--embedding"
        raise UserError(f"{source}: its vectors are {option} {clip.config.embedding}, the decoder's {embedding}")
    data, cache = config.data, config.run.cache
    training = world.main_first(lambda: captioned_training(data, resolution, cache))
    seen = world.main_first(lambda: captioned_training(data, clip.config.resolution, cache))
    if not config.run.resume:
        world.first(lambda: keep_clip(config.clip_run, kept))
    return training, picture_vectors(clip, seen.images)


def _draw_variations(
    config: TrainDecoderConfig | TrainPixelDecoderConfig,
    step: int,
    decoder: TokenDecoder | PixelDecoder,
    training: PictureSet,
    vectors: torch.Tensor,
) -> None:
    which = torch.linspace(0, len(training) - 1, min(_SHOWN, len(training))).long()
    variation_sheet(
        config.run.out / "pictures" / f"variations-{step:08d}.png",
        decoder,
        training.images[which],
        vectors[which.to(vectors.device)],
        number=_WAYS,
        seed=config.run.seed,
        heading=f"step {step}: pictures of training, and what is drawn of their vectors",
        footer=training.credit,
    )


def keep_clip(source: Path, target: Path) -> None:
    """A copy of a CLIP and its tokenizer beside the model that needs them."""
    keep_checkpoint(source, target, "clip")
    shutil.copyfile(source / "tokenizer.json", target / "tokenizer.json")
