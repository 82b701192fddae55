"""What a training run is told, as typed dataclasses: the command line, the presets and the checkpoints all use them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dalle_reference import clip, dvae, pixels, prior, transformer, unclip
from dalle_reference.errors import MOST_SIZE, require, require_amount, require_positive, require_seed, require_share


@dataclass(frozen=True)
class RunConfig:
    """Where a run writes, how long it is, and how weights are updated."""

    out: Path
    """The run's folder: checkpoints, metrics.jsonl, TensorBoard's events, pictures."""
    steps: int = 1000
    """Updates in all."""
    batch: int = 32
    """Pictures in an update."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon moves the matrices of a model's blocks, AdamW the rest."""
    learning_rate: float = 1e-3
    """Highest step size, after the warm-up."""
    final_learning_rate: float = 1e-5
    """The step size at the end of half a cosine."""
    warm_up_steps: int = 50
    """Steps over which the step size grows from 0."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.99
    """AdamW's decay of the squared gradient's mean."""
    epsilon: float = 1e-8
    """AdamW's guard against division by zero."""
    moments: Literal["fp32", "8bit"] = "fp32"
    """How AdamW keeps its two means. 8bit: 256 numbers at a time have a byte each and share a scale (Dettmers et al.
    2022), by torchao, which `pip install 'dalle_kernels[low-bit]'` brings; weights stay float32."""
    weight_decay: float = 1e-4
    """AdamW's; on matrices only, not on biases, gains and single vectors."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    average: float = 0.995
    """Decay of the running mean of the weights."""
    seed: int = 0
    """Of everything random in the run."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 is autocast; auto takes it where the processor or GPU multiplies bf16."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""
    log_every: int = 10
    """Steps between lines of metrics."""
    save_every: int = 500
    """Steps between checkpoints; the last step and Ctrl-C save as well."""
    draw_every: int = 500
    """Steps between pictures of what the model does, and once at the end; 0 for none."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`, exactly as if the run had never stopped."""
    cache: Path | None = None
    """Where decoded pictures are kept; $DALLE_REFERENCE_CACHE or the user's cache folder by default."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How processes share the work. ddp: each has all weights. fsdp: each keeps its part of weights, moments and mean,
    and gathers a block's weights when its turn comes."""
    replicate: int = 1
    """With fsdp, groups of processes that have all weights each, of which a member keeps its part (HSDP): one a machine
    gathers weights within the machine alone."""
    tensor: int = 1
    """With fsdp, processes beside one another that compute each picture together: a transformer's heads, the columns of
    its MLPs and its codes are divided among them."""
    powersgd_rank: int = 0
    """With ddp, gradients pass between processes as products of two matrices of this rank, and what that leaves out is
    added to the next ones (PowerSGD, Vogels et al. 2019, by which the paper trained); 0: as they are."""
    accumulate: int = 1
    """Parts that a process takes its share of a batch in, gradients added up, where memory is short."""

    def __post_init__(self) -> None:
        require_positive(self, "steps", "batch", "log_every", "save_every", "accumulate", "replicate", "tensor")
        require_amount(self, "learning_rate", "final_learning_rate", "warm_up_steps", "weight_decay", "draw_every")
        require(self, "above 0", lambda value: value > 0, "clip", "epsilon")
        require(self, "at least 0 and below 1", lambda value: 0 <= value < 1, "beta1", "beta2", "average")
        require_seed(self)
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer: got {self.optimizer!r}, wanted adamw or muon")
        if self.moments not in ("fp32", "8bit"):
            raise ValueError(f"moments: got {self.moments!r}, wanted fp32 or 8bit")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision: got {self.precision!r}, wanted auto, fp32 or bf16")
        if self.parallel not in ("ddp", "fsdp"):
            raise ValueError(f"parallel: got {self.parallel!r}, wanted ddp or fsdp")
        require_amount(self, "powersgd_rank")
        if self.powersgd_rank and self.parallel != "ddp":
            raise ValueError(f"powersgd_rank: got {self.powersgd_rank} with --parallel fsdp, wanted 0")
        for name in ("replicate", "tensor"):
            if getattr(self, name) > 1 and self.parallel != "fsdp":
                raise ValueError(f"{name}: got {getattr(self, name)} with --parallel ddp, wanted 1")


# These change nothing in the sequence of losses (but for rounding), so a run may go on with others than it began with.
_FREE = (
    *("out", "dvae", "clip_run", "log_every", "save_every", "draw_every", "resume", "cache"),
    *("parallel", "replicate", "tensor", "accumulate", "recompute", "workers", "broken"),
)


