"""The whole chain on real pictures: OpenMoji, both stages, samples, and figures that say what was learnt."""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import dalle_kernels
from dalle_kernels import Causal, Row, TokenLayout, explain, sparse_attention
from dalle_reference import checkpoint, render, train
from dalle_reference.config import DVAE_PRESETS, TRANSFORMER_PRESETS, TrainDVAEConfig, TrainTransformerConfig
from dalle_reference.data import OPENMOJI_CREDIT, PictureSet, load_pictures
from dalle_reference.data.openmoji import LANGUAGES
from dalle_reference.dvae import DiscreteVAE
from dalle_reference.errors import UserError, require
from dalle_reference.evaluate import psnr, retrieval
from dalle_reference.files import exclusive, replacing
from dalle_reference.generate import generate
from dalle_reference.load import load_dvae, load_transformer
from dalle_reference.loop import Interrupted, autocast
from dalle_reference.parallel import World, joined, resolve_device
from dalle_reference.tokenizer import CaptionTokenizer
from dalle_reference.transformer import DalleTransformer

_ASKED = 64  # captions of the retrieval figure
_SEED = 0
_SHARE = 0.05  # of the training time, the dVAE's, which begins nearly where it ends
SAMPLING: dict[str, Any] = {"temperature": 0.05, "guidance_scale": 1.5}
_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white")
_TIMES = 4  # that each unseen combination is drawn


@dataclass(frozen=True)
class DemoConfig:
    """Train a small DALL-E on OpenMoji, both stages, and show what it draws."""

    out: Path = Path("runs/demo")
    """Folder for pictures and models; must not hold a demo yet."""
    minutes: float = 8.0
    """What training may take, both stages together: the steps are chosen so, on the speed of a short trial."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one, with larger models."""
    cache: Path | None = None
    """Where decoded pictures are kept; $DALLE_REFERENCE_CACHE or the user's cache folder by default."""

    def __post_init__(self) -> None:
        require(self, "a finite number above 0", lambda value: 0 < value < math.inf, "minutes")


def run(config: DemoConfig) -> dict[str, Any]:
    """Runs the demo, or goes on with one that was stopped, and returns its report, which it also writes as report.json.

    Raises:
        UserError: if `out` holds a finished demo.
    """
    try:
        with joined(config.device) as world, ExitStack() as held:
            world.first(lambda: held.enter_context(exclusive(config.out)))
            return _run(config, world)
    except Interrupted as stop:
        raise Interrupted(f"{config.out}: stopped; the same command goes on") from stop
    except OSError as error:
        raise UserError(f"{config.out}: {error}") from error


def _run(config: DemoConfig, world: World) -> dict[str, Any]:
    """The report on the main process; the others only train."""
    world.first(lambda: _require_unfinished(config.out))
    device = world.device
    torch.manual_seed(_SEED)
    seconds: dict[str, float] = {}
    stage_1, stage_2 = _configs(config, device)
    if not world.main:
        train.train_dvae(plan(stage_1, train.train_dvae, 60 * config.minutes * _SHARE, world))
        train.train_transformer(plan(stage_2, train.train_transformer, 60 * config.minutes * (1 - _SHARE), world))
        return {}
    processes = f", {world.size} processes" * (world.size > 1)
    versions = f"dalle_kernels {dalle_kernels.__version__}, torch {torch.__version__}"
    print(f"{versions}, {device}, {_threads()}{processes}", flush=True)

    with timed("pictures", seconds):
        pictures = load_pictures("openmoji", stage_1.model.resolution, config.cache)
    print(f"{len(pictures)} pictures of {stage_1.model.resolution} x {stage_1.model.resolution}. {OPENMOJI_CREDIT}")

    with timed("dvae", seconds):
        stage_1 = plan(stage_1, train.train_dvae, 60 * config.minutes * _SHARE, world)
        train.train_dvae(stage_1)
    dvae = load_dvae(stage_1.run.out, device)

    with timed("transformer", seconds):
        stage_2 = plan(stage_2, train.train_transformer, 60 * config.minutes * (1 - _SHARE), world)
        train.train_transformer(stage_2)
    model, tokenizer, dvae = load_transformer(stage_2.run.out, device)

    with timed("samples", seconds):
        quality = _reconstructions(config, stage_1, dvae)
        figures = _samples(config, stage_2, model, tokenizer, dvae)
    with timed("measurements", seconds):
        served = _explain(model, dvae)
        speed = _speed(model, stage_2.run.batch, device)
    _curves(config, stage_1, stage_2)
    report = {
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "steps": {"dvae": stage_1.run.steps, "transformer": stage_2.run.steps},
        "final": {"dvae": _last(stage_1.run.out), "transformer": _last(stage_2.run.out)},
        "held_out_psnr": quality,
        **figures,
        "backends": served,
        "speed": speed,
        "credit": OPENMOJI_CREDIT,
    }
    with replacing(config.out / "report.json") as draft:
        draft.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _print(report, config.out)
    return report


