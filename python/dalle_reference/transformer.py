"""Stage 2: the transformer over text and image tokens (Ramesh et al. 2021, section 2.2 and appendix B).

The sequence. Input position i holds what is known *at* that position, and its output predicts what stands at
i + 1. With T = `text_length` and a grid of H x W cells:

    position   0               1 .. T - 1                       T .. T + H W - 1
    input      start of text   caption tokens 1 .. T - 1        image tokens, raster order
    predicts   caption token 1 caption tokens 2 .., then the    the next cell's token (the last
                               first image token (at T - 1)     cell predicts nothing: not fed)

So a caption has at most T - 1 tokens, which `TransformerConfig.caption_length` says; the start takes the
first of the T text positions, and every image token sits at its own cell. That keeps the patterns' words
true: a query that is about to predict cell (r, c + 1) stands on cell (r, c); its row attention reaches from
there back to the cell above, its column attention reads the cells above it, and each key it meets at a cell
holds that cell's token. It also keeps T + H W positions at a round number (256 + 1024 in the paper's case).
Training feeds all positions but the last, a prefix of the layout.

Text positions without a caption token hold a learned vector of their own, one per position, which every later
position may attend to; nothing is masked. They are never predicted. A caption without any token is the
unconditional one, used by classifier-free guidance.

A model with `latent` is also told a vector, such as CLIP's of the picture: four projections of it are added to the last
four text positions. No projection has a bias, so a vector of zeros is no vector.

`TransformerConfig` also states the relatives of this model whose weights fit: ruDALL-E's two generations differ in
their norms, in how the convolution treats the grid's edge, and in where the grid begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from dalle_kernels import (
    Causal,
    Column,
    Convolution,
    Fixed,
    KVCache,
    Pattern,
    Row,
    Strided,
    TokenLayout,
    dalle_pattern_schedule,
)
from dalle_kernels.nn import SparseSelfAttention
from dalle_reference.errors import MOST_SIZE, require, require_positive

NO_TOKEN = -1
"""Stands in `text_tokens` where a caption has ended, and in `seen` where a cell's token is hidden."""

