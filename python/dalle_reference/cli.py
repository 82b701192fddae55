"""The command line: dalle-reference, with a sub-command for each thing that it does."""

from __future__ import annotations

import itertools
import math
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import torch
import tyro
from tqdm import tqdm

from dalle_reference import checkpoint, demo, family, plan, render, sheets, train, train_family, weights
from dalle_reference.clip import caption_tokens
from dalle_reference.config import (
    CLIP_PRESETS,
    DECODER_PRESETS,
    DVAE_PRESETS,
    PIXELS_PRESETS,
    PRIOR_PRESETS,
    TRANSFORMER_PRESETS,
    TokenizeConfig,
)
from dalle_reference.convert import KINDS, convert
from dalle_reference.data import MOST_PICTURE_BYTES, decode_picture, open_pictures
from dalle_reference.errors import UserError, require, require_amount, require_positive, require_seed
from dalle_reference.evaluate import psnr
from dalle_reference.files import read_bounded, require_output
from dalle_reference.generate import generate
from dalle_reference.judge import agreement, caption_vectors, name_shares, picture_vectors
from dalle_reference.load import (
    load_clip,
    load_decoder,
    load_dvae,
    load_pixels,
    load_prior,
    load_transformer,
    require_same_clip,
)
from dalle_reference.loop import Interrupted, step_generator
from dalle_reference.parallel import Elsewhere, joined, resolve_device
from dalle_reference.picture_tokens import tokenize
from dalle_reference.tokenizer import CaptionTokenizer
from dalle_reference.unclip import between
from dalle_reference.views import Judge, Painter

_AT_ONCE, _DECODED_AT_ONCE = 256, 16
"""Pictures that are drawn, or judged, at a time; and those that the dVAE decodes, which takes more memory for each."""


def _presets(entries: dict[str, tuple[str, Any]]) -> Any:
    return tyro.extras.subcommand_type_from_defaults(
        {name: config for name, (_, config) in entries.items()},
        {name: description for name, (description, _) in entries.items()},
    )


_DVAEChoice: Any = _presets(DVAE_PRESETS)
_TransformerChoice: Any = _presets(TRANSFORMER_PRESETS)
_CLIPChoice: Any = _presets(CLIP_PRESETS)
_PixelsChoice: Any = _presets(PIXELS_PRESETS)
_PriorChoice: Any = _presets(PRIOR_PRESETS)
_DecoderChoice: Any = _presets(DECODER_PRESETS)
_Kind: Any = Literal[KINDS]


def _train_dvae(config: _DVAEChoice) -> None:
    """Stage 1: learn to turn pictures into tokens and back."""
    _say(f"dVAE in {train.train_dvae(config)}")


def _tokenize(config: Annotated[TokenizeConfig, tyro.conf.arg(name="")]) -> None:
    """Between the stages: turn pictures into tokens once, into a folder that train-transformer takes as its source."""
    with joined(config.device) as world:
        dvae = world.main_first(lambda: load_dvae(config.dvae, world.device))
        pictures = world.main_first(lambda: open_pictures(config.data, dvae.config.resolution, config.cache))
        tokenize(dvae, pictures, config.out, world)
    _say(f"tokens in {config.out}")


def _train_transformer(config: _TransformerChoice) -> None:
    """Stage 2: learn the stream of captions and picture tokens."""
    _say(f"transformer in {train.train_transformer(config)}")


def _train_clip(config: _CLIPChoice) -> None:
    """The judge: learn which caption belongs to which picture."""
    _say(f"CLIP in {train.train_clip(config)}")


def _train_pixels(config: _PixelsChoice) -> None:
    """Pixels as tokens: Sparse Transformer and Image GPT."""
    _say(f"pixels in {train_family.train_pixels(config)}")


def _train_prior(config: _PriorChoice) -> None:
    """unCLIP's prior: from captions to CLIP's vectors of pictures."""
    _say(f"prior in {train_family.train_prior(config)}")


