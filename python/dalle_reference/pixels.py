"""Pixels as tokens: the Sparse Transformer on pictures (Child et al. 2019) and Image GPT (Chen et al. 2020).

A picture is a line of tokens, and a causal transformer predicts each from those before it. It is the second stage of
DALL-E with an empty caption and no first stage; what differs is what a token is.

    bytes     a pixel's red, green and blue are three tokens of 256, on a grid of S rows and 3 S columns. The loss is
              the likelihood of the picture itself, in bits a dimension: what a lossless compressor would need
              (Child et al. 2019, section 7.1)
    palette   a pixel is one token, the nearest of 512 colours, which k-means has found: a third of the length
              (Chen et al. 2020, section 3.1)

With the schedule "rowcol" a layer looks at the row, the next at the column, then two at the row: what the Sparse
Transformer calls local and strided, with a stride of one row. A picture whose top half is given is completed by drawing
the rest, token by token.

Image GPT was trained with BERT's objective too: some tokens of a picture are hidden, every token sees all the others,
before and after, and the hidden ones are predicted where they stand (Chen et al. 2020, section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_kernels import MaskPattern, vq_lookup
from dalle_reference.errors import MOST_SIZE, require, require_positive
from dalle_reference.generate import generate
from dalle_reference.kmeans import lloyd, some_of
from dalle_reference.transformer import NO_TOKEN, DalleTransformer, TransformerConfig

_SAMPLED = 1 << 16
"""Pixels that a palette is fitted to."""
_ROUNDS = 20
_HIDDEN = 0.15
"""Share of a picture's tokens that BERT's objective hides; exactly, so that each picture weighs the same."""


@dataclass(frozen=True)
class PixelConfig:
    """The shape of a `PixelTransformer`; the defaults are the demo's."""

    resolution: int = 16
    """Side of the pictures, in pixels."""
    colours: int = 0
    """Colours of the palette; 0: no palette, each byte of a pixel is a token."""
    layers: int = 4
    """Blocks."""
    heads: int = 4
    """Attention heads."""
    head_dim: int = 32
    """Width of one head; the model's width is heads x head_dim."""
    schedule: Literal["dalle", "rowcol", "strided", "fixed", "causal"] = "rowcol"
    """What each layer sees; `TransformerConfig.schedule` explains."""
    objective: Literal["next", "bert"] = "next"
    """next: each token is predicted from those before. bert: hidden ones from all others, whatever the schedule."""

    def __post_init__(self) -> None:
        require_positive(self, "resolution", most=MOST_SIZE)
        wanted = "0 (bytes), or 2 to 65536 colours"
        require(self, wanted, lambda value: value == 0 or 2 <= value <= 65536, "colours")
        if self.objective not in ("next", "bert"):
            raise ValueError(f"objective: got {self.objective!r}, wanted 'next' or 'bert'")
        _ = self.transformer  # which checks the rest

    @property
    def transformer(self) -> TransformerConfig:
        """The transformer of such tokens: a caption of nothing, and a grid of bytes or pixels."""
        columns = self.resolution if self.colours else 3 * self.resolution
        return TransformerConfig(
            vocab_text=1,
            text_length=2,
            grid=(self.resolution, columns),
            vocab_image=self.colours or 256,
            layers=self.layers,
            heads=self.heads,
            head_dim=self.head_dim,
            schedule=self.schedule,
        )


PRESETS = {
    "tiny": PixelConfig(resolution=8, layers=2, heads=2, head_dim=16),
    "bytes": PixelConfig(),
    "palette": PixelConfig(resolution=24, colours=512),
    # ImageNet-64 (Child et al. 2019, section 7.3) and iGPT-S (Chen et al. 2020, section 3.3).
    "sparse-transformer": PixelConfig(resolution=64, layers=48, heads=16, head_dim=32),
    "image-gpt": PixelConfig(resolution=32, colours=512, layers=24, heads=8, head_dim=64, schedule="causal"),
}


