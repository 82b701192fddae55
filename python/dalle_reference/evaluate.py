"""Figures that say what a model has learnt."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dalle_reference.clip import CLIP, caption_tokens
from dalle_reference.data import PictureSet
from dalle_reference.judge import caption_vectors, picture_vectors
from dalle_reference.pixels import PixelConfig, PixelTransformer, bits_per_dimension
from dalle_reference.prior import Prior
from dalle_reference.tokenizer import CaptionTokenizer


class Retrieval(NamedTuple):
    """How often the picture whose tokens are nearest to a caption's sample is the caption's own.

    Attributes:
        right: the share of captions for which it is.
        chance: the share that picking at random would reach, 1 / candidates.
        captions, candidates: how many of each.
    """

    right: float
    chance: float
    captions: int
    candidates: int

    @property
    def times_chance(self) -> float:
        return self.right / self.chance

    def __str__(self) -> str:
        return (
            f"{self.right * self.captions:.1f} of {self.captions} right among {self.candidates} pictures"
            f" ({self.right:.1%}; chance {self.chance:.2%}): {self.times_chance:.0f} times chance"
        )


def retrieval(samples: torch.Tensor, targets: torch.Tensor, gallery: torch.Tensor) -> Retrieval:
    """Looks up each sample's nearest picture, by the number of cells that hold the same token.

    Where m pictures are equally near and the right one is among them, it counts 1 / m.

    Args:
        samples: int64 [B, L], tokens drawn for B captions.
        targets: int64 [B], the row of `gallery` that each caption belongs to.
        gallery: int64 [N, L], tokens of all candidate pictures.

    Example:
        >>> gallery = torch.arange(12).reshape(3, 4)
        >>> str(retrieval(gallery[:2], torch.tensor([0, 1]), gallery))
        '2.0 of 2 right among 3 pictures (100.0%; chance 33.33%): 3 times chance'
    """
    right = float(right_shares(samples, targets, gallery).mean())
    return Retrieval(right, 1.0 / len(gallery), len(samples), len(gallery))


def right_shares(samples: torch.Tensor, targets: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """How right each sample of `retrieval` is: 1, 0 or 1 / m, float64 [B]."""
    agreement = torch.stack([(gallery == sample).sum(dim=1) for sample in samples])
    best = agreement == agreement.amax(dim=1, keepdim=True)
    return best.gather(1, targets[:, None])[:, 0].double() / best.sum(dim=1)


def psnr(pictures: torch.Tensor, others: torch.Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB; both [N, 3, S, S] in 0..1."""
    error = (pictures - others).square().flatten(1).mean(dim=1).clamp(min=1e-12)
    return float((-10.0 * error.log10()).mean())


def codebook_use(indices: torch.Tensor, vocab: int) -> dict[str, float]:
    """The share of `vocab` codes that `indices` use, and the perplexity of their distribution."""
    share = torch.bincount(indices.flatten(), minlength=vocab).double() / indices.numel()
    entropy = -torch.special.xlogy(share, share).sum()
    return {"codebook_usage": float((share > 0).double().mean()), "codebook_perplexity": float(entropy.exp())}


@torch.no_grad()
def pixel_loss(model: PixelTransformer, pictures: PictureSet, batch: int = 16) -> float:
    """Nats a token of pictures; one picture a concept, or copies would be counted that differ in a tone."""
    device, chance = model.palette.device, np.random.default_rng(0)
    total, count = 0.0, 0
    for part in pictures.one_per_concept().images.split(batch):
        hidden = model.hide([chance] * len(part))
        total += len(part) * float(model.loss(part.to(device), None if hidden is None else hidden.to(device)))
        count += len(part)
    return total / count


def likelihood(config: PixelConfig, nats: float) -> str:
    """A loss as its literature states it."""
    return f"{nats:.3f} nats a pixel" if config.colours else f"{bits_per_dimension(nats):.3f} bits a dimension"


@torch.no_grad()
def prior_cosines(
    prior: Prior, clip: CLIP, tokenizer: CaptionTokenizer, pictures: PictureSet, mean: torch.Tensor, seed: int
) -> dict[str, float]:
    """Mean cosine to CLIP's vectors of pictures, one a concept, of what may stand for them.

    That is: what the prior draws for a caption, in each language in turn; the better of two of its draws by the
    caption; the caption's own vector; and `mean`, that of the training pictures' vectors.
    """
    pictures = pictures.one_per_concept()
    captions = [list(record.captions.values()) for record in pictures.records]
    texts = [some[number % len(some)] for number, some in enumerate(captions)]
    tokens = caption_tokens(texts, tokenizer, clip.config).to(mean.device)
    said, shown = caption_vectors(clip, tokenizer, texts), picture_vectors(clip, pictures.images)
    guesses = {
        "one draw": prior.draw(tokens, said, seed=seed, among=1),
        "best of two": prior.draw(tokens, said, seed=seed, among=2),
        "caption": said,
        "mean": F.normalize(mean, dim=0).expand_as(shown),
    }
    return {name: float((guess * shown).sum(dim=-1).mean()) for name, guess in guesses.items()}
