"""unCLIP's priors: from a caption to CLIP's vector of a picture of it (Ramesh et al. 2022, section 2.2).

Both of the paper's kinds read the caption's tokens and its vector; dropping both in a tenth of the training makes them
drawable with classifier-free guidance.

    diffusion        a causal transformer over [caption, caption's vector, time, noised vector, query] whose last output
                     is the vector without noise; two are drawn, and the one that agrees more with the caption is kept
    autoregressive   the vector's principal components as tokens, a bucket each, which a `DalleTransformer` with a grid
                     of one row predicts; a token before the caption says how well vector and caption agree, so that
                     agreement can be asked for
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_kernels import Causal, TokenLayout
from dalle_reference.diffusion import add_noise, sample, time_features
from dalle_reference.errors import MOST_SIZE, require, require_positive
from dalle_reference.generate import generate
from dalle_reference.transformer import LATENT_TOKENS, NO_TOKEN, Block, DalleTransformer, TransformerConfig


@dataclass(frozen=True)
class PriorConfig:
    """The shape of a prior; the defaults are the demo's."""

    kind: Literal["diffusion", "autoregressive"] = "diffusion"
    """How the vector is drawn."""
    embedding: int = 128
    """Width of CLIP's vectors."""
    vocab_text: int = 2048
    """Caption tokens, as CLIP has them."""
    text_length: int = 32
    """Most tokens of a caption, as CLIP has it."""
    layers: int = 4
    """Blocks."""
    heads: int = 2
    """Attention heads."""
    head_dim: int = 64
    """Width of one head."""
    noise_steps: int = 64
    """diffusion: from noise to vector."""
    components: int = 32
    """autoregressive: principal components that are kept."""
    buckets: int = 32
    """autoregressive: of each component, and of the agreement with the caption; equally full."""

    def __post_init__(self) -> None:
        sizes = ("embedding", "vocab_text", "text_length", "layers", "heads", "head_dim", "components")
        require_positive(self, *sizes, "noise_steps", most=MOST_SIZE)
        require(self, "2 to 65536", lambda value: 2 <= value <= 65536, "buckets")
        require(self, f"at most the embedding, {self.embedding}", lambda value: value <= self.embedding, "components")
        if self.kind not in ("diffusion", "autoregressive"):
            raise ValueError(f"kind: got {self.kind!r}, wanted 'diffusion' or 'autoregressive'")