class PixelTransformer(nn.Module):
    """A likelihood of pictures, pixel by pixel.

    Attributes:
        palette: float32 [colours, 3] in 0..1, for a model that has one; `fit_palette` finds it.

    Example:
        >>> model = PixelTransformer(PRESETS["tiny"])
        >>> pictures = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
        >>> model.loss(pictures).backward()
        >>> model.complete(pictures, rows=4, number=3, seed=0).shape
        torch.Size([2, 3, 3, 8, 8])
    """

    palette: Tensor

    def __init__(self, config: PixelConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = DalleTransformer(config.transformer)
        self.transformer.text_head = nn.Identity()  # no caption to predict
        if config.objective == "bert":
            everything = MaskPattern(np.ones((config.transformer.layout.length,) * 2, dtype=bool))
            for block in self.transformer.layers:
                block.attention.pattern = everything
        self.register_buffer("palette", torch.zeros(config.colours, 3))

    def encode(self, pictures: Tensor) -> Tensor:
        """Tokens of pictures: uint8 [B, 3, S, S] -> int64 [B, S * S], or [B, S * 3 S] where each byte is one."""
        side = self.config.resolution
        if pictures.dtype != torch.uint8 or pictures.shape[1:] != (3, side, side):
            got = f"{pictures.dtype} {tuple(pictures.shape)}"
            raise ValueError(f"pictures: got {got}, wanted torch.uint8 [B, 3, {side}, {side}]")
        pixels = pictures.permute(0, 2, 3, 1)
        if not self.config.colours:
            return pixels.flatten(1).long()
        return vq_lookup(pixels.reshape(-1, 3).float() / 255.0, self.palette)[1].reshape(len(pictures), -1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Pictures in 0..1 of tokens: int64 [B, L] -> float32 [B, 3, S, S]."""
        pixels = self.palette[tokens] if self.config.colours else tokens.float() / 255.0
        side = self.config.resolution
        return pixels.reshape(-1, side, side, 3).permute(0, 3, 1, 2)

    def hide(self, chances: Iterable[np.random.Generator]) -> Tensor | None:
        """The tokens that BERT's objective hides, int64 [B, n], by a generator for each picture; None without it."""
        if self.config.objective == "next":
            return None
        length = self.config.transformer.image_length
        count = max(1, round(_HIDDEN * length))
        return torch.stack([torch.from_numpy(chance.permutation(length)[:count]) for chance in chances])

    def loss(self, pictures: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of pictures' tokens, in nats a token.

        Args:
            pictures: uint8 [B, 3, S, S].
            hidden: what `hide` draws: with BERT's objective int64 [B, n], the tokens that alone are predicted.
        """
        if (hidden is None) != (self.config.objective == "next"):
            got = "None" if hidden is None else "tokens"
            raise ValueError(f"hidden: got {got} with objective {self.config.objective!r}, wanted what `hide` draws")
        tokens = self.encode(pictures)
        nothing = tokens.new_empty(len(tokens), 0)
        if hidden is None:
            return self.transformer.loss(nothing, tokens).image
        found = self.transformer.hidden(nothing, tokens.scatter(1, hidden, NO_TOKEN))
        cells = found[:, self.config.transformer.text_length :]
        logits = self.transformer.image_head(cells.take_along_dim(hidden[..., None], dim=1))
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens.gather(1, hidden).flatten())

    @torch.no_grad()
    def complete(self, pictures: Tensor, rows: int, *, seed: int, number: int = 1, temperature: float = 1.0) -> Tensor:
        """Draws what is below the first `rows` rows of pixels, `number` times for each picture.

        Args:
            pictures: uint8 [B, 3, S, S], of which the rest is not looked at.

        Returns:
            [B, number, 3, S, S] in 0..1.
        """
        if self.config.objective == "bert":
            raise ValueError("objective: got 'bert', wanted 'next': only that says what follows")
        if not 0 <= rows <= self.config.resolution:
            raise ValueError(f"rows: got {rows}, wanted 0 to {self.config.resolution}")
        given = self.encode(pictures)[:, : rows * self.transformer.config.grid[1]]
        nothing = given.new_empty(len(given), 0)
        drawn = generate(
            self.transformer, nothing, seed=seed, number=number, temperature=temperature, image_prefix=given
        )
        return self.decode(drawn).unflatten(0, (len(given), number))


def bits_per_dimension(nats: float) -> float:
    """Of a loss in nats a byte, which is one dimension."""
    return nats / math.log(2.0)


def fit_palette(pictures: Tensor, colours: int, seed: int) -> Tensor:
    """The colours that stand for those of pictures with the least squared error: Lloyd's algorithm.

    It begins with colours that occur; one that no pixel is nearest to moves to the pixel that is worst served.

    Args:
        pictures: uint8 [N, 3, S, S]; 65,536 of their pixels are looked at.
        colours: K.
        seed: of which pixels those are, and of the beginning.

    Returns:
        float32 [K, 3] in 0..1; the same on any number of threads.
    """
    chance = torch.Generator().manual_seed(seed)
    pixels = pictures.permute(0, 2, 3, 1).reshape(-1, 3)
    pixels = pixels[torch.randint(len(pixels), (_SAMPLED,), generator=chance)].float() / 255.0
    return lloyd(pixels, some_of(pixels.unique(dim=0), colours, chance), _ROUNDS)