def _train_decoder(config: _DecoderChoice) -> None:
    """unCLIP's decoder: from CLIP's vectors to pictures."""
    _say(f"decoder in {train_family.train_decoder(config)}")


@dataclass(frozen=True)
class GenerateConfig:
    """Draw pictures for captions, or complete one whose top is given."""

    captions: tyro.conf.Positional[tuple[str, ...]]
    """What to draw; in any language the model was trained on."""
    model: Path = Path("runs/transformer")
    """Folder of a stage 2; with --prior that of a train-decoder."""
    prior: Path | None = None
    """Folder of a train-prior: captions become CLIP's vectors, and those the pictures (unCLIP)."""
    out: Path = Path("samples.png")
    """The sheet to write."""
    number: int = 4
    """Pictures for each caption."""
    clip: Path | None = None
    """Folder of a train-clip: its judgement picks `best` of `candidates` pictures for each caption, best first."""
    candidates: int | None = None
    """Pictures that are drawn for the judge to choose from; 32 where not given."""
    best: int | None = None
    """Pictures that are kept of them; 4 where not given."""
    seed: int = 0
    """The same seed gives the same pictures."""
    temperature: float = 0.4
    """Below 1 likelier tokens, 0 the likeliest."""
    top_k: int | None = None
    """Draw among this many of the likeliest tokens."""
    top_p: float | None = None
    """Draw among the likeliest tokens that have this probability together."""
    guidance_scale: float = 1.5
    """Classifier-free guidance; 1 is none."""
    order: Literal["raster", "diagonal"] = "raster"
    """raster: one cell of a picture a step. diagonal: several rows side by side, in fewer steps, each cell without
    those to its right in the rows above that come later."""
    window: int | None = None
    """With --order diagonal: how many cells the row above is ahead; half a row where not given."""
    cache_dtype: Literal["auto", "int8"] = "auto"
    """Of keys and values between steps: auto, that of the model; int8, eight bits."""
    complete: Path | None = None
    """A picture whose top rows are kept."""
    rows: int | None = None
    """Rows of tokens to keep of it; half of them where not given."""
    device: str = "auto"
    """cpu, cuda, or auto."""

    def __post_init__(self) -> None:
        require_positive(self, "number", "top_k", "candidates", "best")
        for name in ("complete", "top_k", "top_p"):
            if self.prior is not None and getattr(self, name) is not None:
                raise ValueError(f"{name}: got {getattr(self, name)} with --prior, whose vectors say nothing of it")
        for name in ("candidates", "best"):
            if getattr(self, name) is not None and self.clip is None:
                raise ValueError(f"{name}: got {getattr(self, name)} without --clip, which says who chooses")
        if self.clip is not None and self.kept > self.drawn:
            raise ValueError(f"best: got {self.kept}, wanted at most the {self.drawn} candidates")
        require_seed(self)
        require_amount(self, "temperature")
        require(self, "above 0 and at most 1", lambda value: 0 < value <= 1, "top_p")
        require(self, "a finite number", math.isfinite, "guidance_scale")
        require_positive(self, "window")
        for name, plain in (("order", "raster"), ("cache_dtype", "auto")):
            if self.prior is not None and getattr(self, name) != plain:
                raise ValueError(
                    f"{name}: got {getattr(self, name)} with --prior, whose pictures are not drawn by cells"
                )
        if self.window is not None and self.order == "raster":
            raise ValueError(f"window: got {self.window} without --order diagonal, which it belongs to")
        if self.rows is not None and self.complete is None:
            raise ValueError(f"rows: got {self.rows} without --complete, which says of what picture")

    @property
    def drawn(self) -> int:
        """Pictures that are drawn for each caption."""
        return self.number if self.clip is None else self.candidates or 32

    @property
    def kept(self) -> int:
        """Pictures that are shown of them."""
        return self.number if self.clip is None else self.best or min(4, self.drawn)