def _require_unfinished(out: Path) -> None:
    if (out / "report.json").exists():
        raise UserError(f"{out}: holds a demo already; take it away, or choose another --out")


def _configs(config: DemoConfig, device: torch.device) -> tuple[TrainDVAEConfig, TrainTransformerConfig]:
    """The demo's presets; the next larger ones on a GPU."""
    name = "small" if device.type == "cuda" else "demo"
    often: dict[str, Any] = {"log_every": 5, "save_every": 500, "draw_every": 1000, "seed": _SEED}
    places: dict[str, Any] = {"cache": config.cache, "device": str(device)}
    stage_1 = DVAE_PRESETS[name][1]
    stage_2 = TRANSFORMER_PRESETS[name][1]
    return (
        replace(stage_1, run=replace(stage_1.run, out=config.out / "dvae", **often, **places)),
        replace(
            stage_2,
            run=replace(stage_2.run, out=config.out / "transformer", **often, **places),
            dvae=config.out / "dvae",
            data=replace(stage_2.data, one_per_concept=True),
        ),
    )


def plan(config: Any, training: Callable[[Any], Path], seconds: float, world: World) -> Any:
    """The configuration with its number of steps; and with `resume` where an earlier demo has begun the stage.

    As many steps as `seconds` allow by a short trial, at most the preset's; a stage once begun keeps its number.
    """
    out = config.run.out
    if world.first(lambda: checkpoint.latest(out) is not None):
        begun = checkpoint.load(out, out.name, world)
        try:
            steps = begun.config["run"]["steps"]
        except (KeyError, TypeError) as error:
            raise UserError(f"{begun.path}: says no number of steps; choose another --out") from error
        return replace(config, run=replace(config.run, steps=steps, resume=True))
    trial_steps, every = 30, 10
    with ExitStack() as held:
        folder = world.first(lambda: held.enter_context(tempfile.TemporaryDirectory()))
        trial = replace(config.run, out=Path(folder) / "trial", steps=trial_steps, log_every=every, draw_every=0)
        training(replace(config, run=trial))
        speed = world.first(lambda: _last(trial.out)["pictures_per_second"])
    steps = int(min(config.run.steps, max(50, seconds * speed / config.run.batch)))
    return replace(config, run=replace(config.run, steps=steps))


def _reconstructions(config: DemoConfig, stage_1: TrainDVAEConfig, dvae: DiscreteVAE) -> float:
    """Writes reconstructions.png of held-out pictures; returns the PSNR of all of them."""
    _, held_out = load_pictures("openmoji", stage_1.model.resolution, config.cache).split(stage_1.data.held_out)
    device = next(dvae.parameters()).device
    originals = held_out.images.to(device).float() / 255.0
    decoded = torch.cat([dvae.decode(dvae.encode(part)) for part in originals.split(64)])
    shown = torch.linspace(0, len(originals) - 1, 24).long()
    grid = " x ".join(map(str, dvae.config.grid))
    render.pairs(
        config.out / "reconstructions.png",
        originals[shown],
        decoded[shown],
        heading=f"Pictures the dVAE never saw, above what their {grid} tokens keep",
        footer=OPENMOJI_CREDIT,
    )
    return psnr(originals, decoded)


