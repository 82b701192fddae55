"""Draw pictures for captions, one image token after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dalle_kernels import sample_tokens
from dalle_reference.transformer import NO_TOKEN, DalleTransformer, check_tokens


def generate(
    model: DalleTransformer,
    text_tokens: Tensor,
    *,
    seed: int,
    number: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance_scale: float = 1.0,
    image_prefix: Tensor | None = None,
    latents: Tensor | None = None,
    use_cache: bool = True,
    progress: Callable[[int, int], object] | None = None,
) -> Tensor:
    """Image tokens for captions.

    A row of the result depends on its caption, on its place and on `seed`, so the same caption twice in a batch gives
    two pictures, and the same call twice gives the same. `number` gives the pictures that so many copies of each
    caption would, up to rounding, but the model reads each caption once, and a step its keys once for all of them.

    Args:
        model: a trained `DalleTransformer`; the device and, under autocast, the dtype are its own.
        text_tokens: int64 [B, n <= caption_length], `NO_TOKEN` where a caption has ended.
        seed: of the draws; any int64.
        number: pictures of each caption.
        temperature, top_k, top_p: as in `dalle_kernels.sample_tokens`; temperature 0: the likeliest token.
        guidance_scale: s of classifier-free guidance, logits u + s (c - u) with u those of the empty caption;
            other than 1 it doubles the batch, and wants a model trained with some captions (and latents) dropped.
        image_prefix: int64 [B, m], the first m cells of each caption's pictures in raster order; the rest is drawn.
        latents: [B, latent], for a model that takes them.
        use_cache: keep keys and values between tokens. Without it each token runs the whole stream anew:
            slow, for checking the other way.
        progress: called with (cells done, cells in all) after each token.

    Returns:
        int64 [B * number, H * W], the prefix included; the pictures of a caption follow one another.

    Raises:
        TypeError, ValueError: when an argument has another type, shape or range than said here.

    Example:
        >>> text = tokenizer.encode(["a red apple"])                     # [1, caption_length]
        >>> tokens = generate(model, text, seed=0, number=4, top_k=64, guidance_scale=3.0)
        >>> pictures = dvae.decode(tokens.unflatten(1, model.config.grid))
    """
    config = model.config
    cells = config.image_length
    if image_prefix is None:
        image_prefix = text_tokens.new_empty(text_tokens.shape[0], 0, dtype=torch.int64)
    batch = text_tokens.shape[0]
    _check("text_tokens", text_tokens, batch, config.caption_length, NO_TOKEN, config.vocab_text)
    _check("image_prefix", image_prefix, batch, cells, 0, config.vocab_image)
    if number < 1:
        raise ValueError(f"number: got {number}, wanted at least 1")
    guided = guidance_scale != 1.0
    if guided:
        text_tokens = torch.cat([text_tokens, torch.full_like(text_tokens, NO_TOKEN)])
        latents = None if latents is None else torch.cat([latents, torch.zeros_like(latents)])

    image = image_prefix.repeat_interleave(number, 0)
    caches = model.new_caches(len(text_tokens), copies=number) if use_cache else None
    if not use_cache:
        text_tokens = text_tokens.repeat_interleave(number, 0)
        latents = None if latents is None else latents.repeat_interleave(number, 0)
    seeds = _step_seeds(seed, cells, text_tokens.device)
    with torch.no_grad():
        for cell in range(image_prefix.shape[1], cells):
            stream = torch.cat([image, image]) if guided else image
            if caches is None:
                hidden = model.hidden(text_tokens, stream, latents=latents)
            elif cell == image_prefix.shape[1]:
                prompts = model.hidden(text_tokens, stream[::number], caches, latents)
                hidden = prompts[:, -1:].repeat_interleave(number, 0)
            else:
                hidden = model.step(stream[:, -1:], cell - 1, caches)
            logits = model.image_head(hidden[:, -1]).float()
            conditional, unconditional = logits.chunk(2) if guided else (logits, None)
            drawn = sample_tokens(
                conditional,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seeds[cell],
                unconditional_logits=unconditional,
                guidance_scale=guidance_scale,
            )
            image = torch.cat([image, drawn[:, None]], dim=1)
            if progress is not None:
                progress(cell + 1, cells)
    return image


def _step_seeds(seed: int, cells: int, device: torch.device) -> Tensor:
    """One int64 seed per cell, all different: SplitMix64's outputs from `seed` on (Steele et al. 2014).

    A cell's seed does not depend on where drawing began, so a completed picture and a whole one can agree.
    """
    word = (1 << 64) - 1

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & word
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & word
        z ^= z >> 31
        return z - (1 << 64) if z >> 63 else z

    states = ((seed + cell * 0x9E3779B97F4A7C15) & word for cell in range(1, cells + 1))
    return torch.tensor([mix(state) for state in states], dtype=torch.int64, device=device)


def _check(name: str, tokens: Tensor, batch: int, longest: int, lowest: int, end: int) -> None:
    check_tokens(name, tokens, batch, longest)
    if tokens.numel() and (int(tokens.min()) < lowest or int(tokens.max()) >= end):
        span = f"{int(tokens.min())} .. {int(tokens.max())}"
        raise ValueError(f"{name}: got values in {span}, wanted them in {lowest} .. {end - 1}")