class DiffusionPrior(nn.Module):
    """Draws CLIP's vector of a picture for a caption, by diffusion; the module's text explains.

    Vectors are diffused less their mean and in units of their deviation, which `fit` finds.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        blocks = TransformerConfig(layers=config.layers, heads=config.heads, head_dim=config.head_dim)
        width, length = blocks.width, config.text_length
        self.register_buffer("mean", torch.zeros(config.embedding))
        self.register_buffer("deviation", torch.ones(()))
        # Row vocab_text + p stands where no caption token does.
        self.text_embedding = nn.Embedding(config.vocab_text + length, width)
        self.vector_in = nn.Linear(config.embedding, width, bias=False)
        self.time_in = nn.Linear(width, width)
        self.noised_in = nn.Linear(config.embedding, width)
        self.position = nn.Parameter(torch.empty(length + 4, width))
        causal = Causal(TokenLayout(length + 3, (1, 1)))
        self.blocks = nn.ModuleList(Block(causal, blocks) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, config.embedding)
        nn.init.normal_(self.text_embedding.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)

    def fit(self, captions: Tensor, pictures: Tensor) -> None:
        """Takes mean and deviation from training vectors [N, embedding]."""
        self.mean.copy_(pictures.mean(dim=0))
        self.deviation.copy_((pictures - self.mean).square().mean().sqrt())

    def predict(self, tokens: Tensor, captions: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        """The vectors, in the diffusion's units, that `noised` [B, embedding] at t [B] come from."""
        config = self.config
        tokens = F.pad(tokens, (0, config.text_length - tokens.shape[1]), value=NO_TOKEN)
        fillers = torch.arange(config.vocab_text, config.vocab_text + config.text_length, device=tokens.device)
        text = self.text_embedding(torch.where(tokens < 0, fillers, tokens))
        said = self.vector_in(captions * config.embedding**0.5)
        time = self.time_in(time_features(t, text.shape[-1]))
        query = torch.zeros_like(time)  # has its position alone
        x = torch.cat([text, torch.stack([said, time, self.noised_in(noised), query], dim=1)], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x[:, -1]))

    def loss(self, tokens: Tensor, captions: Tensor, pictures: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of the vectors that are predicted from noised ones.

        Args:
            tokens: int64 [B, n <= text_length], `NO_TOKEN` after a caption's end; all `NO_TOKEN` for none.
            captions: float32 [B, embedding], CLIP's vectors of them; zeros for none.
            pictures: float32 [B, embedding], CLIP's vectors of the pictures.
            t: [B], even in 0..1.
            noise: [B, embedding], normal.
        """
        x = (pictures - self.mean) / self.deviation
        return F.mse_loss(self.predict(tokens, captions, add_noise(x, noise, t), t).float(), x)

    @torch.no_grad()
    def draw(
        self, tokens: Tensor, captions: Tensor, *, seed: int, guidance_scale: float = 1.0, among: int = 2
    ) -> Tensor:
        """A picture's vector for each caption, the best of `among`: unit vectors, float32 [B, embedding]."""
        tokens, many = tokens.repeat(among, 1), captions.repeat(among, 1)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            told = self.predict(tokens, many, x, t).float()
            if guidance_scale == 1.0:
                return told
            untold = self.predict(torch.full_like(tokens, NO_TOKEN), torch.zeros_like(many), x, t).float()
            return untold + guidance_scale * (told - untold)

        x = sample(predict, tuple(many.shape), steps=self.config.noise_steps, seed=seed, device=many.device)
        drawn = F.normalize(self.mean + self.deviation * x, dim=-1).unflatten(0, (among, -1))
        best = (drawn * captions).sum(dim=-1).argmax(dim=0)
        return drawn[best, torch.arange(len(captions), device=best.device)]


class AutoregressivePrior(nn.Module):
    """Draws CLIP's vector of a picture for a caption, component by component; the module's text explains.

    The stream is [start, agreement, caption, the caption's vector as four tokens, components, largest first].
    """

    mean: Tensor
    axes: Tensor
    edges: Tensor
    centres: Tensor
    agreement_edges: Tensor

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        k, buckets = config.components, config.buckets
        self.transformer = DalleTransformer(
            TransformerConfig(
                vocab_text=config.vocab_text + buckets,
                text_length=2 + config.text_length + LATENT_TOKENS,
                grid=(1, k),
                vocab_image=buckets,
                layers=config.layers,
                heads=config.heads,
                head_dim=config.head_dim,
                schedule="causal",
                latent=config.embedding,
            )
        )
        self.transformer.text_head = nn.Identity()  # the caption is not predicted
        self.register_buffer("mean", torch.zeros(config.embedding))
        self.register_buffer("axes", torch.zeros(config.embedding, k))
        self.register_buffer("edges", torch.zeros(k, buckets - 1))
        self.register_buffer("centres", torch.zeros(k, buckets))
        self.register_buffer("agreement_edges", torch.zeros(buckets - 1))

    def fit(self, captions: Tensor, pictures: Tensor) -> None:
        """Finds principal components and buckets of training vectors [N, embedding] of captions and their pictures."""
        self.mean.copy_(pictures.mean(dim=0))
        self.axes.copy_(torch.linalg.svd(pictures - self.mean, full_matrices=False).Vh[: self.config.components].T)
        values = (pictures - self.mean) @ self.axes
        inner = torch.linspace(0.0, 1.0, self.config.buckets + 1, device=values.device)[1:-1]
        self.edges.copy_(values.quantile(inner, dim=0).T)
        self.agreement_edges.copy_((captions * pictures).sum(dim=-1).quantile(inner))
        chosen = F.one_hot(self.encode(pictures), self.config.buckets).float()  # [N, k, buckets]
        sums = torch.einsum("nk,nkb->kb", values, chosen)
        self.centres.copy_(sums / chosen.sum(dim=0).clamp(min=1.0))

    def encode(self, pictures: Tensor) -> Tensor:
        """Vectors [B, embedding] as tokens int64 [B, components]."""
        values = ((pictures - self.mean) @ self.axes).T.contiguous()
        return torch.searchsorted(self.edges, values).T.contiguous()

    def decode(self, tokens: Tensor) -> Tensor:
        """Unit vectors [B, embedding] of tokens [B, components]."""
        values = self.centres.gather(1, tokens.T).T
        return F.normalize(self.mean + values @ self.axes.T, dim=-1)

    def _prompt(self, tokens: Tensor, agreement: Tensor) -> Tensor:
        """Captions with the token of their agreement, a bucket int64 [B], before them; where there is one."""
        first = torch.where((tokens >= 0).any(dim=1), self.config.vocab_text + agreement, NO_TOKEN)
        return torch.cat([first[:, None], tokens], dim=1)

    def loss(self, tokens: Tensor, captions: Tensor, pictures: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Cross-entropy of the components; the arguments are those of `DiffusionPrior.loss`, without need of noise."""
        agreement = torch.searchsorted(self.agreement_edges, (captions * pictures).sum(dim=-1).contiguous())
        components = self.encode(pictures)
        hidden = self.transformer.hidden(self._prompt(tokens, agreement), components[:, :-1], latents=captions)
        logits = self.transformer.image_head(hidden[:, self.transformer.config.caption_length :])
        return F.cross_entropy(logits.flatten(0, 1).float(), components.flatten())

    @torch.no_grad()
    def draw(
        self, tokens: Tensor, captions: Tensor, *, seed: int, guidance_scale: float = 1.0, among: int = 1
    ) -> Tensor:
        """As `DiffusionPrior.draw`; the agreement that is asked for is from the upper half of all."""
        chance = torch.Generator().manual_seed(seed)
        upper = torch.randint(self.config.buckets // 2, self.config.buckets, (len(tokens),), generator=chance)
        prompt = self._prompt(tokens, upper.to(tokens.device))
        components = generate(
            self.transformer, prompt, seed=seed, number=among, latents=captions, guidance_scale=guidance_scale
        )
        drawn = self.decode(components).unflatten(0, (-1, among))
        best = (drawn * captions[:, None]).sum(dim=-1).argmax(dim=1)
        return drawn[torch.arange(len(captions), device=best.device), best]


PRIORS = {"diffusion": PriorConfig(), "autoregressive": PriorConfig(kind="autoregressive")}
Prior = DiffusionPrior | AutoregressivePrior


def make_prior(config: PriorConfig) -> Prior:
    """A prior of the kind that the configuration says."""
    return DiffusionPrior(config) if config.kind == "diffusion" else AutoregressivePrior(config)