def _generate(config: Annotated[GenerateConfig, tyro.conf.arg(name="")]) -> None:
    """Draw pictures for captions, or complete one whose top is given."""
    if not config.captions:
        raise UserError("captions: got none, wanted at least one")
    require_output(config.out, ".png")
    device = resolve_device(config.device)
    judge = None if config.clip is None else load_clip(config.clip, device)
    if judge is not None:
        for caption in config.captions:
            _check_caption(caption, judge[1], judge[0].config.text_length - 1, "the judge")
    drawn = _draw(config, device) if config.prior is None else _draw_of_vectors(config, config.prior, device)
    if judge is not None:
        candidates = zip(drawn, config.captions, strict=True)
        best = (part[agreement(*judge, part, caption).topk(config.kept).indices] for part, caption in candidates)
        drawn = torch.stack(list(best))
    captions = [caption for caption in config.captions for _ in range(config.kept)]
    columns = config.kept if config.kept > 1 else min(8, len(captions))
    render.sheet(config.out, drawn.flatten(0, 1), captions, columns=columns)
    print(f"wrote {config.out}")


def _draw(config: GenerateConfig, device: torch.device) -> torch.Tensor:
    """Pictures of each caption by DALL-E: [captions, drawn, 3, S, S] in 0..1."""
    model, tokenizer, dvae = load_transformer(config.model, device)
    for caption in config.captions:
        _check_caption(caption, tokenizer, model.config.caption_length)
    if config.window is not None and config.window > model.config.grid[1]:
        raise UserError(f"window: got {config.window}, wanted at most {model.config.grid[1]}, the columns of a picture")
    text = tokenizer.encode(config.captions, model.config.caption_length).to(device)
    prefix = None
    if config.complete is not None:
        rows, columns = dvae.config.grid
        keep = model.config.grid[0] // 2 if config.rows is None else config.rows  # of two panels the upper one
        if not 0 <= keep <= rows:
            raise UserError(f"rows: got {keep}, wanted 0 to {rows}, the rows of tokens in a picture")
        picture = _read_picture(config.complete, dvae.config.resolution).to(device)
        prefix = dvae.encode(picture[None].float() / 255.0).flatten(1)[:, : keep * columns].expand(len(text), -1)
    parts = []
    together = max(1, _AT_ONCE // len(text))
    for start in range(0, config.drawn, together):
        tokens = generate(
            model,
            text,
            seed=int(step_generator(config.seed, start).integers(2**63)) if start else config.seed,
            number=min(together, config.drawn - start),
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            guidance_scale=config.guidance_scale,
            image_prefix=prefix,
            order=config.order,
            window=config.window,
            cache_dtype=torch.int8 if config.cache_dtype == "int8" else None,
        )
        pictures = [dvae.decode(some) for some in tokens.unflatten(1, model.config.grid).split(_DECODED_AT_ONCE)]
        parts.append(torch.cat(pictures).unflatten(0, (len(text), -1)))
    return torch.cat(parts, dim=1)


def _draw_of_vectors(config: GenerateConfig, prior_run: Path, device: torch.device) -> torch.Tensor:
    """Pictures of each caption by unCLIP, each of a vector of its own: [captions, drawn, 3, S, S] in 0..1."""
    prior, clip, tokenizer = load_prior(prior_run, device)
    decoder, its_clip = load_decoder(config.model, device, config.temperature)
    require_same_clip(clip, its_clip, config.model)
    for caption in config.captions:
        _check_caption(caption, tokenizer, clip.config.text_length - 1)
    texts = [caption for caption in config.captions for _ in range(config.drawn)]
    parts = []
    for start in range(0, len(texts), _AT_ONCE):
        some = texts[start : start + _AT_ONCE]
        tokens = caption_tokens(some, tokenizer, clip.config).to(device)
        seeds = step_generator(config.seed, start).integers(2**63, size=2).tolist()
        vectors = prior.draw(tokens, caption_vectors(clip, tokenizer, some), seed=seeds[0])
        parts.append(decoder.draw(vectors, seed=seeds[1], guidance_scale=config.guidance_scale))
    return torch.cat(parts).unflatten(0, (len(config.captions), config.drawn))


def _check_caption(caption: str, tokenizer: CaptionTokenizer, length: int, reader: str = "the model") -> None:
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"captions: got {caption!a}, wanted text in UTF-8") from error
    if tokenizer.is_cut(caption, length):
        (read,) = tokenizer.decode(tokenizer.encode([caption], length))
        print(f"caption cut: of {caption[:60]!r} {reader} reads {length} tokens, {read!r}", file=sys.stderr)