@dataclass(frozen=True)
class SourceConfig:
    """Where pictures are."""

    source: str = "openmoji"
    """openmoji, a folder of pictures with .txt captions beside them, or WebDataset shards: "shards/*.tar",
    "shards/{000..127}.tar", several with :: between them. For train-transformer also a folder that tokenize wrote."""
    caption_field: str | None = None
    """Field of the .json beside a picture that has its caption, or a list of them; the .txt's lines where not given."""


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """Which pictures."""

    held_out: float = 0.05
    """Share of the concepts that is kept out of training."""
    one_per_concept: bool = False
    """Train on the first picture of each concept only (for OpenMoji: leave out the variants by skin tone)."""
    pictures: int | None = None
    """Train on this many pictures, taken evenly; all where not given. Models of captions: of those that have one."""

    def __post_init__(self) -> None:
        require(self, "at least 0 and below 1", lambda value: 0 <= value < 1, "held_out")
        require_positive(self, "pictures")


@dataclass(frozen=True)
class StreamedSourceConfig(SourceConfig):
    """Where pictures are, and how shards of them are read when their turn comes."""

    workers: int = 2
    """Processes that decode shards for each that trains; 0: it does so itself."""
    broken: float = 0.01
    """Share of the shards' pictures that may be unreadable: they are named, and left out."""

    def __post_init__(self) -> None:
        require_amount(self, "workers")
        require(self, "at least 0 and below 1", lambda value: 0 <= value < 1, "broken")


@dataclass(frozen=True)
class StreamedDataConfig(DataConfig, StreamedSourceConfig):
    """Which pictures, where shards are read as training goes on."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        StreamedSourceConfig.__post_init__(self)


@dataclass(frozen=True)
class TokenizeConfig:
    """Pictures to tokens, once."""

    dvae: Path
    """Folder of a finished stage 1, or a file of converted weights."""
    data: StreamedSourceConfig = field(default_factory=StreamedSourceConfig)
    out: Path = Path("tokens")
    """The folder of token shards; shards that are there already stay. train-transformer takes it as its --source."""
    cache: Path | None = None
    """As for training."""
    device: str = "auto"
    """cpu, cuda, or auto."""


@dataclass(frozen=True)
class TrainDVAEConfig:
    """Stage 1."""

    run: RunConfig
    model: dvae.DVAEConfig = dvae.PRESETS["demo"]
    data: StreamedDataConfig = field(default_factory=StreamedDataConfig)
    fitted: bool = False
    """Begin with codes that k-means finds on training pictures, rather than with random ones; not for lfq."""
    temperature: float = 1 / 16
    """The relaxation's temperature at the end of its half cosine, which starts at 1."""
    temperature_share: float = 0.8
    """Share of the steps over which the temperature falls."""
    kl_weight: float = 6.6
    """beta, the weight of the KL to uniform, at the end of its half cosine, which starts at 0."""
    kl_share: float = 0.1
    """Share of the steps over which beta rises."""
    distance_weight: float = 1.0
    """Weight of the squared distance of features to their codes, for all quantizers but dvae."""
    entropy_weight: float = 0.1
    """Weight of lfq's entropies: each token's is to be small, that of the batch's mean distribution large."""

    def __post_init__(self) -> None:
        if self.fitted and self.model.quantizer == "lfq":
            raise ValueError(f"fitted: got {self.fitted} with quantizer lfq, which has no codes to begin with")
        require(self, "a finite number above 0", lambda value: 0 < value < math.inf, "temperature")
        require_share(self, "temperature_share", "kl_share")
        require_amount(self, "kl_weight", "distance_weight", "entropy_weight")


