"""Models read back, from the folders that runs leave or from files of converted weights."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from dalle_reference import checkpoint
from dalle_reference.clip import CLIP, CLIPConfig
from dalle_reference.dvae import DiscreteVAE, DVAEConfig
from dalle_reference.errors import UserError
from dalle_reference.pixels import PixelConfig, PixelTransformer
from dalle_reference.prior import Prior, PriorConfig, make_prior
from dalle_reference.tokenizer import CaptionTokenizer
from dalle_reference.transformer import DalleTransformer, TransformerConfig
from dalle_reference.unclip import PixelDecoder, PixelDecoderConfig, TokenDecoder


def load_dvae(run: Path, device: torch.device) -> DiscreteVAE:
    """The dVAE of a finished (or running) stage 1, with the running mean of its weights, or one of converted weights.

    Raises:
        UserError: for a missing or damaged checkpoint, or one of another configuration.
    """
    return _load(run, "dvae", DiscreteVAE, DVAEConfig, device)


def load_transformer(run: Path, device: torch.device) -> tuple[DalleTransformer, CaptionTokenizer, DiscreteVAE]:
    """All that draws pictures: the transformer with the running mean of its weights, its tokenizer, its dVAE.

    Raises:
        UserError: for missing or damaged files, or ones of another configuration.
    """
    if run.is_file():
        raise UserError(f"{run}: a file of weights; wanted the folder of a stage 2, which has tokenizer and dVAE too")
    model = load_transformer_alone(run, device)
    dvae = load_dvae(run / "dvae", device)
    require_grid(model.config, dvae.config, run / "dvae", panels=model.config.grid[0] // dvae.config.grid[0] or 1)
    return model, _tokenizer(run, model.config.vocab_text), dvae


def load_transformer_alone(run: Path, device: torch.device) -> DalleTransformer:
    """The transformer of a stage 2, or one of converted weights, without what turns captions and pictures into tokens.

    Raises:
        UserError: as `load_transformer`.
    """
    return _load(run, "transformer", DalleTransformer, TransformerConfig, device)


def load_clip(run: Path, device: torch.device) -> tuple[CLIP, CaptionTokenizer]:
    """A CLIP that was trained here, and its tokenizer.

    Raises:
        UserError: as `load_transformer`.
    """
    if run.is_file():
        raise UserError(f"{run}: a file of weights; wanted the folder of a train-clip, which has a tokenizer too")
    model = load_clip_alone(run, device)
    return model, _tokenizer(run, model.config.vocab_text - 1)


def load_clip_alone(run: Path, device: torch.device) -> CLIP:
    """A CLIP, or one of converted weights, without its tokenizer.

    Raises:
        UserError: as `load_transformer`.
    """
    return _load(run, "clip", CLIP, CLIPConfig, device)


def load_pixels(run: Path, device: torch.device) -> PixelTransformer:
    """A transformer of pixels, with its palette.

    Raises:
        UserError: as `load_transformer`.
    """
    return _load(run, "pixels", PixelTransformer, PixelConfig, device)


def load_prior(run: Path, device: torch.device) -> tuple[Prior, CLIP, CaptionTokenizer]:
    """A prior, with the CLIP whose vectors it draws.

    Raises:
        UserError: as `load_transformer`.
    """
    prior = _load(run, "prior", make_prior, PriorConfig, device)
    clip, tokenizer = load_clip(run / "clip", device)
    return prior, clip, tokenizer


def load_decoder(run: Path, device: torch.device, temperature: float = 0.4) -> tuple[TokenDecoder | PixelDecoder, CLIP]:
    """A decoder, with the CLIP whose vectors it takes; `temperature` is that of tokens.

    Raises:
        UserError: as `load_transformer`.
    """
    clip, _ = load_clip(run / "clip", device)
    if not (run / "dvae").exists():
        return _load(run, "decoder", PixelDecoder, PixelDecoderConfig, device), clip
    transformer, dvae = (
        _load(run, "decoder", DalleTransformer, TransformerConfig, device),
        load_dvae(run / "dvae", device),
    )
    require_grid(transformer.config, dvae.config, run / "dvae")
    return TokenDecoder(transformer, dvae, temperature), clip


def require_same_clip(first: CLIP, second: CLIP, where: Path) -> None:
    """Raises UserError unless the CLIP that was found at `where` gives the vectors that another one does."""
    ours, theirs = first.state_dict(), second.state_dict()
    if first.config != second.config or not all(torch.equal(ours[name], theirs[name]) for name in ours):
        raise UserError(f"{where}: was trained with another CLIP than the prior")


def require_grid(model: TransformerConfig, dvae: DVAEConfig, where: Path, panels: int = 1) -> None:
    """Raises UserError unless a transformer's picture tokens are those of the dVAE that was found at `where`.

    They are those of so many pictures, one above the other.
    """
    rows, columns = panels * dvae.grid[0], dvae.grid[1]
    if ((rows, columns), dvae.vocab) != (model.grid, model.vocab_image):
        raise UserError(
            f"{where}: its pictures are --grid {rows} {columns} of --vocab-image {dvae.vocab},"
            f" the transformer's {model.grid[0]} {model.grid[1]} of {model.vocab_image}"
        )


def _tokenizer(run: Path, most: int) -> CaptionTokenizer:
    path = run / "tokenizer.json"
    tokenizer = CaptionTokenizer.load(path)
    if tokenizer.vocab_size > most:
        raise UserError(f"{path}: has {tokenizer.vocab_size} tokens, its model takes {most}")
    return tokenizer


def _load(run: Path, kind: str, model_of: Any, config_of: type, device: torch.device) -> Any:
    saved = checkpoint.load(run, kind)
    with torch.device("meta"):  # initial weights, drawn only to be replaced, take a minute for a billion
        model = model_of(_config(config_of, saved))
    model.to_empty(device=device)
    saved.read({f"ema.{name}": value for name, value in model.state_dict().items()})
    return model.eval()


def _config(config_of: type, saved: checkpoint.Checkpoint) -> Any:
    stored = saved.config.get("model")
    names = {entry.name for entry in fields(config_of)}
    if not isinstance(stored, dict) or stored.keys() != names:
        raise UserError(f"{saved.path}: made with another configuration: its model is {stored}, wanted {sorted(names)}")
    try:
        return config_of(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"{saved.path}: made with another configuration: {error}") from error
