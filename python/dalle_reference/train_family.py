"""The relatives of DALL-E: a transformer of pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dalle_reference import render
from dalle_reference.config import TrainPixelsConfig, to_json
from dalle_reference.data import PictureSet, load_pictures
from dalle_reference.loop import Run, alone_in_its_folder, batch_indices
from dalle_reference.parallel import World
from dalle_reference.pixels import PixelTransformer, bits_per_dimension, fit_palette
from dalle_reference.train import require_pictures

_SHOWN, _WAYS = 6, 4
"""Pictures that are completed as a run goes on, and how often each."""


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
    training, held_out = pictures.split(config.data.held_out)
    require_pictures(training, config.data.source)
    images = training.images
    shown = (held_out if len(held_out) else training).one_per_concept()
    torch.manual_seed(run_config.seed)
    model = PixelTransformer(config.model)
    if config.model.colours:
        model.palette.copy_(fit_palette(images, config.model.colours, run_config.seed))

    def prepare(step: int, parts: list[range]) -> list[tuple[Any, ...]]:
        chosen = torch.from_numpy(batch_indices(step, run_config.batch, len(images), run_config.seed))
        return [(images[chosen[part.start : part.stop]].to(device),) for part in parts]

    def objective(model: PixelTransformer, pictures: torch.Tensor) -> tuple[torch.Tensor, None]:
        return model.loss(pictures), None

    def draw(step: int, board: Any) -> None:
        nats = pixel_loss(run.average.module, shown)
        board.add_scalar("held_out_nats", nats, step)
        which = torch.linspace(0, len(shown) - 1, min(_SHOWN, len(shown))).long()
        completion_sheet(
            run_config.out / "pictures" / f"completions-{step:08d}.png",
            run.average.module,
            shown.images[which].to(device),
            config.model.resolution // 2,
            number=_WAYS,
            seed=run_config.seed,
            heading=f"step {step}: {likelihood(config, nats)}",
            footer=pictures.credit,
        )

    run = Run(run_config, "pixels", model.to(device), objective, to_json(config), world)
    run.train(prepare, lambda step, outputs: {}, draw)
    return run_config.out


@torch.no_grad()
def pixel_loss(model: PixelTransformer, pictures: PictureSet, batch: int = 16) -> float:
    """Nats a token of pictures; one picture a concept, or copies would be counted that differ in a tone."""
    device = model.palette.device
    parts = pictures.one_per_concept().images.split(batch)
    total = sum(float(model.loss(part.to(device))) * len(part) for part in parts)
    return total / sum(map(len, parts))


def likelihood(config: TrainPixelsConfig, nats: float) -> str:
    """A loss as its literature states it."""
    return f"{nats:.3f} nats a pixel" if config.model.colours else f"{bits_per_dimension(nats):.3f} bits a dimension"


def completion_sheet(
    path: Path,
    model: PixelTransformer,
    pictures: torch.Tensor,
    rows: int,
    *,
    number: int,
    seed: int,
    temperature: float = 1.0,
    heading: str = "",
    footer: str = "",
) -> None:
    """Writes a sheet: in each row the top `rows` of a picture, `number` completions, and the whole picture.

    Args:
        pictures: uint8 [B, 3, S, S].
    """
    given = pictures.clone()
    given[:, :, rows:] = 128
    drawn = model.complete(pictures, rows, seed=seed, number=number, temperature=temperature)
    shown = torch.cat([given[:, None] / 255.0, drawn, pictures[:, None] / 255.0], dim=1)
    captions = ["given", *[""] * number, "the picture"] * len(pictures)
    render.sheet(path, shown.flatten(0, 1), captions, columns=number + 2, heading=heading, footer=footer)