@dataclass(frozen=True)
class ClassifyConfig:
    """Name what pictures show, among names of your own."""

    pictures: tyro.conf.Positional[tuple[Path, ...]]
    """Picture files."""
    names: tuple[str, ...]
    """What they may show; in any language the model was trained on."""
    templates: tuple[str, ...] = ("{}",)
    """Captions with {} in the place of a name; the mean of what they say is compared."""
    model: Path = Path("runs/clip")
    """Folder of a train-clip."""
    device: str = "auto"
    """cpu, cuda, or auto."""

    def __post_init__(self) -> None:
        require(self, "texts with {} in them", lambda texts: texts and all("{}" in text for text in texts), "templates")


def _classify(config: Annotated[ClassifyConfig, tyro.conf.arg(name="")]) -> None:
    """Name what pictures show, among names of your own, which the model need not have been trained on."""
    if not config.pictures or not config.names:
        raise UserError("pictures and --names: got none, wanted at least one of each")
    device = resolve_device(config.device)
    clip, tokenizer = load_clip(config.model, device)
    for name in config.names:
        _check_caption(name, tokenizer, clip.config.text_length - 1)
    pictures = _read_pictures(config.pictures, clip.config.resolution)
    found = name_shares(clip, tokenizer, pictures, config.names, config.templates)
    for path, shares in zip(config.pictures, found, strict=True):
        best = shares.topk(min(5, len(config.names)))
        guesses = (f"{config.names[i]} {share:.1%}" for share, i in zip(*map(torch.Tensor.tolist, best), strict=True))
        print(f"{path}: {', '.join(guesses)}")


@dataclass(frozen=True)
class ReconstructConfig:
    """Show what a dVAE keeps of pictures."""

    pictures: tyro.conf.Positional[tuple[Path, ...]]
    """Picture files."""
    model: Path = Path("runs/dvae")
    """Folder of a stage 1, or a file of converted weights."""
    out: Path = Path("reconstructions.png")
    """The sheet to write: originals above, reconstructions below."""
    device: str = "auto"
    """cpu, cuda, or auto."""


def _reconstruct(config: Annotated[ReconstructConfig, tyro.conf.arg(name="")]) -> None:
    """Show what a dVAE keeps of pictures."""
    _require_pictures(config.pictures)
    require_output(config.out, ".png")
    device = resolve_device(config.device)
    dvae = load_dvae(config.model, device)
    originals = _read_pictures(config.pictures, dvae.config.resolution)
    originals = originals.to(device).float() / 255.0
    decoded = dvae.decode(dvae.encode(originals))
    render.pairs(config.out, originals, decoded, heading="above: the pictures; below: what their tokens keep")
    print(f"wrote {config.out}; PSNR {psnr(originals, decoded):.2f} dB")


@dataclass(frozen=True)
class CompleteConfig:
    """Draw what is below the top of pictures, pixel by pixel."""

    pictures: tyro.conf.Positional[tuple[Path, ...]]
    """Picture files."""
    model: Path = Path("runs/pixels")
    """Folder of a train-pixels."""
    out: Path = Path("completions.png")
    """The sheet to write: in each row what was given, what was drawn, and the picture."""
    rows: int | None = None
    """Rows of pixels to keep; half of them where not given."""
    number: int = 4
    """Completions of each picture."""
    seed: int = 0
    """The same seed gives the same completions."""
    temperature: float = 1.0
    """Below 1 likelier tokens, 0 the likeliest."""
    device: str = "auto"
    """cpu, cuda, or auto."""

    def __post_init__(self) -> None:
        require_positive(self, "number")
        require_amount(self, "temperature", "rows")
        require_seed(self)


