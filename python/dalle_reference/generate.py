"""Draw pictures for captions, one image token after the other or several rows side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dalle_kernels import KVCache, sample_tokens
from dalle_kernels.checks import as_int
from dalle_kernels.patterns import Diagonal
from dalle_reference.transformer import NO_TOKEN, DalleTransformer, TransformerConfig, check_tokens


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
    order: Literal["raster", "diagonal"] = "raster",
    window: int | None = None,
    cache_dtype: torch.dtype | None = None,
    use_cache: bool = True,
    progress: Callable[[int, Tensor], object] | None = None,
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
        order: "raster" draws a cell a step. "diagonal" begins each row once `window` cells of the row above are drawn,
            and then draws a cell of every such row a step: (rows - 1) window + columns steps for a picture (ZipAR, He
            et al. 2024, arXiv 2412.04062). A cell is then drawn without those cells to the right in the rows above
            that the model was trained to see but that come later; `dalle_kernels.patterns.Diagonal` says exactly what
            it sees. It wants the cache.
        window: of "diagonal", 1 to the columns of the grid; half of them, rounded up, where None. With all of them, the
            pictures are those of "raster", to the same bits.
        cache_dtype: of the kept keys and values: torch.int8 keeps them in eight bits, with the error that `KVCache`
            states; None is their own.
        use_cache: keep keys and values between tokens. Without it each token runs the whole stream anew:
            slow, for checking the other way.
        progress: called with (cells done, the tokens so far, int64 [B * number, H * W]) after each step; the tensor is
            written to in the next one.

    Returns:
        int64 [B * number, H * W], the prefix included; the pictures of a caption follow one another.

    Raises:
        TypeError, ValueError: when an argument has another type, shape or range than said here.

    Example:
        >>> text = tokenizer.encode(["a red apple"], model.config.caption_length)
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
    number, seed = as_int("number", number), as_int("seed", seed)
    if number < 1:
        raise ValueError(f"number: got {number}, wanted at least 1")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: got {seed}, wanted an int of 64 bits")
    guided = guidance_scale != 1.0
    if guided:
        text_tokens = torch.cat([text_tokens, torch.full_like(text_tokens, NO_TOKEN)])
        latents = None if latents is None else torch.cat([latents, torch.zeros_like(latents)])

    known = image_prefix.shape[1]
    if order not in ("raster", "diagonal"):
        raise ValueError(f"order: got {order!r}, wanted 'raster' or 'diagonal'")
    if order == "raster" and window is not None:
        raise ValueError(f"window: got {window} with order='raster', wanted it with 'diagonal'")
    if not use_cache and (order == "diagonal" or cache_dtype is not None):
        raise ValueError("use_cache: got False, wanted True for order='diagonal' and for a cache_dtype")
    patterns = None
    columns = config.grid[1]
    window = columns if order == "raster" else -(-columns // 2) if window is None else window
    if order == "diagonal":
        placed = min(known, config.layout.length - config.text_length)  # the last cell may have no place
        patterns = [Diagonal(pattern, config.text_length, columns, window, placed) for pattern in config.patterns]

    image = text_tokens.new_zeros(batch * number, cells)
    image[:, :known] = image_prefix.repeat_interleave(number, 0)
    caches = model.new_caches(len(text_tokens), number, cache_dtype, patterns) if use_cache else []
    if not use_cache:
        text_tokens = text_tokens.repeat_interleave(number, 0)
        latents = None if latents is None else latents.repeat_interleave(number, 0)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance_scale": guidance_scale}
    seeds = _step_seeds(seed, cells, text_tokens.device)
    drawing = _Drawing(model, caches, image, seeds, guided, sampling)
    advance = replayed(drawing.advance) if image.is_cuda else drawing.advance
    with torch.no_grad():
        for step in _steps(config, window, known):
            if use_cache and step.cells:
                places = [step.position, *step.cells, *step.tokens, *step.predicting, *step.draws]
                advance(torch.tensor(places, device=image.device), len(step.cells), len(step.draws))
            else:
                stream = drawing.stream()
                if use_cache:
                    hidden = model.hidden(text_tokens, stream[::number, :known], caches, latents)
                    hidden = hidden[:, -1:].repeat_interleave(number, 0)
                else:
                    hidden = model.hidden(text_tokens, stream[:, : step.draws[0]], latents=latents)[:, -1:]
                drawing.draw(hidden, torch.tensor(step.draws, device=image.device))
            known += len(step.draws)
            if progress is not None:
                progress(known, image)
    return image


class _Drawing(NamedTuple):
    """What steps read and write; all of it stays where it is, so that a CUDA graph may hold it."""

    model: DalleTransformer
    caches: list[KVCache]
    image: Tensor
    """int64 [B, H * W]"""
    seeds: Tensor
    """int64 [H * W]"""
    guided: bool
    sampling: dict[str, Any]

    def stream(self) -> Tensor:
        """The pictures as the model takes them: under guidance a second time, for the empty captions."""
        return torch.cat([self.image, self.image]) if self.guided else self.image

    def advance(self, places: Tensor, taken: int, drawn: int) -> None:
        """One step, of which all that changes is in `places`, int64: the fields of `_Step` one after the other."""
        position, cells, tokens, predicting, draws = places.split([1, taken, taken, drawn, drawn])
        hidden = self.model.step(self.stream().index_select(1, tokens), cells, position, self.caches)
        self.draw(hidden.index_select(1, predicting), draws)

    def draw(self, hidden: Tensor, cells: Tensor) -> None:
        """Draws `cells`, int64 [n], from `hidden` [B, n, width]."""
        logits = self.model.image_head(hidden).float()
        conditional, unconditional = logits.chunk(2) if self.guided else (logits, None)
        for turn, cell in enumerate(cells.split(1)):
            drawn = sample_tokens(
                conditional[:, turn],
                seed=self.seeds.index_select(0, cell),
                unconditional_logits=None if unconditional is None else unconditional[:, turn],
                **self.sampling,
            )
            self.image.index_copy_(1, cell, drawn[:, None])


Advance = Callable[[Tensor, int, int], None]


def replayed(advance: Advance) -> Advance:
    """`advance` as CUDA graphs, one for each pair of its ints: the whole step is then one launch.

    The first step of a kind is a plain call, which makes the tables that it reads; the second is captured. The graphs
    live as long as the function that is returned. No GPU was at hand when this was written: it has never run on one.
    """
    held: dict[tuple[int, int], tuple[Tensor, Callable[[], None]] | None] = {}

    def run(places: Tensor, taken: int, drawn: int) -> None:
        kind = taken, drawn
        if kind not in held:
            held[kind] = None
            advance(places, taken, drawn)
            return
        if (kept := held[kind]) is None:
            own = places.clone()
            kept = held[kind] = own, captured(partial(advance, own, taken, drawn))
        kept[0].copy_(places)
        kept[1]()

    return run


def captured(work: Callable[[], None]) -> Callable[[], None]:
    """What replays the kernels that `work` launches, as one CUDA graph; `work` itself is not carried out."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


