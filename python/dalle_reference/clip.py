"""CLIP: pictures and captions as directions in one space, trained to agree (Radford et al. 2021).

    picture --patches, class token, transformer--> its class token --\\
                                                                      unit vectors, whose products are the logits
    caption --tokens, causal transformer--> its last token ----------/

A batch of N pictures with their captions is two classifications: which of the N captions is a picture's, and which of
the N pictures a caption's. DALL-E draws many candidates for a caption and keeps those that CLIP takes for the best; and
a picture is classified by the nearest of several names, without having been trained to (zero-shot).

The published networks of OpenAI and open_clip have this shape; `CLIPConfig.activation` is what they differ in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_kernels import Causal, MaskPattern, Pattern, TokenLayout
from dalle_kernels.nn import SparseSelfAttention
from dalle_reference.errors import MOST_SIZE, require, require_positive
from dalle_reference.parallel import World
from dalle_reference.tokenizer import CaptionTokenizer
from dalle_reference.transformer import NO_TOKEN, check_tokens

LARGEST_SCALE = 100.0
"""Of the logits: what the learnt scale is cut off at (section 2.5)."""

_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the channels of OpenAI's training pictures, by which the published networks want theirs shifted and scaled."""


@dataclass(frozen=True)
class CLIPConfig:
    """The shape of a CLIP; the defaults are the demo's."""

    resolution: int = 48
    """Side of the pictures, in pixels."""
    patch: int = 8
    """Side of a patch, which becomes one token."""
    width: int = 128
    """Of the picture's transformer."""
    layers: int = 4
    """Of the picture's transformer."""
    heads: int = 2
    """Of the picture's transformer."""
    vocab_text: int = 2048
    """Caption tokens are 0 .. vocab_text - 1; in training here the last one ends every caption."""
    text_length: int = 32
    """Most tokens of a caption, the end among them."""
    text_width: int = 128
    """Of the caption's transformer."""
    text_layers: int = 3
    """Of the caption's transformer."""
    text_heads: int = 2
    """Of the caption's transformer."""
    embedding: int = 128
    """Dimensions of the space that both come to lie in."""
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    """quick_gelu is x sigmoid(1.702 x), OpenAI's approximation; open_clip's networks have gelu."""

    def __post_init__(self) -> None:
        sizes = ("resolution", "patch", "width", "layers", "heads", "vocab_text", "embedding")
        text_sizes = ("text_length", "text_width", "text_layers", "text_heads")
        require_positive(self, *sizes, *text_sizes, most=MOST_SIZE)
        require(self, f"a divisor of the resolution {self.resolution}", lambda p: self.resolution % p == 0, "patch")
        require(self, f"a divisor of the width {self.width}", lambda heads: self.width % heads == 0, "heads")
        wanted = f"a divisor of the text_width {self.text_width}"
        require(self, wanted, lambda heads: self.text_width % heads == 0, "text_heads")
        if self.activation not in ("gelu", "quick_gelu"):
            raise ValueError(f"activation: got {self.activation!r}, wanted 'gelu' or 'quick_gelu'")

    @property
    def patches(self) -> int:
        """How many a picture has."""
        return (self.resolution // self.patch) ** 2


PRESETS = {
    "tiny": CLIPConfig(
        resolution=16, width=16, layers=2, vocab_text=300, text_length=12, text_width=16, text_layers=2, embedding=8
    ),
    "demo": CLIPConfig(),
    # ViT-B/32 (table 20).
    "paper": CLIPConfig(
        resolution=224,
        patch=32,
        width=768,
        layers=12,
        heads=12,
        vocab_text=49408,
        text_length=77,
        text_width=512,
        text_layers=12,
        text_heads=8,
        embedding=512,
        activation="quick_gelu",
    ),
}


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)); x [B, S, width]."""

    def __init__(self, pattern: Pattern, width: int, heads: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SparseSelfAttention(pattern, width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        inner = self.expand(self.mlp_norm(x))
        inner = F.gelu(inner) if self.activation == "gelu" else inner * torch.sigmoid(1.702 * inner)
        return x + self.contract(inner)


class CLIPLoss(NamedTuple):
    """What a training pass yields; 0-dim, float32."""

    total: Tensor
    """Mean of the two cross-entropies, in nats."""
    right: Tensor
    """Share of the pictures whose own caption is the nearest of the batch; carries no gradient."""


class CLIP(nn.Module):
    """Pictures and captions to unit vectors.

    Source: Radford et al. 2021, sections 2.3 to 2.5.

    Example:
        >>> model = CLIP(PRESETS["tiny"])
        >>> pictures, captions = torch.rand(2, 3, 16, 16), torch.tensor([[5, 17, 299], [8, 299, NO_TOKEN]])
        >>> (model.encode_pictures(pictures) @ model.encode_captions(captions).T).shape
        torch.Size([2, 2])
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        width, text_width, length = config.width, config.text_width, config.patches + 1
        everything = MaskPattern(np.ones((length, length), dtype=bool))
        causal = Causal(TokenLayout(config.text_length - 1, (1, 1)))
        self.patch_embedding = nn.Conv2d(3, width, config.patch, stride=config.patch, bias=False)
        self.class_token = nn.Parameter(torch.empty(width))
        self.position = nn.Parameter(torch.empty(length, width))
        self.pre_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            Block(everything, width, config.heads, config.activation) for _ in range(config.layers)
        )
        self.post_norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, config.embedding, bias=False)
        self.text_embedding = nn.Embedding(config.vocab_text, text_width)
        self.text_position = nn.Parameter(torch.empty(config.text_length, text_width))
        self.text_blocks = nn.ModuleList(
            Block(causal, text_width, config.text_heads, config.activation) for _ in range(config.text_layers)
        )
        self.text_norm = nn.LayerNorm(text_width)
        self.text_project = nn.Linear(text_width, config.embedding, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, with the deviations of OpenAI's code."""
        config = self.config
        nn.init.normal_(self.text_embedding.weight, std=0.02)
        nn.init.normal_(self.text_position, std=0.01)
        for parameter in (self.class_token, self.position, self.project.weight):
            nn.init.normal_(parameter, std=config.width**-0.5)
        nn.init.normal_(self.text_project.weight, std=config.text_width**-0.5)
        for blocks, width in ((self.blocks, config.width), (self.text_blocks, config.text_width)):
            for block in cast("Sequence[Block]", blocks):
                writes = width**-0.5 * (2 * len(blocks)) ** -0.5
                nn.init.normal_(block.attention.project_qkv.weight, std=width**-0.5)
                nn.init.normal_(block.attention.project_out.weight, std=writes)
                nn.init.normal_(block.expand.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(block.contract.weight, std=writes)
                for layer in (block.attention.project_qkv, block.attention.project_out, block.expand, block.contract):
                    nn.init.zeros_(layer.bias)

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Unit vectors of pictures in 0..1: [B, 3, S, S] -> float32 [B, embedding]; other sizes are resized."""
        side = self.config.resolution
        if pictures.shape[-2:] != (side, side):
            pictures = F.interpolate(pictures, (side, side), mode="bicubic", antialias=True).clamp(0.0, 1.0)
        mean, deviation = (pictures.new_tensor(values)[:, None, None] for values in (_MEAN, _DEVIATION))
        patches = self.patch_embedding((pictures - mean) / deviation).flatten(2).transpose(1, 2)
        first = self.class_token.to(patches.dtype).expand(len(patches), 1, -1)
        x = self.pre_norm(torch.cat([first, patches], dim=1) + self.position)
        for block in self.blocks:
            x = block(x)
        return F.normalize(self.project(self.post_norm(x[:, 0])).float(), dim=-1)

    def encode_captions(self, tokens: Tensor) -> Tensor:
        """Unit vectors of captions: int64 [B, n <= text_length], `NO_TOKEN` after the end -> float32 [B, embedding].

        A caption is read at its last token, which no later position has changed; so positions that all are shorter than
        cost nothing.
        """
        check_tokens("tokens", tokens, len(tokens), self.config.text_length)
        last = (tokens != NO_TOKEN).sum(dim=1) - 1
        if not bool((last >= 0).all()):
            raise ValueError("tokens: got a caption without a token, wanted at least its end")
        tokens = tokens[:, : int(last.max()) + 1]
        x = self.text_embedding(tokens.clamp(min=0)) + self.text_position[: tokens.shape[1]]
        for block in self.text_blocks:
            x = block(x)
        x = self.text_norm(x[torch.arange(len(x), device=x.device), last])
        return F.normalize(self.text_project(x).float(), dim=-1)

    def forward(self, pictures: Tensor, tokens: Tensor) -> Tensor:
        """Scaled logits of N pictures against M captions: float32 [N, M]."""
        return self.scale * self.encode_pictures(pictures) @ self.encode_captions(tokens).T

    @property
    def scale(self) -> Tensor:
        """Of the logits: the inverse temperature."""
        return self.log_scale.exp()

    def loss(self, pictures: Tensor, tokens: Tensor, world: World | None = None) -> CLIPLoss:
        """The training loss of N pictures and their captions, all of which should show different things.

        With several processes in `world`, the captions that a picture is told from are those of all of them, and so are
        the pictures of a caption; the mean of the processes' losses is the whole batch's.

        Args:
            pictures: [N, 3, S, S] in 0..1.
            tokens: int64 [N, n], as for `encode_captions`; or [M, N, n], M captions of each picture, say in as many
                languages. That is the mean loss of M batches of the same pictures, which are read once.
            world: the processes; this one alone by default.
        """
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(LARGEST_SCALE))
        shown = self.encode_pictures(pictures)
        said = torch.stack([self.encode_captions(each) for each in tokens.reshape(-1, *tokens.shape[-2:])])
        own = torch.arange(len(shown), device=shown.device)
        all_shown, all_said = shown, said
        if world is not None and world.size > 1:
            gathered = world.gather_differentiably(torch.cat([shown[None], said]).transpose(0, 1).contiguous())
            all_shown, all_said = gathered[:, 0], gathered[:, 1:].transpose(0, 1)
            own = own + world.rank * len(shown)
        own = own.repeat(len(said))
        of_pictures = (self.scale * shown @ all_said.mT).flatten(0, 1)
        of_captions = (self.scale * said @ all_shown.T).flatten(0, 1)
        total = (F.cross_entropy(of_pictures, own) + F.cross_entropy(of_captions, own)) / 2
        return CLIPLoss(total, (of_pictures.detach().argmax(dim=1) == own).float().mean())


def caption_tokens(
    captions: Sequence[str],
    tokenizer: CaptionTokenizer,
    config: CLIPConfig,
    dropout: float = 0.0,
    generator: np.random.Generator | None = None,
) -> Tensor:
    """Captions as a CLIP that was trained here takes them: int64 [N, text_length]; the last token of all ends each."""
    tokens = tokenizer.encode(captions, config.text_length - 1, dropout, generator)
    return end_captions(tokens, config.vocab_text - 1)


def end_captions(tokens: Tensor, end: int) -> Tensor:
    """Captions as a `CaptionTokenizer` gives them, int64 [B, n], with the token `end` after each: [B, n + 1].

    Example:
        >>> end_captions(torch.tensor([[3, 4, 5], [6, -1, -1]]), end=9).tolist()
        [[3, 4, 5, 9], [6, 9, -1, -1]]
    """
    ended = F.pad(tokens, (0, 1), value=NO_TOKEN)
    return ended.scatter(1, (tokens != NO_TOKEN).sum(dim=1, keepdim=True), end)