LATENT_TOKENS = 4
"""Positions before the picture at which a latent stands (Ramesh et al. 2022, section 2.1)."""


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a `DalleTransformer`; the defaults are the demo's."""

    vocab_text: int = 4096
    """Caption tokens are 0 .. vocab_text - 1."""
    text_length: int = 10
    """Text positions, the start of text among them: captions have at most text_length - 1 tokens."""
    grid: tuple[int, int] = (8, 8)
    """Rows and columns of image tokens, as the dVAE has them."""
    vocab_image: int = 2048
    """Image tokens are 0 .. vocab_image - 1, as the dVAE has them."""
    layers: int = 2
    """Blocks; their attention patterns are the paper's schedule."""
    heads: int = 2
    """Attention heads."""
    head_dim: int = 64
    """Width of one head; the model's width is heads x head_dim."""
    sandwich_norm: bool = False
    """Also normalise what attention and the MLP add to the stream (CogView, Ding et al. 2021, section 2.4)."""
    head_norm: bool = False
    """Normalise a second time before the heads."""
    schedule: Literal["dalle", "rowcol", "strided", "fixed", "causal"] = "dalle"
    """What each layer sees of the grid. dalle: row, column, row, row and so on, the last a convolution. rowcol: no
    convolution, as the Sparse Transformer has it on pictures, where it calls them local and strided. strided and fixed:
    its two patterns with both parts in every layer and a row of the grid as stride (Child et al. 2019, section 4.3);
    they see only some of the text. causal: all that came before."""
    text_weight: float = 1 / 8
    """The text's share of the loss; the image's is the rest. Each is first divided by its own count of tokens. On few
    pictures, whose tokens are soon known, the paper's eighth makes captions that nobody could foretell most of it."""
    latent: int = 0
    """Width of the vector that a picture is drawn of besides its caption; 0 for none."""
    convolution: Literal["raster", "clamp", "torus"] = "raster"
    """How the last layer's convolution treats the grid's edge; `dalle_kernels.Convolution` explains."""
    text_on_grid: bool = False
    """The patterns take the last text position for the grid's first cell, and every cell for the next one."""

    def __post_init__(self) -> None:
        sizes = ("vocab_text", "text_length", "vocab_image", "layers", "heads", "head_dim")
        require_positive(self, *sizes, most=MOST_SIZE)
        require(self, "at least 2 (the start of text and one token)", lambda value: value >= 2, "text_length")
        two = "two positive numbers (rows, columns)"
        require(self, two, lambda value: len(value) == 2 and 1 <= min(value) <= max(value) <= MOST_SIZE, "grid")
        require(self, f"0 to {MOST_SIZE}", lambda value: 0 <= value <= MOST_SIZE, "latent")
        require(self, "0 to 1", lambda value: 0 <= value <= 1, "text_weight")
        if self.latent:
            wanted = f"more than {LATENT_TOKENS} (the start of text and the latent's)"
            require(self, wanted, lambda value: value > LATENT_TOKENS, "text_length")
        if self.schedule not in ("dalle", "rowcol", "strided", "fixed", "causal"):
            wanted = "'dalle', 'rowcol', 'strided', 'fixed' or 'causal'"
            raise ValueError(f"schedule: got {self.schedule!r}, wanted {wanted}")
        if self.convolution not in ("raster", "clamp", "torus"):
            raise ValueError(f"convolution: got {self.convolution!r}, wanted 'raster', 'clamp' or 'torus'")

    @property
    def width(self) -> int:
        """d_model."""
        return self.heads * self.head_dim

    @property
    def caption_length(self) -> int:
        """How many tokens a caption may have."""
        return self.text_length - 1

    @property
    def image_length(self) -> int:
        """Image tokens per picture."""
        return self.grid[0] * self.grid[1]

    @property
    def layout(self) -> TokenLayout:
        """Text and grid as the patterns see them."""
        return TokenLayout(self.text_length - self.text_on_grid, self.grid)

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """Each layer's, first to last."""
        layout, stride = self.layout, self.grid[1]
        if self.schedule == "dalle":
            *body, last = dalle_pattern_schedule(self.layers, layout)
            return (*body, replace(cast(Convolution, last), boundary=self.convolution))
        if self.schedule == "rowcol":
            return tuple(Column(layout) if layer % 4 == 1 else Row(layout) for layer in range(self.layers))
        everywhere: dict[str, Pattern] = {
            "strided": Strided(layout.length, stride),
            "fixed": Fixed(layout.length, stride, summary=max(1, stride // 16)),
            "causal": Causal(layout),
        }
        return (everywhere[self.schedule],) * self.layers


PRESETS: dict[str, TransformerConfig] = {
    "demo": TransformerConfig(text_weight=0.005),
    "small": TransformerConfig(
        vocab_text=8192, text_length=32, grid=(16, 16), vocab_image=1024, layers=12, heads=8, head_dim=64
    ),
    # 64 layers of 62 heads of 64: 12 billion parameters (section 2.2).
    "paper": TransformerConfig(
        vocab_text=16384, text_length=256, grid=(32, 32), vocab_image=8192, layers=64, heads=62, head_dim=64
    ),
}


class TransformerLoss(NamedTuple):
    """Cross-entropies in nats per token, float32 and 0-dim."""

    total: Tensor
    """Both, weighed by the configuration's `text_weight`."""
    text: Tensor
    """Mean over the caption tokens of the batch; 0 where there is none."""
    image: Tensor
    """Mean over the image tokens of the batch."""


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)); x [B, S, width]."""

    def __init__(self, pattern: Pattern, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SparseSelfAttention(pattern, width, config.heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.attention_out_norm = nn.LayerNorm(width) if config.sandwich_norm else nn.Identity()
        self.mlp_out_norm = nn.LayerNorm(width) if config.sandwich_norm else nn.Identity()

    def _mlp(self, x: Tensor) -> Tensor:
        return self.mlp_out_norm(self.contract(F.gelu(self.expand(self.mlp_norm(x)), approximate="tanh")))

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attention_out_norm(self.attention(self.attention_norm(x), cache=cache))
        return x + self._mlp(x)

    def step(self, x: Tensor, cache: KVCache, position: Tensor) -> Tensor:
        """New tokens, x [B, G, width], the first at `position` of the cache."""
        x = x + self.attention_out_norm(self.attention.step(self.attention_norm(x), cache, position))
        return x + self._mlp(x)


Recompute = Literal["none", "blocks", "selective"]
"""What a block's backward computes anew instead of having kept it: nothing; the whole block, of which only the input is
kept (Chen et al. 2016); selective: all of it but attention, whose results are kept too."""


def _keep_attention() -> Any:
    """What `checkpoint` is told, so that attention's results are kept and all else is computed anew."""
    return create_selective_checkpoint_contexts([torch.ops.dalle_kernels.attention_forward.default])