def _complete(config: Annotated[CompleteConfig, tyro.conf.arg(name="")]) -> None:
    """Draw what is below the top of pictures, pixel by pixel."""
    _require_pictures(config.pictures)
    require_output(config.out, ".png")
    model = load_pixels(config.model, resolve_device(config.device))
    side = model.config.resolution
    rows = side // 2 if config.rows is None else config.rows
    if rows > side:
        raise UserError(f"rows: got {rows}, wanted 0 to {side}, the rows of pixels in a picture")
    pictures = _read_pictures(config.pictures, side).to(model.palette.device)
    sheets.completion_sheet(
        config.out, model, pictures, rows, number=config.number, seed=config.seed, temperature=config.temperature
    )
    print(f"wrote {config.out}")


@dataclass(frozen=True)
class VariationsConfig:
    """Draw other pictures that show what a picture shows."""

    pictures: tyro.conf.Positional[tuple[Path, ...]]
    """Picture files."""
    model: Path = Path("runs/decoder")
    """Folder of a train-decoder."""
    out: Path = Path("variations.png")
    """The sheet to write: in each row a picture, and its variations."""
    number: int = 6
    """Variations of each picture."""
    seed: int = 0
    """The same seed gives the same variations."""
    temperature: float = 0.4
    """Of tokens: below 1 likelier ones, 0 the likeliest."""
    guidance_scale: float = 1.5
    """Classifier-free guidance; 1 is none."""
    device: str = "auto"
    """cpu, cuda, or auto."""

    def __post_init__(self) -> None:
        require_positive(self, "number")
        require_amount(self, "temperature")
        require_seed(self)
        require(self, "a finite number", math.isfinite, "guidance_scale")


def _variations(config: Annotated[VariationsConfig, tyro.conf.arg(name="")]) -> None:
    """Draw other pictures that show what a picture shows: unCLIP's decoder on CLIP's vector of it."""
    _require_pictures(config.pictures)
    require_output(config.out, ".png")
    decoder, clip = load_decoder(config.model, resolve_device(config.device), config.temperature)
    pictures = _read_pictures(config.pictures, clip.config.resolution)
    sheets.variation_sheet(
        config.out,
        decoder,
        pictures,
        picture_vectors(clip, pictures),
        number=config.number,
        seed=config.seed,
        guidance_scale=config.guidance_scale,
    )
    print(f"wrote {config.out}")


@dataclass(frozen=True)
class InterpolateConfig:
    """Draw pictures on the way from one picture to another."""

    first: tyro.conf.Positional[Path]
    """A picture file."""
    second: tyro.conf.Positional[Path]
    """Another one."""
    model: Path = Path("runs/decoder")
    """Folder of a train-decoder."""
    out: Path = Path("interpolation.png")
    """The sheet to write: rows of pictures, each row of the same noise."""
    steps: int = 8
    """Pictures on the way, both ends included."""
    rows: int = 3
    """Ways with other noise."""
    seed: int = 0
    """The same seed gives the same pictures."""
    temperature: float = 0.4
    """Of tokens: below 1 likelier ones, 0 the likeliest."""
    guidance_scale: float = 1.5
    """Classifier-free guidance; 1 is none."""
    device: str = "auto"
    """cpu, cuda, or auto."""

    def __post_init__(self) -> None:
        require_positive(self, "steps", "rows")
        require_amount(self, "temperature")
        require_seed(self)
        require(self, "a finite number", math.isfinite, "guidance_scale")