@dataclass(frozen=True)
class TrainTransformerConfig:
    """Stage 2."""

    run: RunConfig
    dvae: Path
    """Folder of a finished stage 1, or a file of converted weights."""
    model: transformer.TransformerConfig = transformer.PRESETS["demo"]
    data: StreamedDataConfig = field(default_factory=StreamedDataConfig)
    bpe_dropout: float = 0.1
    """Probability with which a merge of the byte-pair encoding is left out, in training."""
    caption_dropout: float = 0.1
    """Probability with which a caption is replaced by none, for classifier-free guidance."""
    cell_dropout: float = 0.0
    """Largest share of a picture's tokens that are hidden from the stream, and predicted all the same: each picture's
    share is drawn evenly from 0 on. Without it a model that has few pictures learns them by their own first cells, and
    their captions hardly."""
    panels: bool = False
    """Train on pairs of panels: a picture, which is given, and below it what became of it, say turned: all that the
    caption says. The grid has two pictures' rows; one pair of each picture is held out."""
    guidance_scale: float = 1.5
    """Guidance of the samples drawn as training goes on."""
    recompute: transformer.Recompute = "none"
    """What the backward pass computes anew, instead of having kept it, where memory is short."""

    def __post_init__(self) -> None:
        require(self.model, "at least 256, one for each byte", lambda value: value >= 256, "vocab_text")
        require(self.model, "0: what is told vectors is a train-decoder", lambda value: value == 0, "latent")
        require_share(self, "bpe_dropout", "caption_dropout", "cell_dropout")
        require(self, "a finite number", math.isfinite, "guidance_scale")


@dataclass(frozen=True)
class TrainCLIPConfig:
    """The judge: CLIP."""

    run: RunConfig
    model: clip.CLIPConfig = clip.PRESETS["demo"]
    data: DataConfig = field(default_factory=DataConfig)
    bpe_dropout: float = 0.1
    """Probability with which a merge of the byte-pair encoding is left out, in training."""
    captions: int = 1
    """Captions of a picture in one batch: where it has that many, each in its place, a language say, and told from the
    others' in the same place. The pictures are read once for all of them."""
    shift: int = 0
    """Pixels by which a picture is moved at most, up or down and sideways, its edge repeated; in training."""

    def __post_init__(self) -> None:
        require_positive(self, "captions")
        require(self, f"0 to {MOST_SIZE}", lambda value: 0 <= value <= MOST_SIZE, "shift")
        require(self.model, "at least 257, one for each byte and the end", lambda value: value >= 257, "vocab_text")
        require(self.model, "at least 2, one token and the end", lambda value: value >= 2, "text_length")
        require_share(self, "bpe_dropout")


@dataclass(frozen=True)
class TrainPixelsConfig:
    """Pixels as tokens."""

    run: RunConfig
    model: pixels.PixelConfig = pixels.PRESETS["bytes"]
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True)
class TrainPriorConfig:
    """unCLIP's prior: from captions to CLIP's vectors of pictures."""

    run: RunConfig
    clip_run: Path
    """Folder of a train-clip."""
    model: prior.PriorConfig = prior.PRIORS["diffusion"]
    data: DataConfig = field(default_factory=DataConfig)
    bpe_dropout: float = 0.1
    """Probability with which a merge of the byte-pair encoding is left out, in training."""
    caption_dropout: float = 0.1
    """Probability with which caption and vector are replaced by none, for classifier-free guidance."""

    def __post_init__(self) -> None:
        require_share(self, "bpe_dropout", "caption_dropout")


@dataclass(frozen=True)
class TrainDecoderConfig:
    """unCLIP's decoder into a dVAE's tokens."""

    run: RunConfig
    clip_run: Path
    """Folder of a train-clip."""
    dvae: Path
    """Folder of a finished stage 1, or a file of converted weights."""
    model: transformer.TransformerConfig = unclip.TOKEN_DECODER
    data: DataConfig = field(default_factory=DataConfig)
    vector_dropout: float = 0.1
    """Probability with which the vector is replaced by none, for classifier-free guidance."""
    cell_dropout: float = 0.0
    """Largest share of a picture's tokens that are hidden from the stream, and predicted all the same."""

    def __post_init__(self) -> None:
        require_share(self, "vector_dropout", "cell_dropout")


@dataclass(frozen=True)
class TrainPixelDecoderConfig:
    """unCLIP's decoder into pixels."""

    run: RunConfig
    clip_run: Path
    """Folder of a train-clip."""
    model: unclip.PixelDecoderConfig = unclip.PIXEL_DECODERS["demo"]
    data: DataConfig = field(default_factory=DataConfig)
    vector_dropout: float = 0.1
    """Probability with which the vector is replaced by none, for classifier-free guidance."""

    def __post_init__(self) -> None:
        require_share(self, "vector_dropout")


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as checkpoints keep it: without what may change when a run goes on."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            kept = (entry.name for entry in dataclasses.fields(value) if entry.name not in _FREE)
            return {name: plain(getattr(value, name)) for name in kept}
        return list(value) if isinstance(value, tuple) else value

    return plain(config)


def _run(out: str, **changes: Any) -> RunConfig:
    return RunConfig(out=Path(out), **changes)