class _Step(NamedTuple):
    """What the model takes at once, and what is drawn from it."""

    position: int
    """How many tokens, text included, it took before."""
    cells: list[int]
    """Where the tokens stand; empty at first, where it takes the text and the cells that are known."""
    tokens: list[int]
    """The cells whose tokens they are."""
    predicting: list[int]
    """Which of them predict a cell: as many as `draws`."""
    draws: list[int]


def _steps(config: TransformerConfig, window: int, known: int) -> Iterator[_Step]:
    """In the order of `Diagonal`; a window of all columns is raster order."""
    text, cells = config.text_length, config.image_length
    if known == cells:
        return
    feeds = Diagonal(config.patterns[0], text, config.grid[1], window, known).feeds
    starts = np.searchsorted(feeds.round, np.arange(int(feeds.round[-1]) + 2))
    yield _Step(0, [], [], [0], [known])
    for first, stop in zip(starts[1:-1].tolist(), starts[2:].tolist(), strict=True):
        taken = slice(first, stop)
        predicted = [(turn, at - text) for turn, at in enumerate(feeds.draws[taken].tolist()) if 0 <= at - text < cells]
        if predicted:
            turns, draws = map(list, zip(*predicted, strict=True))
            where, whose = (part[taken] - text for part in (feeds.position, feeds.token))
            yield _Step(first, where.tolist(), whose.tolist(), turns, draws)


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
