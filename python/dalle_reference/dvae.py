"""Stage 1: a discrete VAE that turns a picture into a grid of tokens and back.

Encoder and decoder are those of Ramesh et al. 2021 (appendix A.2) and of the weights that OpenAI published: residual
blocks with a bottleneck, max-pool down, nearest-neighbour up. Between them stands one codebook lookup:

    features --1x1--> logits [N, K] --GumbelQuantizer--> latents [N, D] --decoder--> mu, log b of a logit-Laplace

The codebook is the weight of the decoder's first 1 x 1 convolution: a one-hot vector through a 1 x 1 convolution is a
row of its weight, plus its bias. Other quantizers stand in the same place: features of width D take their nearest code
(`vq`, `vq-ema`), or K = 2 ** d codes are the signs of features of width d, which one product widens (`lfq`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dalle_kernels import binary_quantize, logit_laplace_nll, vq_lookup
from dalle_kernels.nn import BinaryQuantizer, EMAVectorQuantizer, GumbelQuantizer, VectorQuantizer
from dalle_reference.errors import MOST_SIZE, require, require_positive
from dalle_reference.kmeans import lloyd, some_of
from dalle_reference.parallel import World

LOGIT_LAPLACE_EPS = 0.1
_FITTED, _PER_CODE, _ROUNDS, _SHARPNESS = 32_768, 4, 10, 8.0
"""Squares that `begin_with` fits codes to, at least so many a code, how often it moves them, and their squared distance
over the logits' scale."""
_LOOKED_AT = 400
"""Pictures that its layers are fitted to."""
COMMITMENT = 0.25
"""Weight of the features' distance to their codes against the codes' to them (van den Oord et al. 2017)."""
IDLE_BATCHES = 200
"""After so many batches in which nothing chose it, a code of vq-ema is put onto a feature."""


