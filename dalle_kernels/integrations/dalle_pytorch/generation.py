"""Their `DALLE` and `PreShiftToken` with what generation with a cache needs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_kernels.integrations.dalle_pytorch.attention import Cache
from dalle_kernels.integrations.extension import Extension


class Shift(Extension):
    """In front of `PreShiftToken`: from token to token it keeps the features that the next row will take over."""

    def forward(self: Any, x: Tensor, cache: Cache | None = None, cache_key: Any = None, **kwargs: Any) -> Tensor:
        if cache is None:
            return super().forward(x, **kwargs)  # type: ignore[misc]
        quarter = x.chunk(4, -1)[0].shape[-1]
        ring = self.image_size + 1  # the row above, this token, and nothing else
        if not cache.get("offset", 0):
            # Theirs first: it leaves a cache of its own under the key, which ours then replaces.
            out = super().forward(x, cache=cache, cache_key=cache_key, **kwargs)  # type: ignore[misc]
            cache[cache_key] = x.new_zeros(len(x), ring, 2 * quarter)
            image = x[:, self.text_len :, : 2 * quarter]
            cells = torch.arange(max(image.shape[1] - ring, 0), image.shape[1], device=x.device)
            cache[cache_key][:, cells % ring] = image[:, cells]
            cache[cache_key] = cache[cache_key].repeat_interleave(cache.get("copies", 1), 0)
            return out
        # Places are tensors: of numbers torch.compile would make a graph for each place in the ring.
        cell, past = torch.arange(1, device=x.device) + (cache["offset"] - self.text_len), cache[cache_key]
        past[:, cell % ring] = x[:, :, : 2 * quarter]
        top, left = past[:, (cell + 1) % ring, :quarter], past[:, (cell - 1) % ring, quarter:]
        left = torch.where(cell % self.image_size == 0, 0.0, left)
        return self.fn(torch.cat([top, left, x[..., 2 * quarter :]], -1), cache=cache, **kwargs)


class Generation(Extension):
    """In front of `DALLE`: `generate_images` with a cache."""

    @torch.no_grad()
    def generate_images(
        self: Any,
        text: Tensor,
        *,
        clip: nn.Module | None = None,
        filter_thres: float = 0.5,
        temperature: float = 1.0,
        img: Tensor | None = None,
        num_init_img_tokens: int | None = None,
        cond_scale: float = 1.0,
        use_cache: bool = True,
        number: int = 1,
    ) -> Any:
        """Draw a picture for each caption, or several.

        Args:
            text: int64 [B, n], n >= text_seq_len; 0 is padding.
            clip: scores the pictures too.
            filter_thres: the share of the vocabulary, text included, that is ruled out at each token.
            temperature: what logits are divided by.
            img: [B, channels, image_size, image_size]: its first tokens begin the pictures.
            num_init_img_tokens: how many of them; 7 / 16 of a picture unless told.
            cond_scale: of classifier-free guidance.
            use_cache: has no effect: the cache is always used.
            number: pictures of each caption; theirs has no such argument. They are those of captions given so many
                times, to rounding, but a caption is read once, and its keys and values are kept once.

        Returns:
            What the VAE makes of the tokens, [B * number, channels, image_size, image_size], a caption's after one
            another; with `clip` also its scores.
        """
        training = self.training
        self.eval()
        try:
            text = text[:, : self.text_seq_len]
            if text.shape[1] != self.text_seq_len:
                raise ValueError(f"text: got {text.shape[1]} tokens, wanted at least {self.text_seq_len}")
            if number < 1:
                raise ValueError(f"number: got {number}, wanted at least 1")
            prefix = self._image_prefix(img, num_init_img_tokens, text)
            image = self._draw(text, prefix, filter_thres, temperature, cond_scale, number)
            images = self.vae.decode(image)
            if clip is None:
                return images
            return images, clip(text.repeat_interleave(number, 0), images, return_loss=False)
        finally:
            self.train(training)

    def _image_prefix(self: Any, img: Tensor | None, wanted: int | None, text: Tensor) -> Tensor:
        """int64 [B, m]: the tokens that `generate_images` begins with."""
        if img is None:
            return text.new_empty(len(text), 0)
        side, cells = self.vae.image_size, self.image_seq_len
        if img.shape[1:] != (3, side, side):
            raise ValueError(f"img: got shape {tuple(img.shape)}, wanted (B, 3, {side}, {side})")
        wanted = int(0.4375 * cells) if wanted is None else wanted
        if not 0 <= wanted < cells:
            raise ValueError(f"num_init_img_tokens: got {wanted}, wanted 0 to {cells - 1}")
        return self.vae.get_codebook_indices(img)[:, :wanted]

    def _draw(
        self: Any,
        text: Tensor,
        image: Tensor,
        filter_thres: float,
        temperature: float,
        cond_scale: float,
        number: int,
    ) -> Tensor:
        """text [B, T], image [B, m] -> int64 [B * number, image_seq_len]."""
        guided = cond_scale != 1
        captions = torch.cat([text, torch.zeros_like(text)]) if guided else text
        tokens = self._embed(captions, torch.cat([image, image]) if guided else image)
        positions = self.image_pos_emb(tokens.new_zeros(1, self.image_seq_len, tokens.shape[-1]))
        image = image.repeat_interleave(number, 0)
        cache: Cache = {"offset": 0, "copies": number}
        while True:
            hidden = self.transformer(tokens, cache=cache)[:, -1:]
            if not cache["offset"]:
                hidden = hidden.repeat_interleave(number, 0)
            cache["offset"] += tokens.shape[1]
            logits = self._image_logits(hidden)
            if guided:
                torch.empty(
                    len(image), dtype=torch.float32, device=text.device
                ).uniform_()  # what theirs draws to drop every caption
                logits, null = logits.chunk(2)
                logits = null + (logits - null) * cond_scale
            drawn = self._sample(logits, filter_thres, temperature)
            cell = image.shape[1]
            image = torch.cat([image, drawn], 1)
            if cell + 1 == self.image_seq_len:
                return image
            tokens = self.image_emb(torch.cat([drawn, drawn]) if guided else drawn)
            tokens = self._scaled(tokens + (positions[:, cell : cell + 1] if torch.is_tensor(positions) else positions))

    def _embed(self: Any, text: Tensor, image: Tensor) -> Tensor:
        """<bos>, text [B, T] and image [B, m] -> [B, 1 + T + m, dim]."""
        place = torch.arange(self.text_seq_len, device=text.device)
        text = torch.where(text == 0, place + self.num_text_tokens - self.text_seq_len, text)  # padding, by its place
        text = F.pad(text, (1, 0))
        tokens = self.text_emb(text) + self.text_pos_emb(torch.arange(text.shape[1], device=text.device))
        if image.shape[1]:
            cells = self.image_emb(image)
            tokens = torch.cat([tokens, cells + self.image_pos_emb(cells)], 1)
        return self._scaled(tokens)

    def _scaled(self: Any, tokens: Tensor) -> Tensor:
        """As `stable` scales the gradient of the embeddings: to the same bits."""
        return tokens * 0.1 + tokens.detach() * (1 - 0.1) if self.stable else tokens

    def _image_logits(self: Any, hidden: Tensor) -> Tensor:
        """hidden [B, 1, dim] -> [B, image tokens]."""
        if self.stable:
            hidden = self.norm_by_max(hidden)
        norm, head = self.to_logits
        if type(head) is nn.Linear:  # the text's part of it is not wanted
            first = self.num_text_tokens
            return F.linear(norm(hidden), head.weight[first:], head.bias[first:])[:, 0]
        return head(norm(hidden))[:, 0, self.num_text_tokens :]

    def _sample(self: Any, logits: Tensor, filter_thres: float, temperature: float) -> Tensor:
        """logits [B, image tokens] -> int64 [B, 1]. Text, whose logits theirs masks, counts for filter and noise."""
        uniform = logits.new_empty(len(logits), self.total_tokens).uniform_(0, 1)[:, self.num_text_tokens :]
        noise = -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()
        kept = max(int((1 - filter_thres) * self.total_tokens), 1)
        if kept >= logits.shape[1]:
            return (logits / temperature + noise).argmax(-1, keepdim=True)
        values, tokens = logits.topk(kept)
        return tokens.gather(1, (values / temperature + noise.gather(1, tokens)).argmax(-1, keepdim=True))