def _interpolate(config: Annotated[InterpolateConfig, tyro.conf.arg(name="")]) -> None:
    """Draw pictures on the way from one picture to another: unCLIP's decoder on the arc between their vectors."""
    require_output(config.out, ".png")
    decoder, clip = load_decoder(config.model, resolve_device(config.device), config.temperature)
    ends = _read_pictures((config.first, config.second), clip.config.resolution)
    first, second = picture_vectors(clip, ends)
    way = between(first, second, config.steps)
    rows = []
    for row in range(config.rows):
        seed = int(step_generator(config.seed, row).integers(2**63))
        same = [decoder.draw(vector[None], seed=seed, guidance_scale=config.guidance_scale) for vector in way]
        rows.append(torch.cat(same).cpu())
    side = rows[0].shape[-1]
    shown = _read_pictures((config.first, config.second), side).float() / 255.0
    drawn = [image for row in rows for image in (shown[0], *row, shown[1])]
    captions = [config.first.name, *[""] * config.steps, config.second.name] * config.rows
    render.sheet(config.out, drawn, captions, columns=config.steps + 2)
    print(f"wrote {config.out}")


def _require_pictures(paths: tuple[Path, ...]) -> None:
    if not paths:
        raise UserError("pictures: got none, wanted at least one file")


def _read_pictures(paths: tuple[Path, ...], resolution: int) -> torch.Tensor:
    """uint8 [B, 3, S, S]."""
    return torch.stack([_read_picture(path, resolution) for path in paths])


def _read_picture(path: Path, resolution: int) -> torch.Tensor:
    return decode_picture(read_bounded(path, MOST_PICTURE_BYTES), resolution, str(path))


@dataclass(frozen=True)
class ConvertConfig:
    """Turn other projects' weights into safetensors."""

    # One argument for all, because one for the inputs alone would take the output as well where options follow.
    files: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="INPUT ... OUTPUT", help_behavior_hint="(required)"),
    ]
    """A file as torch.save wrote it, or safetensors (for a dVAE two, its encoder and its decoder), and the file to
    write; its header says what it holds, with its configuration and the inputs' SHA-256."""
    kind: _Kind | None = None
    """What the inputs are; found from the names of their tensors where not given."""
    heads: int | None = None
    """Attention heads of a ruDALL-E of unpublished size, which its weights do not tell."""
    dtype: Literal["keep", "float32", "float16", "bfloat16"] = "keep"
    """Of the floating-point tensors."""
    force: bool = False
    """Replace an output that is there already."""