@dataclass(frozen=True)
class DVAEConfig:
    """The shape of a discrete VAE."""

    resolution: int = 64
    """Side of the pictures, in pixels; a multiple of patch * 2 ** (groups - 1)."""
    width: int = 256
    """Channels of the first group; group g has width * 2 ** g."""
    groups: int = 4
    """Groups of residual blocks; between two of them the side is halved."""
    blocks: int = 2
    """Residual blocks in a group."""
    patch: int = 1
    """Side of the squares of pixels that the first convolution takes as one position's channels, and the last gives
    back. Small networks learn faster with more than the paper's 1: nearest-neighbour up tells the pixels of a square
    apart only by what is around it."""
    vocab: int = 8192
    """Codes in the codebook."""
    code_width: int = 128
    """Width of a code."""
    quantizer: Literal["dvae", "vq", "vq-ema", "lfq"] = "dvae"
    """dvae: Gumbel-softmax relaxation; vq: nearest code with the straight-through gradient; vq-ema: the same with codes
    that are running means of their features; lfq: signs (look-up free), for a vocab that is a power of 2."""
    least_log_b: float | None = None
    """A smooth floor under log b. Drawings have areas of one exact colour, where the likelihood otherwise grows without
    bound and leaves no gradient for anything else; photographs need none."""

    def __post_init__(self) -> None:
        require_positive(
            self, "resolution", "width", "groups", "blocks", "patch", "vocab", "code_width", most=MOST_SIZE
        )
        require(self, "at most 16", lambda value: value <= 16, "groups")
        require(self, "at most 64", lambda value: value <= 64, "patch")
        require(self, "a finite number", math.isfinite, "least_log_b")
        if self.resolution % self.shrink:
            raise ValueError(
                f"resolution: got {self.resolution}, wanted a multiple of {self.shrink} for {self.groups} groups"
                f" and patches of {self.patch}"
            )
        if self.width % 4:
            raise ValueError(f"width: got {self.width}, wanted a multiple of 4 (the bottleneck is a quarter of it)")
        if self.quantizer not in ("dvae", "vq", "vq-ema", "lfq"):
            raise ValueError(f"quantizer: got {self.quantizer!r}, wanted 'dvae', 'vq', 'vq-ema' or 'lfq'")
        if self.quantizer == "lfq" and self.vocab not in {2**bits for bits in range(1, 21)}:
            raise ValueError(f"vocab: got {self.vocab}, wanted a power of 2 from 2 to 2 ** 20 for quantizer lfq")

    @property
    def shrink(self) -> int:
        """How many pixels' side one token covers."""
        return self.patch * 2 ** (self.groups - 1)

    @property
    def fitting_pictures(self) -> int:
        """How many training pictures `DiscreteVAE.begin_with` should have."""
        return max(_LOOKED_AT, _PER_CODE * self.vocab // (self.grid[0] * self.grid[1]))

    @property
    def scores(self) -> int:
        """Numbers that the encoder gives for each token: logits, features, or features to take the signs of."""
        return {"dvae": self.vocab, "lfq": self.vocab.bit_length() - 1}.get(self.quantizer, self.code_width)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        side = self.resolution // self.shrink
        return side, side


PRESETS = {
    "tiny": DVAEConfig(resolution=16, width=8, groups=2, blocks=1, vocab=32, code_width=8),
    "demo": DVAEConfig(
        resolution=32, width=192, groups=1, blocks=2, patch=4, vocab=2048, code_width=64, least_log_b=-1.0
    ),
    "codes": DVAEConfig(
        resolution=32,
        width=192,
        groups=1,
        blocks=2,
        patch=4,
        vocab=65536,
        code_width=48,
        quantizer="vq-ema",
        least_log_b=-1.0,
    ),
    "small": DVAEConfig(resolution=64, width=64, groups=3, blocks=2, vocab=1024, code_width=128, least_log_b=-2.0),
    "paper": DVAEConfig(resolution=256, width=256, groups=4, blocks=2, vocab=8192, code_width=128),
}


class DVAEOutput(NamedTuple):
    """What one training pass yields.

    Attributes:
        nll: 0-dim, reconstruction in nats per pixel and channel.
        kl: 0-dim, KL to the uniform distribution over codes in nats per pixel and channel; 0 but for dvae.
        distance: 0-dim, the codebook's mean squared distance to its features (where a gradient moves it), and a quarter
            of the features' to their codes; 0 for dvae.
        entropy: 0-dim, in nats: the tokens' mean entropy less that of the batch's mean distribution; 0 but for lfq.
        indices: int64 [B, h, w], the sampled codes.
        pictures: [B, 3, S, S] in 0..1, the reconstruction's location; carries no gradient.
    """

    nll: torch.Tensor
    kl: torch.Tensor
    distance: torch.Tensor
    entropy: torch.Tensor
    indices: torch.Tensor
    pictures: torch.Tensor


def _conv(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.normal_(conv.weight, std=1.0 / math.sqrt(inputs * kernel**2))
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


class Block(nn.Module):
    """x + gain * conv(relu(conv(relu(...)))): four convolutions through a bottleneck of a quarter of the width.

    Args:
        inputs, outputs: channels.
        kernels: the four convolutions' sizes: 3, 3, 3, 1 in the encoder, 1, 3, 3, 3 in the decoder.
        gain: 1 / layers ** 2, which keeps the sum of all blocks small at the start.
    """

    def __init__(self, inputs: int, outputs: int, kernels: tuple[int, ...], gain: float) -> None:
        super().__init__()
        hidden = outputs // 4
        widths = [inputs, *[hidden] * (len(kernels) - 1), outputs]
        self.gain = gain
        self.skip = _conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.convolutions = nn.ModuleList(
            _conv(before, after, kernel) for before, after, kernel in zip(widths[:-1], widths[1:], kernels, strict=True)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = x
        for convolution in self.convolutions:
            inner = convolution(F.relu(inner))
        return torch.add(self.skip(x), inner, alpha=self.gain)


class Encoder(nn.Module):
    """Pictures [B, 3, S, S] -> features [B, width * 2 ** (groups - 1), h, w]; the last activation is a ReLU."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        gain = 1.0 / (config.groups * config.blocks) ** 2
        self.patch = config.patch
        self.stem = _conv(3 * config.patch**2, config.width, 7 if config.patch == 1 else 1)
        self.groups = nn.ModuleList()
        inputs = config.width
        for group in range(config.groups):
            outputs = config.width * 2**group
            blocks = [Block(inputs if b == 0 else outputs, outputs, (3, 3, 3, 1), gain) for b in range(config.blocks)]
            self.groups.append(nn.Sequential(*blocks))
            inputs = outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(F.pixel_unshuffle(x, self.patch))
        for index, group in enumerate(self.groups):
            x = group(F.max_pool2d(x, 2) if index else x)
        return F.relu(x)


class Decoder(nn.Module):
    """Latents [B, code_width, h, w] -> [B, 6, S, S]: mu and log b of the three channels."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        gain = 1.0 / (config.groups * config.blocks) ** 2
        self.groups = nn.ModuleList()
        inputs = config.code_width
        for group in reversed(range(config.groups)):
            outputs = config.width * 2**group
            blocks = [Block(inputs if b == 0 else outputs, outputs, (1, 3, 3, 3), gain) for b in range(config.blocks)]
            self.groups.append(nn.Sequential(*blocks))
            inputs = outputs
        self.patch = config.patch
        self.head = _conv(inputs, 6 * config.patch**2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, group in enumerate(self.groups):
            x = group(F.interpolate(x, scale_factor=2.0, mode="nearest") if index else x)
        return F.pixel_shuffle(self.head(F.relu(x)), self.patch)


class DiscreteVAE(nn.Module):
    """Pictures to tokens and back.

    Sources: Ramesh et al. 2021, section 2.1 and appendix A; van den Oord et al. 2017 (vq, vq-ema); Yu et al. 2024
    (lfq).

    Args:
        config: the shape.

    Example:
        >>> model = DiscreteVAE(PRESETS["tiny"])
        >>> tokens = model.encode(torch.rand(2, 3, 16, 16))
        >>> tokens.shape, model.decode(tokens).shape
        (torch.Size([2, 8, 8]), torch.Size([2, 3, 16, 16]))
    """

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        features = config.width * 2 ** (config.groups - 1)
        self.to_scores = nn.Linear(features, config.scores)
        nn.init.normal_(self.to_scores.weight, std=1.0 / math.sqrt(features))
        nn.init.zeros_(self.to_scores.bias)
        # Its codes begin with deviation 1 / sqrt(code_width). OpenAI's scale for this convolution is 1 / sqrt(vocab),
        # with which mixtures start far below the decoder's own scale.
        self.quantizer: GumbelQuantizer | VectorQuantizer | EMAVectorQuantizer | BinaryQuantizer
        if config.quantizer == "lfq":
            self.quantizer = BinaryQuantizer(config.scores)
            self.widen = nn.Linear(config.scores, config.code_width, bias=False)
            nn.init.normal_(self.widen.weight, std=1.0 / math.sqrt(config.scores))
        else:
            kinds = {"dvae": GumbelQuantizer, "vq": VectorQuantizer, "vq-ema": EMAVectorQuantizer}
            self.quantizer = kinds[config.quantizer](config.vocab, config.code_width)
        self.code_bias = nn.Parameter(torch.zeros(config.code_width))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def scores(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, S, S] in 0..1 -> `DVAEConfig.scores` numbers a token, [B * h * w, K] for dvae, contiguous.

        Features in channels-last order are already the rows of the table, so the 1 x 1 convolution is one product and
        its result needs no rearranging.
        """
        features = self.encoder(_squeeze(images).contiguous(memory_format=torch.channels_last))
        rows = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
        return F.linear(rows, self.to_scores.weight, self.to_scores.bias)

    @torch.no_grad()
    def begin_with(self, images: torch.Tensor, seed: int) -> None:
        """Makes the beginning one in which codes mean something: k-means finds them, least squares the way to and fro.

        A code is a typical square of pixels, of those that one token covers. The encoder's last layer becomes the one
        that tells which code is nearest to the square that it has seen, the decoder's last layer the one that draws
        it; what lies between is left as it is. From a random beginning encoder and decoder have to find a language
        together: on few pictures they agree on a dozen words and stay with them. One group has all of a square before
        it; where pooling lies between, the beginning is as good as what that lets through.

        Args:
            images: [N, 3, S, S] in 0..1, some hundreds of the training pictures; for many codes, `fitting_pictures`.
            seed: of which squares k-means begins with.
        """
        config, chance = self.config, torch.Generator().manual_seed(seed)
        if isinstance(self.quantizer, BinaryQuantizer):
            raise ValueError("quantizer: got 'lfq', wanted 'dvae', 'vq' or 'vq-ema', whose codes can be given")

        def squares_of(images: torch.Tensor) -> torch.Tensor:
            return F.pixel_unshuffle(images, config.shrink).permute(0, 2, 3, 1).flatten(0, 2)

        different = squares_of(images).unique(dim=0)
        different = some_of(different, min(len(different), max(_FITTED, _PER_CODE * config.vocab)), chance)
        codes = lloyd(different, some_of(different, config.vocab, chance), _ROUNDS)
        spread = (different - vq_lookup(different, codes)[0]).square().sum(dim=1).mean().clamp(min=1e-4) / _SHARPNESS
        images = images[:: max(1, len(images) // _LOOKED_AT)]
        features = self.encoder(_squeeze(images).contiguous(memory_format=torch.channels_last))
        weight, bias = _least_squares(features.permute(0, 2, 3, 1).flatten(0, 2), squares_of(images))
        mean = codes.mean(dim=0)
        axes = torch.linalg.svd(codes - mean, full_matrices=False).Vh[: config.code_width]
        table = F.pad((codes - mean) @ axes.T, (0, config.code_width - len(axes)))
        scale = table.square().sum(dim=1).mean().rsqrt()
        if not isinstance(self.quantizer, GumbelQuantizer):
            to_table = F.pad(axes.T * scale, (0, config.code_width - len(axes))).T
            self.to_scores.weight.copy_(to_table @ weight)
            self.to_scores.bias.copy_(to_table @ (bias - mean))
        else:  # the logit of a code is its squared distance to the square, less what all codes share
            self.to_scores.weight.copy_(codes @ weight / spread)
            self.to_scores.bias.copy_((codes @ bias - codes.square().sum(dim=1) / 2) / spread)
        self.quantizer.codebook.copy_(table * scale)
        if isinstance(self.quantizer, EMAVectorQuantizer):
            self.quantizer.counts.fill_(1.0)  # so that no code is dead yet, nor is the first feature's own

        seen: list[torch.Tensor] = []
        hook = self.decoder.head.register_forward_hook(lambda module, given, out: seen.append(given[0]))
        self.decode(self.encode(images))
        hook.remove()
        wanted = F.pixel_unshuffle(torch.logit(_squeeze(images)), config.patch).permute(0, 2, 3, 1).flatten(0, 2)
        drawn_from = seen[0].permute(0, 2, 3, 1).flatten(0, 2)
        weight, bias = _least_squares(drawn_from, wanted)
        error = (F.linear(drawn_from, weight, bias) - wanted).abs().mean()
        self.decoder.head.weight.zero_()
        self.decoder.head.weight[: len(weight)].copy_(weight[:, :, None, None])
        assert self.decoder.head.bias is not None
        self.decoder.head.bias.copy_(torch.cat([bias, error.log().expand_as(bias)]))

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """The most likely tokens of pictures in 0..1: [B, 3, S, S] -> int64 [B, h, w]."""
        scores = self.scores(images)
        match self.quantizer:
            case GumbelQuantizer():
                indices = scores.argmax(dim=1)
            case BinaryQuantizer():
                indices = binary_quantize(scores)[1]
            case _:
                indices = vq_lookup(scores, self.quantizer.codebook)[1]
        return indices.reshape(len(images), *self.config.grid)

    @torch.no_grad()
    def decode(self, indices: torch.Tensor) -> torch.Tensor:
        """Pictures in 0..1 of tokens: int64 [B, h, w] -> [B, 3, S, S]; or of n panels, n h rows -> n S."""
        if isinstance(self.quantizer, BinaryQuantizer):
            latents = self.widen(self.quantizer.latents(indices))
        else:
            latents = F.embedding(indices, self.quantizer.codebook)
        latents = latents.reshape(-1, self.config.code_width)
        return _unsqueeze(torch.sigmoid(self._decode(latents, len(indices))[:, :3].float()))

    def _decode(self, latents: torch.Tensor, batch: int) -> torch.Tensor:
        width = self.config.grid[1]
        grid = (latents + self.code_bias).reshape(batch, -1, width, self.config.code_width).permute(0, 3, 1, 2)
        return self.decoder(grid)

    def forward(
        self, images: torch.Tensor, temperature: float, seed: int, first: int = 0, world: World | None = None
    ) -> DVAEOutput:
        """One training pass.

        Args:
            images: [B, 3, S, S] in 0..1.
            temperature: of the relaxation, above 0; dvae alone looks at it.
            seed: of the Gumbel noise, which there is in training mode only.
            first: the place of the first picture in its batch, by which pictures have the noise that they have in the
                whole of it.
            world: the processes that share the batch, whose features EMA codes follow and entropies are taken of.

        Raises:
            ValueError: for pictures of another size than the configuration's.
        """
        side = self.config.resolution
        if images.shape[1:] != (3, side, side):
            raise ValueError(f"images: got shape {tuple(images.shape)}, wanted [B, 3, {side}, {side}]")
        scores = self.scores(images)
        kl = distance = entropy = scores.new_zeros((), dtype=torch.float32)
        world = world or World(images.device)
        match self.quantizer:
            case GumbelQuantizer():
                cells = self.config.grid[0] * self.config.grid[1]
                latents, indices, row_kl = self.quantizer(scores, temperature, seed, row_offset=first * cells)
                kl = row_kl.sum() / images.numel()
            case VectorQuantizer():
                latents, indices, codebook_loss, commitment_loss = self.quantizer(scores)
                distance = codebook_loss + COMMITMENT * commitment_loss
            case EMAVectorQuantizer():
                latents, indices, _, commitment_loss = self.quantizer(
                    scores, dist.all_reduce if world.size > 1 else None
                )
                distance = COMMITMENT * commitment_loss
                if self.training:
                    pool = scores.detach() if world.size == 1 else world.gather_differentiably(scores.detach())
                    self.quantizer.revive(pool, IDLE_BATCHES, torch.Generator().manual_seed(seed))
            case BinaryQuantizer():
                batch = world.gather_differentiably if world.size > 1 else None
                signs, indices, commitment_loss, entropy = self.quantizer(scores, batch)
                latents, distance = self.widen(signs), COMMITMENT * commitment_loss
        maps = self._decode(latents, len(images)).float()
        mu, log_b = maps.chunk(2, dim=1)
        if self.config.least_log_b is not None:
            log_b = F.softplus(log_b - self.config.least_log_b) + self.config.least_log_b
        pixels = _squeeze(images).float()
        return DVAEOutput(
            nll=logit_laplace_nll(pixels, mu, log_b).mean(),
            kl=kl,
            distance=distance,
            entropy=entropy,
            indices=indices.reshape(len(images), *self.config.grid),
            pictures=_unsqueeze(torch.sigmoid(mu.detach())),
        )


def _least_squares(inputs: torch.Tensor, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [O, I] and bias [O] of the linear layer that is nearest to taking inputs [N, I] to outputs [N, O]."""
    rows = F.pad(inputs.double(), (0, 1), value=1.0)
    moments = rows.T @ rows
    moments += 1e-6 * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    solved = torch.linalg.solve(moments, rows.T @ outputs.double()).T.to(inputs.dtype)
    return solved[:, :-1], solved[:, -1]


def _squeeze(x: torch.Tensor) -> torch.Tensor:
    """0..1 -> eps..1 - eps, where the logit is finite."""
    return (1.0 - 2.0 * LOGIT_LAPLACE_EPS) * x + LOGIT_LAPLACE_EPS


def _unsqueeze(x: torch.Tensor) -> torch.Tensor:
    return ((x - LOGIT_LAPLACE_EPS) / (1.0 - 2.0 * LOGIT_LAPLACE_EPS)).clamp(0.0, 1.0)