DVAE_PRESETS: dict[str, tuple[str, TrainDVAEConfig]] = {
    "small": (
        "64 x 64 pictures to 16 x 16 tokens of 1024; hours on a CPU, minutes on a GPU",
        TrainDVAEConfig(_run("runs/dvae", steps=20_000, batch=64, learning_rate=5e-4), dvae.PRESETS["small"]),
    ),
    "demo": (
        "32 x 32 pictures to 8 x 8 tokens of 2048; half a minute on a CPU",
        TrainDVAEConfig(
            _run("runs/dvae", steps=3000, batch=16, learning_rate=1e-3, average=0.995, precision="fp32"),
            dvae.PRESETS["demo"],
            fitted=True,
            kl_weight=0.05,
        ),
    ),
    "codes": (
        "32 x 32 pictures to 8 x 8 tokens of 65,536 codes, by vq-ema; minutes on a CPU",
        TrainDVAEConfig(
            _run("runs/dvae", steps=1000, batch=16, learning_rate=3e-4, average=0.995, precision="fp32"),
            dvae.PRESETS["codes"],
            fitted=True,
        ),
    ),
    "paper": (
        "256 x 256 pictures to 32 x 32 tokens of 8192, as Ramesh et al. 2021 trained it",
        TrainDVAEConfig(
            _run(
                "runs/dvae",
                steps=3_000_000,
                batch=512,
                learning_rate=1e-4,
                final_learning_rate=1.25e-6,
                warm_up_steps=0,
                beta2=0.999,
                average=0.999,
            ),
            dvae.PRESETS["paper"],
            temperature_share=0.05,
            kl_share=5000 / 3_000_000,
        ),
    ),
}

TRANSFORMER_PRESETS: dict[str, tuple[str, TrainTransformerConfig]] = {
    "small": (
        "12 layers of 8 x 64 over the small dVAE's 16 x 16 tokens; hours on a GPU",
        TrainTransformerConfig(
            _run("runs/transformer", steps=50_000, batch=64, learning_rate=5e-4, beta2=0.96, weight_decay=4.5e-2),
            Path("runs/dvae"),
            transformer.PRESETS["small"],
        ),
    ),
    "demo": (
        "2 layers of 2 x 64 on 1024 pictures; minutes on a CPU",
        TrainTransformerConfig(
            # Words and pictures are rare: what few gradients they get moves them far, and nothing takes it back.
            _run(
                "runs/transformer",
                steps=12_000,
                batch=16,
                optimizer="muon",
                learning_rate=2e-2,
                beta2=0.98,
                weight_decay=0.0,
            ),
            Path("runs/dvae"),
            transformer.PRESETS["demo"],
            data=StreamedDataConfig(one_per_concept=True, pictures=1024),
            bpe_dropout=0.0,
        ),
    ),
    "panels": (
        "a picture in, a picture out: 4 layers of 2 x 64 over two panels of the demo's tokens; minutes on a CPU",
        TrainTransformerConfig(
            _run(
                "runs/panels", steps=8000, batch=16, optimizer="muon", learning_rate=2e-2, beta2=0.98, weight_decay=0.0
            ),
            Path("runs/dvae"),
            transformer.TransformerConfig(
                vocab_text=300, text_length=8, grid=(16, 8), layers=4, schedule="causal", text_weight=0.005
            ),
            panels=True,
        ),
    ),
    "paper": (
        "64 layers of 62 x 64, 12 billion parameters, as Ramesh et al. 2021 trained it",
        TrainTransformerConfig(
            _run(
                "runs/transformer",
                steps=430_000,
                batch=1024,
                learning_rate=4.5e-4,
                final_learning_rate=4.5e-6,
                warm_up_steps=5000,
                beta2=0.96,
                weight_decay=4.5e-2,
                clip=4.0,
                average=0.999,
            ),
            Path("runs/dvae"),
            transformer.PRESETS["paper"],
        ),
    ),
}

CLIP_PRESETS: dict[str, tuple[str, TrainCLIPConfig]] = {
    "demo": (
        "48 x 48 pictures, 4 layers of 128, captions 3 of 128; minutes on a CPU",
        TrainCLIPConfig(
            _run(
                "runs/clip",
                steps=1500,
                batch=64,
                learning_rate=1.5e-3,
                warm_up_steps=100,
                beta2=0.98,
                epsilon=1e-6,
                weight_decay=0.2,
            ),
            captions=4,
            shift=2,
        ),
    ),
    "paper": (
        "ViT-B/32, 151 million parameters, as Radford et al. 2021 trained it: 32 epochs of 400 million pictures",
        TrainCLIPConfig(
            _run(
                "runs/clip",
                steps=390_625,
                batch=32_768,
                learning_rate=5e-4,
                final_learning_rate=0.0,
                warm_up_steps=2000,
                beta2=0.98,
                epsilon=1e-6,
                weight_decay=0.2,
                average=0.999,
            ),
            clip.PRESETS["paper"],
        ),
    ),
}