def _choose(training: PictureSet) -> tuple[np.ndarray, list[str]]:
    """Which pictures are asked for, and by what captions: a quarter in each language."""
    named = [i for i, record in enumerate(training.records) if set(LANGUAGES) <= record.captions.keys()]
    chosen = np.random.default_rng(_SEED).choice(named, size=min(_ASKED, len(named)), replace=False)
    return chosen, [training.records[i].captions[LANGUAGES[n % len(LANGUAGES)]] for n, i in enumerate(chosen)]


class Asked(NamedTuple):
    """What a finished demo's retrieval figure is made of."""

    model: DalleTransformer
    text: torch.Tensor
    """int64 [B, caption_length]."""
    targets: torch.Tensor
    """int64 [B], the rows of `gallery` that the captions mean."""
    gallery: torch.Tensor
    """int64 [N, cells], the tokens of the training pictures."""
    precision: str


def asked(config: DemoConfig) -> Asked:
    """What the demo in `config.out` asks its transformer for, to draw it in other ways.

    Raises:
        UserError: if there is no such demo.
    """
    device = resolve_device(config.device)
    _, stage_2 = _configs(config, device)
    model, tokenizer, dvae = load_transformer(stage_2.run.out, device)
    training = train.captioned_training(stage_2.data, dvae.config.resolution, config.cache)
    chosen, captions = _choose(training)
    text = tokenizer.encode(captions, model.config.caption_length).to(device)
    gallery = train.tokenize_pictures(dvae, training.images)
    return Asked(model, text, torch.from_numpy(chosen), gallery, stage_2.run.precision)


