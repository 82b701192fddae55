"""unCLIP, which is DALL-E 2: from a caption to CLIP's vector of a picture, and from there to the picture
(Ramesh et al. 2022).

    caption --CLIP--> caption's vector --prior--> picture's vector --decoder--> picture

CLIP's vector of a picture says what it shows, not where each line is: the decoder has to make that up, so one vector
gives many pictures (variations), and what lies between two vectors gives pictures between two pictures.

The priors are in `prior`. Of decoders there are two: `DalleTransformer`, given the vector as its `latent`, draws the
dVAE's tokens (`TokenDecoder`); or `PixelDecoder`, a diffusion model, draws the pixels themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_kernels import MaskPattern
from dalle_reference.diffusion import add_noise, sample, time_features
from dalle_reference.dvae import DiscreteVAE
from dalle_reference.errors import MOST_SIZE, require, require_positive
from dalle_reference.generate import generate
from dalle_reference.transformer import LATENT_TOKENS, Block, DalleTransformer, TransformerConfig


def decoder_config(embedding: int, grid: tuple[int, int], vocab: int, layers: int, heads: int) -> TransformerConfig:
    """A decoder into the tokens of a dVAE: no caption, the vector in its place."""
    return TransformerConfig(
        vocab_text=1,
        text_length=1 + LATENT_TOKENS,
        grid=grid,
        vocab_image=vocab,
        layers=layers,
        heads=heads,
        latent=embedding,
    )


TOKEN_DECODER = decoder_config(128, (8, 8), 2048, layers=4, heads=2)
"""The demo's."""


class TokenDecoder:
    """Draws pictures of vectors as tokens of a dVAE.

    Args:
        transformer: trained with CLIP's vectors as its latents.
        dvae: whose tokens it draws.
        temperature: of the draws, as in `sample_tokens`.
    """

    def __init__(self, transformer: DalleTransformer, dvae: DiscreteVAE, temperature: float) -> None:
        self.transformer, self.dvae, self.temperature = transformer, dvae, temperature
        self.embedding = transformer.config.latent

    def draw_tokens(self, vectors: Tensor, *, seed: int, guidance_scale: float = 1.0) -> Tensor:
        """Tokens int64 [B, H * W] of vectors [B, embedding]."""
        nothing = torch.empty(len(vectors), 0, dtype=torch.int64, device=vectors.device)
        return generate(
            self.transformer,
            nothing,
            seed=seed,
            temperature=self.temperature,
            guidance_scale=guidance_scale,
            latents=vectors,
        )

    def draw(self, vectors: Tensor, *, seed: int, guidance_scale: float = 1.0) -> Tensor:
        """Pictures in 0..1 of vectors [B, embedding]: [B, 3, S, S]."""
        tokens = self.draw_tokens(vectors, seed=seed, guidance_scale=guidance_scale)
        return self.dvae.decode(tokens.unflatten(1, self.transformer.config.grid))


@dataclass(frozen=True)
class PixelDecoderConfig:
    """The shape of a `PixelDecoder`; the defaults are the demo's."""

    embedding: int = 128
    """Width of CLIP's vectors."""
    resolution: int = 32
    """Side of the pictures, in pixels."""
    patch: int = 4
    """Side of a patch, which is one token."""
    layers: int = 4
    """Blocks."""
    heads: int = 2
    """Attention heads."""
    head_dim: int = 64
    """Width of one head."""
    noise_steps: int = 64
    """From noise to picture."""

    def __post_init__(self) -> None:
        sizes = ("embedding", "resolution", "patch", "layers", "heads", "head_dim", "noise_steps")
        require_positive(self, *sizes, most=MOST_SIZE)
        require(self, f"a divisor of the resolution {self.resolution}", lambda p: self.resolution % p == 0, "patch")


PIXEL_DECODERS = {"demo": PixelDecoderConfig(), "large": PixelDecoderConfig(resolution=64, layers=12, heads=8)}


class PixelDecoder(nn.Module):
    """Draws a picture of a vector by diffusion in pixels: a transformer over patches that predicts the clean ones.

    The vector is added to the time, and stands before the patches as four tokens (section 2.1).
    """

    def __init__(self, config: PixelDecoderConfig) -> None:
        super().__init__()
        self.config, self.embedding = config, config.embedding
        blocks = TransformerConfig(layers=config.layers, heads=config.heads, head_dim=config.head_dim)
        width, length = blocks.width, LATENT_TOKENS + (config.resolution // config.patch) ** 2
        self.patch_in = nn.Conv2d(3, width, config.patch, stride=config.patch)
        self.vector_in = nn.Linear(config.embedding, LATENT_TOKENS * width, bias=False)
        self.vector_to_time = nn.Linear(config.embedding, width, bias=False)
        self.time_in = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        everything = MaskPattern(np.ones((length, length), dtype=bool))
        self.blocks = nn.ModuleList(Block(everything, blocks) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 3 * config.patch**2)

    def predict(self, vectors: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        """The pictures in -1..1 that `noised` [B, 3, S, S] at t [B] come from; vectors of zeros are none."""
        told = vectors * self.config.embedding**0.5
        patches = self.patch_in(noised).flatten(2).transpose(1, 2)
        time = self.time_in(time_features(t, patches.shape[-1])) + self.vector_to_time(told)
        said = self.vector_in(told).unflatten(1, (LATENT_TOKENS, -1))
        x = torch.cat([said, patches], dim=1) + self.position + time[:, None]
        for block in self.blocks:
            x = block(x)
        pixels = self.out(self.norm(x[:, LATENT_TOKENS:])).transpose(1, 2)
        return F.fold(pixels.float(), self.config.resolution, self.config.patch, stride=self.config.patch)

    def loss(self, vectors: Tensor, pictures: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of pictures that are predicted from noised ones.

        Args:
            vectors: float32 [B, embedding], CLIP's of them; zeros for none.
            pictures: [B, 3, S, S] in 0..1.
            t: [B], even in 0..1.
            noise: [B, 3, S, S], normal.
        """
        x = 2.0 * pictures - 1.0
        return F.mse_loss(self.predict(vectors, add_noise(x, noise, t), t), x)

    @torch.no_grad()
    def draw(self, vectors: Tensor, *, seed: int, guidance_scale: float = 1.0) -> Tensor:
        """Pictures in 0..1 of vectors [B, embedding]: [B, 3, S, S]."""

        def predict(x: Tensor, t: Tensor) -> Tensor:
            told = self.predict(vectors, x, t)
            if guidance_scale != 1.0:
                untold = self.predict(torch.zeros_like(vectors), x, t)
                told = untold + guidance_scale * (told - untold)
            return told.clamp(-1.0, 1.0)

        shape = (len(vectors), 3, self.config.resolution, self.config.resolution)
        x = sample(predict, shape, steps=self.config.noise_steps, seed=seed, device=vectors.device)
        return (x + 1.0) / 2.0


def between(first: Tensor, second: Tensor, steps: int) -> Tensor:
    """Unit vectors on the arc from one to another [embedding], both included: [steps, embedding] (section 3.2)."""
    angle = torch.arccos((first * second).sum().clamp(-1.0, 1.0))
    share = torch.linspace(0.0, 1.0, steps, device=first.device)[:, None]
    if angle < 1e-4:
        return F.normalize(torch.lerp(first, second, share), dim=-1)
    return (((1.0 - share) * angle).sin() * first + (share * angle).sin() * second) / angle.sin()