class DalleTransformer(nn.Module):
    """Models captions and pictures as one stream of tokens, whose order the module's text explains.

    Attributes:
        recompute: what the backward pass computes anew; set it before training. Losses and gradients stay as they are.

    Example:
        >>> model = DalleTransformer(TransformerConfig(vocab_text=100, vocab_image=64, grid=(4, 4)))
        >>> text = torch.tensor([[5, 17, 3] + [NO_TOKEN] * 6])          # [1, caption_length]
        >>> image = torch.randint(64, (1, 16))                           # [1, H * W]
        >>> total, text_loss, image_loss = model.loss(text, image)
        >>> total.backward()
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute: Recompute = "none"
        width, (rows, columns) = config.width, config.grid
        # Row vocab_text + p stands at text position p where no caption token does; position 0 never has one,
        # so its row is the start of text.
        self.text_embedding = nn.Embedding(config.vocab_text + config.text_length, width)
        self.text_position = nn.Parameter(torch.empty(config.text_length, width))
        if config.latent:
            self.project_latent = nn.Linear(config.latent, LATENT_TOKENS * width, bias=False)
        self.image_embedding = nn.Embedding(config.vocab_image, width)
        self.row_position = nn.Parameter(torch.empty(rows, 1, width))
        self.column_position = nn.Parameter(torch.empty(1, columns, width))
        self.blocks = nn.ModuleList(Block(pattern, config) for pattern in config.patterns)
        self.final_norm = nn.LayerNorm(width)
        self.head_norm = nn.LayerNorm(width) if config.head_norm else nn.Identity()
        self.text_head: nn.Module = nn.Linear(width, config.vocab_text)
        self.image_head = nn.Linear(width, config.vocab_image)
        self.reset_parameters()

    @property
    def layers(self) -> list[Block]:
        """The blocks, first to last."""
        return cast("list[Block]", list(self.blocks))

    def reset_parameters(self) -> None:
        """Normal with deviation 0.02; what writes to the residual stream shrinks with depth, as in GPT-2."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for position in (self.text_position, self.row_position, self.column_position):
            nn.init.normal_(position, std=0.02)
        for block in self.layers:
            for writer in (block.attention.project_out, block.contract):
                nn.init.normal_(writer.weight, std=0.02 * (2 * self.config.layers) ** -0.5)

    def embed_text(self, text_tokens: Tensor, latents: Tensor | None = None) -> Tensor:
        """Captions [B, n <= caption_length], `NO_TOKEN` where they have ended, latents [B, latent] -> [B, T, width]."""
        length, start = self.config.text_length, self.config.vocab_text
        tokens = F.pad(text_tokens, (1, length - 1 - text_tokens.shape[1]), value=NO_TOKEN)
        fillers = torch.arange(start, start + length, device=tokens.device)
        x = self.text_embedding(torch.where(tokens < 0, fillers, tokens)) + self.text_position
        if latents is None:
            return x
        if not self.config.latent or latents.shape != (len(x), self.config.latent):
            wanted = f"[{len(x)}, {self.config.latent}]" if self.config.latent else "none: the model takes no latent"
            raise ValueError(f"latents: got shape {tuple(latents.shape)}, wanted {wanted}")
        told = self.project_latent(latents).unflatten(1, (LATENT_TOKENS, -1))
        return x + F.pad(told, (0, 0, length - LATENT_TOKENS, 0))

    def embed_image(self, image_tokens: Tensor, cells: Tensor | None = None) -> Tensor:
        """Image tokens [B, m], `NO_TOKEN` where hidden, of `cells`, int64 [m], or the first m -> [B, m, width]."""
        positions = (self.row_position + self.column_position).flatten(0, 1)
        embedded = self.image_embedding(image_tokens.clamp(min=0)) * (image_tokens >= 0)[..., None]
        return embedded + positions[slice(image_tokens.shape[1]) if cells is None else cells]

    def hidden(
        self,
        text_tokens: Tensor,
        image_tokens: Tensor,
        caches: Sequence[KVCache] | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Run the stream of a caption and the first m cells of a picture.

        Args:
            text_tokens: int64 [B, n <= caption_length], `NO_TOKEN` at the end.
            image_tokens: int64 [B, m <= H * W], in raster order, `NO_TOKEN` where hidden; m = 0 is only the text. The
                last cell, which predicts nothing, has no place where the grid begins with `text_on_grid`.
            caches: one per layer, from `new_caches`; filled, so that `step` can go on.
            latents: [B, latent], for a model that takes them; a row of zeros, or None, is no latent.

        Returns:
            [B, T + m, width], normalised: the input of the two heads.
        """
        batch = text_tokens.shape[0]
        check_tokens("text_tokens", text_tokens, batch, self.config.caption_length)
        check_tokens("image_tokens", image_tokens, batch, self.config.layout.length - self.config.text_length)
        x = torch.cat([self.embed_text(text_tokens, latents), self.embed_image(image_tokens)], dim=1)
        for layer, block in enumerate(self.layers):
            if self.recompute == "none" or caches is not None or not torch.is_grad_enabled():
                x = block(x, None if caches is None else caches[layer])
            else:
                keep = noop_context_fn if self.recompute == "blocks" else _keep_attention
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=keep)
        return self.head_norm(self.final_norm(x))

    def new_caches(
        self,
        batch: int,
        copies: int = 1,
        dtype: torch.dtype | None = None,
        patterns: Sequence[Pattern] | None = None,
    ) -> list[KVCache]:
        """Empty key-value caches, one per layer: of `batch` prompts, each with `copies` continuations.

        `dtype` is that of the keys where None; `patterns`, one per layer, are the model's own unless the tokens after
        the prompt come in another order.
        """
        orders = [None] * len(self.layers) if patterns is None else patterns
        return [
            block.attention.new_cache(batch, dtype, copies, pattern=order)
            for block, order in zip(self.layers, orders, strict=True)
        ]

    def step(self, image_tokens: Tensor, cells: Tensor, position: Tensor, caches: Sequence[KVCache]) -> Tensor:
        """Go on by image tokens, int64 [B, G], of `cells`, int64 [G], where the caches hold `position` tokens, int64 of
        one element -> [B, G, width].

        In raster order that is text_length + cells[0], and each predicts the next.
        """
        x = self.embed_image(image_tokens, cells)
        for block, cache in zip(self.layers, caches, strict=True):
            x = block.step(x, cache, position)
        return self.head_norm(self.final_norm(x))

    def forward(
        self, text_tokens: Tensor, image_tokens: Tensor, latents: Tensor | None = None, given: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Logits of every token that the stream predicts.

        Args:
            text_tokens: int64 [B, n <= caption_length], `NO_TOKEN` at the end.
            image_tokens: int64 [B, H * W], what the stream is fed; `NO_TOKEN` where hidden.
            latents: as for `hidden`.
            given: cells at the picture's beginning of which no logits are wanted.

        Returns:
            Of the caption's tokens [B, n, vocab_text] and of the picture's [B, H * W - given, vocab_image].
        """
        batch, cells, predictors = len(text_tokens), self.config.image_length, self.config.caption_length
        if image_tokens.shape != (batch, cells):
            raise ValueError(f"image_tokens: got shape {tuple(image_tokens.shape)}, wanted ({batch}, {cells})")
        # The last token is only ever predicted.
        hidden = self.hidden(text_tokens, image_tokens[:, :-1], latents=latents)
        text = self.text_head(hidden[:, : text_tokens.shape[1]])
        return text, self.image_head(hidden[:, predictors + given :])

    def loss(
        self,
        text_tokens: Tensor,
        image_tokens: Tensor,
        *,
        seen: Tensor | None = None,
        latents: Tensor | None = None,
        given: int = 0,
        text_count: float | None = None,
    ) -> TransformerLoss:
        """The training loss of a batch; the arguments are those of `forward`.

        Text positions without a token are not predicted, so an empty caption (one dropped for classifier-free
        guidance) adds nothing to the text's loss.

        Args:
            seen: `image_tokens` with `NO_TOKEN` in place of some, which the stream is fed instead; all are predicted.
                What the cells before do not say, the caption must (Bowman et al. 2016, section 3.2, for words).
            given: cells at the picture's beginning that are never drawn, say the upper of two panels: not predicted.
            text_count: what the sum over caption tokens is divided by; their number where None. For the parts of a
                batch, the mean number in a part: the mean of the parts' losses is then the batch's.
        """
        text_logits, image_logits = self(text_tokens, image_tokens if seen is None else seen, latents, given)
        image = F.cross_entropy(image_logits.flatten(0, 1).float(), image_tokens[:, given:].flatten())
        text = F.cross_entropy(
            text_logits.flatten(0, 1).float(), text_tokens.flatten(), ignore_index=NO_TOKEN, reduction="sum"
        ) / ((text_tokens >= 0).sum().clamp(min=1) if text_count is None else text_count)
        weight = self.config.text_weight
        return TransformerLoss(weight * text + (1 - weight) * image, text, image)


def check_tokens(name: str, tokens: Tensor, batch: int, longest: int) -> None:
    """Raises unless `tokens` is int64 [batch, at most `longest`]."""
    if tokens.dtype != torch.int64:
        raise TypeError(f"{name}: got {tokens.dtype}, wanted torch.int64")
    if tokens.dim() != 2 or tokens.shape[0] != batch or tokens.shape[1] > longest:
        raise ValueError(f"{name}: got shape {tuple(tokens.shape)}, wanted [{batch}, at most {longest}]")