PIXELS_PRESETS: dict[str, tuple[str, TrainPixelsConfig]] = {
    "bytes": (
        "16 x 16 pictures, each byte a token: 768 of them, 4 layers of 4 x 32; minutes on a CPU",
        TrainPixelsConfig(_run("runs/pixels", steps=3000, batch=8, learning_rate=3e-3, beta2=0.95, weight_decay=0.01)),
    ),
    "palette": (
        "24 x 24 pictures of 512 colours: 576 tokens, 4 layers of 4 x 32; minutes on a CPU",
        TrainPixelsConfig(
            _run("runs/pixels", steps=3000, batch=8, learning_rate=3e-3, beta2=0.95, weight_decay=0.01),
            pixels.PRESETS["palette"],
        ),
    ),
    "sparse-transformer": (
        "64 x 64 pictures, each byte a token, sized as in Child et al. 2019: there 3.44 bits a dimension on ImageNet",
        TrainPixelsConfig(
            _run(
                "runs/pixels",
                steps=560_000,
                batch=16,
                learning_rate=3.5e-4,
                final_learning_rate=0.0,
                warm_up_steps=5000,
                beta2=0.999,
                weight_decay=0.01,
                average=0.999,
            ),
            pixels.PRESETS["sparse-transformer"],
        ),
    ),
    "image-gpt": (
        "32 x 32 pictures of 512 colours, iGPT-S of Chen et al. 2020: there 2.09 nats a pixel on ImageNet",
        TrainPixelsConfig(
            _run(
                "runs/pixels",
                steps=1_000_000,
                batch=128,
                learning_rate=3e-3,
                final_learning_rate=0.0,
                warm_up_steps=10_000,
                beta2=0.95,
                weight_decay=0.01,
                average=0.999,
            ),
            pixels.PRESETS["image-gpt"],
        ),
    ),
}

PRIOR_PRESETS: dict[str, tuple[str, TrainPriorConfig]] = {
    name: (
        description,
        TrainPriorConfig(
            _run(
                "runs/prior",
                steps=5000,
                batch=64,
                learning_rate=1e-3,
                warm_up_steps=100,
                beta2=0.96,
                weight_decay=6e-2,
            ),
            Path("runs/clip"),
            prior.PRIORS[name],
        ),
    )
    for name, description in (
        ("diffusion", "CLIP's vector by diffusion, 4 layers of 2 x 64; minutes on a CPU"),
        ("autoregressive", "CLIP's vector by principal components, 4 layers of 2 x 64; minutes on a CPU"),
    )
}

DECODER_PRESETS: dict[str, tuple[str, TrainDecoderConfig | TrainPixelDecoderConfig]] = {
    "tokens": (
        "into the demo dVAE's 8 x 8 tokens, 4 layers of 2 x 64; minutes on a CPU",
        TrainDecoderConfig(
            _run(
                "runs/decoder", steps=3000, batch=16, optimizer="muon", learning_rate=2e-2, beta2=0.98, weight_decay=0.0
            ),
            Path("runs/clip"),
            Path("runs/dvae"),
            data=DataConfig(one_per_concept=True, pictures=300),
            cell_dropout=1.0,
        ),
    ),
    "pixels": (
        "into 32 x 32 pixels by diffusion, 4 layers of 2 x 64; minutes on a CPU",
        TrainPixelDecoderConfig(
            _run(
                "runs/decoder", steps=3000, batch=32, optimizer="muon", learning_rate=1e-2, beta2=0.98, weight_decay=0.0
            ),
            Path("runs/clip"),
        ),
    ),
    "pixels-large": (
        "into 64 x 64 pixels by diffusion, 12 layers of 8 x 64; hours on a GPU",
        TrainPixelDecoderConfig(
            _run("runs/decoder", steps=200_000, batch=128, learning_rate=3e-4, warm_up_steps=1000, average=0.9995),
            Path("runs/clip"),
            unclip.PIXEL_DECODERS["large"],
        ),
    ),
}