def _convert(config: Annotated[ConvertConfig, tyro.conf.arg(name="")]) -> None:
    """Turn other projects' weights into safetensors, without running anything that is in them.

    dalle-reference convert encoder.pkl decoder.pkl dvae.safetensors

    OpenAI's dVAE and ruDALL-E's transformers then run here, as --model or from Python. FLAVA's codebook is the dVAE's
    encoder; taming's Gumbel VQGAN and DALLE-pytorch's models keep their own names.
    """
    if len(config.files) < 2:
        raise UserError(f"files: got {len(config.files)}, wanted at least an input and the output")
    *inputs, output = config.files
    require_output(output)
    if output.exists() and not config.force:
        raise UserError(f"{output}: is there already; --force replaces it")
    missing = [path for path in inputs if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: no such file")
    size = sum(path.stat().st_size for path in inputs)
    with tqdm(total=size, unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        found = convert(inputs, kind=config.kind, heads=config.heads, dtype=config.dtype, progress=bar.update)
    weights.write(output, found)
    runs = {"": "", "dvae": "; runs as a dVAE", "transformer": "; runs as a transformer", "clip": "; runs as a CLIP"}
    print(f"wrote {output}: {found.kind}, {len(found.tensors)} tensors{runs[found.model]}")


@dataclass(frozen=True)
class ExportConfig:
    """Turn a run's newest checkpoint into one file of weights."""

    run: tyro.conf.Positional[Path]
    """Folder of a run."""
    output: tyro.conf.Positional[Path]
    """The safetensors file to write; --model and --dvae take it."""
    kind: Literal["dvae", "transformer", "clip", "pixels"] = "transformer"
    """What the run trained."""
    force: bool = False
    """Replace an output that is there already."""


def _export(config: Annotated[ExportConfig, tyro.conf.arg(name="")]) -> None:
    """Turn a run's newest checkpoint, however many processes wrote it, into one file of the running mean's weights."""
    require_output(config.output)
    if config.output.exists() and not config.force:
        raise UserError(f"{config.output}: is there already; --force replaces it")
    saved = checkpoint.load(config.run, config.kind)
    kept = saved.group("ema")
    weights.write(config.output, weights.Weights("dalle-reference", config.kind, saved.config["model"], kept))
    print(f"wrote {config.output}: a {config.kind} of {saved.step} steps, {len(kept)} tensors")


@dataclass(frozen=True)
class PlanConfig:
    """What training a transformer needs, before any of it is there."""

    preset: Literal["demo", "small", "paper"] = "paper"
    """Of train-transformer."""
    gpus: int = 64
    """How many share a batch."""
    memory: float = 80.0
    """Of each, in GB of 10**9 bytes."""
    batch: int | None = None
    """Pictures in an update; the preset's where not given."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 is autocast: weights and moments are float32 either way."""
    replicate: tuple[int, ...] = (1,)
    """Groups that have all weights each (HSDP); of several each is tried."""
    tensor: tuple[int, ...] = (1,)
    """GPUs that compute each picture together; of several each is tried."""
    candidates: int = 512
    """Pictures that one GPU is to draw of a caption at a time."""

    def __post_init__(self) -> None:
        require_positive(self, "gpus", "batch", "candidates")
        for name in ("replicate", "tensor"):
            require(self, "one or more numbers above 0", lambda values: values and min(values) > 0, name)
        for groups, beside in itertools.product(self.replicate, self.tensor):
            if self.gpus % (groups * beside):
                asked = f"replicate {groups} x tensor {beside}"
                raise ValueError(f"replicate, tensor: got {asked}, wanted a divisor of {self.gpus} GPUs")
        require(self, "a finite number above 0", lambda value: 0 < value < math.inf, "memory")
        require(self, "at least 2", lambda value: value >= 2, "candidates")


def _plan(config: Annotated[PlanConfig, tyro.conf.arg(name="")]) -> None:
    """Say what training needs on so many GPUs, by a step on tensors without memory: bytes, traffic, operations."""
    training = TRANSFORMER_PRESETS[config.preset][1]
    batch = config.batch or training.run.batch
    for beside in config.tensor:
        if batch % (config.gpus // beside):
            shares = f"{config.gpus}" + f" / tensor {beside}" * (beside > 1)
            raise UserError(f"gpus: got {shares}, wanted a divisor of the batch {batch}")
    bf16 = config.precision == "bf16"
    memory = config.memory * 1e9
    found = plan.fitting(training.model, config.gpus, batch, memory, bf16, config.replicate, config.tensor)
    print(f"| {' | '.join(('layout', 'weights, GB', 'moments', 'mean', 'peak', 'sent a step', 'TFLOP a step'))} |")
    print("|---" * 7 + "|")
    for layout, need in found:
        how = f"--parallel {layout.parallel} --recompute {layout.recompute} --accumulate {layout.accumulate}"
        how += f" --replicate {layout.replicate}" * (layout.replicate > 1)
        how += f" --tensor {layout.tensor}" * (layout.tensor > 1)
        sizes = (f"{value / 1e9:.3g}" for value in (need.weights, need.moments, need.average, need.peak))
        sent = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in need.sent.items()) or "0"
        print(f"| {how} | {' | '.join(sizes)} | {sent} | {need.flops / 1e12:.4g} |")
    if not found:
        print(f"\nNo layout fits {config.gpus} GPUs of {config.memory:g} GB.")
    drawing = plan.sampling_bytes(training.model, config.candidates, bf16)
    print(
        f"\nEach of {config.gpus} GPUs, {batch} pictures a step. Drawing {config.candidates}: {drawing / 1e9:.3g} GB."
    )


@dataclass(frozen=True)
class ServeConfig:
    """A page in the browser to try models on, and to look at patterns."""

    model: Path | None = None
    """Folder of a stage 2, which draws and completes pictures."""
    clip: Path | None = None
    """Folder of a train-clip, which ranks what is drawn, and names pictures."""
    host: str = "127.0.0.1"
    """Address to listen at; this one only the machine itself can reach, 0.0.0.0 everybody."""
    port: int = 7860
    """Port to listen at."""
    device: str = "auto"
    """cpu, cuda, or auto."""

    def __post_init__(self) -> None:
        require(self, "1 to 65535", lambda value: 1 <= value <= 65535, "port")


def _serve(config: Annotated[ServeConfig, tyro.conf.arg(name="")]) -> None:
    """Open a page in the browser to try models on, and to look at patterns; without models, patterns alone."""
    try:
        from dalle_reference import serve
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; pip install 'dalle_kernels[serve]' brings it") from error
    device = resolve_device(config.device)
    painter = None if config.model is None else Painter(*load_transformer(config.model, device))
    judge = None if config.clip is None else Judge(*load_clip(config.clip, device))
    serve.serve(serve.make_page(painter, judge), config.host, config.port)


def _demo(config: Annotated[demo.DemoConfig, tyro.conf.arg(name="")]) -> None:
    """Train a small DALL-E on OpenMoji, both stages, and show what it draws."""
    demo.run(config)


def _family(config: Annotated[family.FamilyConfig, tyro.conf.arg(name="")]) -> None:
    """Train and measure the rest of the family beside a finished demo: CLIP, pixels, unCLIP."""
    family.run(config)


_COMMANDS = {
    "train-dvae": _train_dvae,
    "tokenize": _tokenize,
    "train-transformer": _train_transformer,
    "train-clip": _train_clip,
    "train-pixels": _train_pixels,
    "train-prior": _train_prior,
    "train-decoder": _train_decoder,
    "generate": _generate,
    "complete": _complete,
    "variations": _variations,
    "interpolate": _interpolate,
    "classify": _classify,
    "reconstruct": _reconstruct,
    "convert": _convert,
    "export": _export,
    "plan": _plan,
    "serve": _serve,
    "demo": _demo,
    "family": _family,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; ends the process with 0, 2 for an error, or 130 where it was asked to stop."""
    threading.excepthook = _on_thread_error
    try:
        tyro.extras.subcommand_cli_from_dict(
            _COMMANDS,
            prog="dalle-reference",
            description="A small DALL-E: a discrete VAE, a sparse transformer over its tokens, and what they draw.",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
    except (UserError, ValueError) as error:  # ValueError: how configurations and operations refuse an argument
        _leave(str(error), 2)
    except OSError as error:
        _leave(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2)
    except (RuntimeError, MemoryError) as error:
        too_much = ("can't allocate memory", "size calculation overflowed")
        if type(error) is RuntimeError and not any(reason in str(error) for reason in too_much):
            raise
        _leave("out of memory; ask for a smaller batch, fewer pictures or a smaller model", 2)
    except Elsewhere:
        sys.exit(1)
    except Interrupted as stop:
        _leave(str(stop) if _is_main() else "", 130)
    except KeyboardInterrupt:
        _leave("stopped", 130)


def _on_thread_error(failed: threading.ExceptHookArgs) -> None:
    if failed.exc_type is not OSError:  # TensorBoard's thread gives it to the main one, which says it
        threading.__excepthook__(failed)


def _leave(message: str, status: int) -> NoReturn:
    if message:
        print(f"dalle-reference: {message}", file=sys.stderr)
    sys.exit(status)


def _say(message: str) -> None:
    if _is_main():
        print(message)


def _is_main() -> bool:
    """Of the processes that torchrun started together, if it did."""
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    main()