def _samples(
    config: DemoConfig,
    stage_2: TrainTransformerConfig,
    model: DalleTransformer,
    tokenizer: CaptionTokenizer,
    dvae: DiscreteVAE,
) -> dict[str, Any]:
    """Draws pictures of 64 captions, a quarter in each language; writes samples.png; measures the retrieval."""
    device = next(model.parameters()).device
    training = train.captioned_training(stage_2.data, dvae.config.resolution, config.cache)
    gallery = train.tokenize_pictures(dvae, training.images)
    chosen, captions = _choose(training)
    text = tokenizer.encode(captions, model.config.caption_length).to(device)
    with autocast(stage_2.run.precision, device):
        tokens = generate(model, text, seed=_SEED, **SAMPLING)
    drawn = dvae.decode(tokens.unflatten(1, model.config.grid)).cpu()
    found = retrieval(tokens.cpu(), torch.from_numpy(chosen), gallery)
    by_language = {
        language: retrieval(tokens[n :: len(LANGUAGES)].cpu(), torch.from_numpy(chosen[n :: len(LANGUAGES)]), gallery)
        for n, language in enumerate(LANGUAGES)
    }
    among = retrieval(tokens.cpu(), torch.arange(len(chosen)), gallery[torch.from_numpy(chosen)])

    shown = [n for language in range(len(LANGUAGES)) for n in range(language, len(captions), len(LANGUAGES))]
    columns = 8
    shown = [n for row in range(len(LANGUAGES)) for n in shown[row * len(shown) // len(LANGUAGES) :][:columns]]
    render.sheet(
        config.out / "samples.png",
        [drawn[n] for n in shown],
        [captions[n] for n in shown],
        columns=columns,
        heading="Drawn by the demo for captions of its training pictures, first come, not chosen",
        footer=OPENMOJI_CREDIT,
    )
    return {
        "retrieval": {"text": str(found), "times_chance": found.times_chance, **found._asdict()},
        "retrieval_by_language": {language: share.right for language, share in by_language.items()},
        "unseen_combinations": _combinations(training, gallery, stage_2, model, tokenizer, dvae),
        "retrieval_among_asked": {"text": str(among), "times_chance": among.times_chance, **among._asdict()},
        "training_pictures": len(training),
    }


def _combinations(
    training: PictureSet,
    gallery: torch.Tensor,
    stage_2: TrainTransformerConfig,
    model: DalleTransformer,
    tokenizer: CaptionTokenizer,
    dvae: DiscreteVAE,
) -> dict[str, Any]:
    """Asks for colours and things that were seen, but not together ("green heart"), and looks for both in the drawing.

    The thing is right where the training picture nearest by its tokens is one of that thing; the colour, where the mean
    colour is nearest to that of the training pictures of its name.
    """
    seen: dict[tuple[str, str], int] = {}
    for index, record in enumerate(training.records):
        colour, _, thing = record.captions.get("en", "").partition(" ")
        if colour in _COLOURS and thing:
            seen.setdefault((colour, thing), index)
    things = [thing for _, thing in seen]
    colours = sorted({colour for colour, _ in seen})
    asked = [
        (colour, thing)
        for thing in sorted({thing for thing in things if things.count(thing) > 1})
        for colour in colours
        if (colour, thing) not in seen
    ]
    if not asked:
        return {"asked": 0}
    device = next(model.parameters()).device
    text = tokenizer.encode([f"{colour} {thing}" for colour, thing in asked], model.config.caption_length).to(device)
    with autocast(stage_2.run.precision, device):
        tokens = generate(model, text, seed=_SEED, number=_TIMES, **SAMPLING).cpu()
    pictures = [dvae.decode(part.to(device)).cpu() for part in tokens.unflatten(1, model.config.grid).split(16)]
    shades = torch.cat(pictures).mean(dim=(2, 3))
    known = torch.stack(
        [
            training.images[[index for (name, _), index in seen.items() if name == colour]].float().mean(dim=(0, 2, 3))
            for colour in colours
        ]
    )
    nearest_colour = torch.cdist(shades, known / 255.0).argmin(dim=1).tolist()
    nearest_picture = [int((gallery == row).sum(dim=1).argmax()) for row in tokens]
    wanted = [combination for combination in asked for _ in range(_TIMES)]
    right_colour = [colours[found] == colour for found, (colour, _) in zip(nearest_colour, wanted, strict=True)]
    right_thing = [
        training.records[found].captions.get("en", "").endswith(f" {thing}")
        for found, (_, thing) in zip(nearest_picture, wanted, strict=True)
    ]
    both = [colour and thing for colour, thing in zip(right_colour, right_thing, strict=True)]
    return {
        "asked": len(asked),
        "colour": statistics.mean(right_colour),
        "thing": statistics.mean(right_thing),
        "both": statistics.mean(both),
        "colour_by_chance": 1 / len(colours),
    }


def _explain(model: DalleTransformer, dvae: DiscreteVAE) -> dict[str, str]:
    """Which backend served each operation, asked with tensors shaped as the demo's were."""
    device = next(model.parameters()).device
    layout, size = model.config.layout, model.config
    with autocast("auto", device):
        q = torch.zeros(1, size.heads, layout.length, size.head_dim, device=device)
        one = q[:, :, :1]
        logits = torch.zeros(4, dvae.config.vocab, device=device)
        pixels = torch.full((1, 3, 8, 8), 0.5, device=device)
        cache = dalle_kernels.KVCache(Row(layout), 1, size.heads, size.head_dim, dtype=q.dtype, device=device)
        answers = [
            explain(sparse_attention, q, q, q, Row(layout)),
            explain(dalle_kernels.decode_attention, one, one, one, cache, 0),
            explain(dalle_kernels.gumbel_lookup, logits, dvae.quantizer.codebook, 1.0),
            explain(dalle_kernels.logit_laplace_nll, pixels, pixels, pixels),
            explain(dalle_kernels.sample_tokens, logits),
        ]
    return {answer.operation: f"{answer.backend} {answer.detail}".strip() for answer in answers}


def _speed(model: DalleTransformer, batch: int, device: torch.device) -> dict[str, Any]:
    """Row attention against dense causal attention, forward and backward, here and now.

    At the demo's own shape, and at the paper's 256 + 32 x 32 tokens with 8 heads of 64.
    """
    size = model.config
    shapes = {
        "demo": (batch, size.heads, size.head_dim, size.layout),
        "paper": (1, 8, 64, TokenLayout(256, (32, 32))),
    }
    return {name: _compare(*shape, device) for name, shape in shapes.items()}


def _compare(batch: int, heads: int, head_dim: int, layout: TokenLayout, device: torch.device) -> dict[str, Any]:
    dtype = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or device.type == "cuda" else torch.float32
    q, k, v = (
        torch.randn(batch, heads, layout.length, head_dim, device=device, dtype=dtype, requires_grad=True)
        for _ in range(3)
    )
    pattern = Row(layout)

    def sparse() -> torch.Tensor:
        return sparse_attention(q, k, v, pattern)

    def dense() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def once(attention: Callable[[], torch.Tensor]) -> float:
        began = time.perf_counter()
        attention().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for attention in (sparse, dense):
        once(attention)
    pairs = [(once(sparse), once(dense)) for _ in range(9)]
    ours, theirs = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
    return {
        "shape": [batch, heads, layout.length, head_dim],
        "dtype": str(dtype).removeprefix("torch."),
        "row_ms": ours,
        "dense_ms": theirs,
        "ratio": theirs / ours,
        "pairs_ratio": Causal(layout).visible_pairs / pattern.visible_pairs,
    }


def _curves(config: DemoConfig, stage_1: TrainDVAEConfig, stage_2: TrainTransformerConfig) -> None:
    render.curves(
        config.out / "curves.png",
        {"dVAE": stage_1.run.out / "metrics.jsonl", "transformer": stage_2.run.out / "metrics.jsonl"},
        {
            "dVAE": [["nll"], ["kl"], ["codebook_perplexity"]],
            "transformer": [["image_loss"], ["text_loss"], ["gradient_norm"]],
        },
    )


def _last(run: Path) -> dict[str, float]:
    return render.read_metrics(run / "metrics.jsonl")[-1]


def _threads() -> str:
    return f"{torch.get_num_threads()} threads on {os.cpu_count()} processors"


@contextmanager
def timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"==> {name}", flush=True)
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began


def _print(report: dict[str, Any], out: Path) -> None:
    final = report["final"]
    lines = [
        "",
        "time by stage: " + ", ".join(f"{name} {value:.0f} s" for name, value in report["seconds"].items()),
        f"steps: dVAE {report['steps']['dvae']}, transformer {report['steps']['transformer']}"
        f" on {report['training_pictures']} captioned pictures",
        f"final losses: dVAE {final['dvae']['loss']:.4f} (nll {final['dvae']['nll']:.4f},"
        f" kl {final['dvae']['kl']:.5f}),"
        f" transformer {final['transformer']['loss']:.3f} (image {final['transformer']['image_loss']:.3f},"
        f" text {final['transformer']['text_loss']:.3f})",
        f"reconstruction of held-out pictures: PSNR {report['held_out_psnr']:.2f} dB",
        f"captions to pictures: {report['retrieval']['text']}",
        "  by language: "
        + ", ".join(f"{language} {share:.0%}" for language, share in report["retrieval_by_language"].items()),
        _say_combinations(report["unseen_combinations"]),
        f"  among the pictures asked for alone: {report['retrieval_among_asked']['text']}",
        "served by: " + ", ".join(f"{name}: {backend}" for name, backend in report["backends"].items()),
    ]
    for name, speed in report["speed"].items():
        lines.append(
            f"row attention at the {name}'s shape {speed['shape']}, {speed['dtype']}, forward and backward:"
            f" {speed['row_ms']:.2f} ms, dense causal {speed['dense_ms']:.2f} ms: {speed['ratio']:.2f} times as fast"
            f" ({speed['pairs_ratio']:.2f} times fewer pairs)"
        )
    lines += [
        f"pictures: {out}/reconstructions.png, {out}/samples.png, {out}/curves.png",
        f"models: {out}/dvae, {out}/transformer; try: dalle-reference generate --model {out}/transformer 'red heart'",
        report["credit"],
    ]
    print("\n".join(lines), flush=True)


def _say_combinations(found: dict[str, Any]) -> str:
    if not found["asked"]:
        return "unseen combinations of colour and thing: none to ask for among these pictures"
    return (
        f"unseen combinations of colour and thing, {found['asked']} drawn {_TIMES} times: right colour"
        f" {found['colour']:.0%} (chance {found['colour_by_chance']:.0%}), right thing {found['thing']:.0%},"
        f" both {found['both']:.0%}"
    )
