"""CLIP as a judge: vectors of pictures and captions, which of them agree, and what a picture shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dalle_reference.clip import CLIP, caption_tokens
from dalle_reference.data import PictureSet
from dalle_reference.tokenizer import CaptionTokenizer

_AT_ONCE = 128
"""Pictures or captions that CLIP reads at a time."""


@torch.no_grad()
def picture_vectors(clip: CLIP, pictures: torch.Tensor) -> torch.Tensor:
    """CLIP's vectors of pictures [N, 3, S, S], uint8 or in 0..1, on its device: float32 [N, embedding]."""
    device = clip.log_scale.device

    def read(part: torch.Tensor) -> torch.Tensor:
        return clip.encode_pictures(part.to(device) / 255.0 if part.dtype == torch.uint8 else part.to(device))

    return torch.cat([read(part) for part in pictures.split(_AT_ONCE)])


@torch.no_grad()
def caption_vectors(clip: CLIP, tokenizer: CaptionTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """CLIP's vectors of captions, on its device: float32 [N, embedding]."""
    tokens = caption_tokens(texts, tokenizer, clip.config).to(clip.log_scale.device)
    return torch.cat([clip.encode_captions(part) for part in tokens.split(_AT_ONCE)])


def agreement(clip: CLIP, tokenizer: CaptionTokenizer, pictures: torch.Tensor, caption: str) -> torch.Tensor:
    """The cosine of each picture's vector, of [N, 3, S, S], to the caption's: float32 [N], on CLIP's device."""
    return picture_vectors(clip, pictures) @ caption_vectors(clip, tokenizer, [caption])[0]


@torch.no_grad()
def name_shares(
    clip: CLIP,
    tokenizer: CaptionTokenizer,
    pictures: torch.Tensor,
    names: Sequence[str],
    templates: Sequence[str] = ("{}",),
) -> torch.Tensor:
    """How likely each name is what a picture shows, which CLIP need not have been trained on (zero-shot).

    Args:
        pictures: [N, 3, S, S], uint8 or in 0..1.
        names: M of them.
        templates: captions with {} in the place of a name; the mean of what they say is compared.

    Returns:
        float32 [N, M], each row with the sum 1, on CLIP's device.
    """
    captions = [template.replace("{}", name) for name in names for template in templates]
    said = caption_vectors(clip, tokenizer, captions).unflatten(0, (len(names), -1))
    wanted = F.normalize(said.mean(dim=1), dim=-1)
    return (clip.scale * picture_vectors(clip, pictures) @ wanted.T).softmax(dim=1)


@torch.no_grad()
def name_pictures(clip: CLIP, tokenizer: CaptionTokenizer, pictures: PictureSet) -> dict[str, float]:
    """How often the nearest of all concepts' captions is a picture's own, by language; one picture a concept."""
    shares = {}
    for language in sorted({language for record in pictures.records for language in record.captions}):
        named = [index for index, record in enumerate(pictures.records) if language in record.captions]
        chosen = pictures.take(named).one_per_concept()
        names = [record.captions[language] for record in chosen.records]
        guesses = (picture_vectors(clip, chosen.images) @ caption_vectors(clip, tokenizer, names).T).argmax(dim=1)
        shares[language] = float((guesses.cpu() == torch.arange(len(chosen))).double().mean())
    return shares
