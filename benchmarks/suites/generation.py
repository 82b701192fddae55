"""Sampling pictures with the reference transformer: cached by ours, cached by SDPA, uncached, and 1 to 512 candidates
of a caption; then so many of other projects' models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from dalle_reference.generate import generate
from dalle_reference.transformer import PRESETS, DalleTransformer, TransformerConfig
from torch import Tensor

from benchmarks.harness import Cell, Check, Contender, Trial, Work, dtype_name
from benchmarks.suites import integrations, integrations_rudalle, integrations_transformers
from benchmarks.suites.choice import Choice
from benchmarks.suites.models import SdpaMasked, attention_of, autocast
from dalle_kernels.nn import SparseSelfAttention


def cells(choice: Choice) -> list[Cell]:
    """One picture's tokens after a caption; the last cells of it alone, where the whole would take too long. Then many
    candidates of one caption, whole pictures; and of other projects' models, before and after."""
    dtypes = choice.dtypes or ((torch.bfloat16,) if choice.gpu else (torch.float32,))
    batches = (1, 16) if choice.gpu else (1,) if choice.quick else (1, 4)
    candidates = (1, 16, 64, 512)
    grids, texts = choice.grids or (32,), choice.texts or (256,)
    return (
        [
            cell(choice.device, text, grid, dtype, batch, tokens=2 if choice.quick and not choice.gpu else None)
            for grid in grids
            for text in texts
            for dtype in dtypes
            for batch in batches
        ]
        + [
            # On a CPU, 512 whole pictures on SDPA take minutes: the last cells of them alone.
            candidates_cell(
                choice.device,
                dtype,
                number,
                tokens=None if choice.gpu else 8 if choice.quick else 32,
                preset="demo" if choice.quick else "small",
                compiled=number == 16 or not choice.quick,  # which takes longer than all else
            )
            for dtype in dtypes
            for number in candidates
        ]
        + [
            replace(cell, suite="generation")
            # Other projects keep each candidate's prompt: of many they take minutes.
            for number in (candidates[:2] if choice.quick else candidates)
            for cell in peers_cells(choice.device, number, choice.quick and not choice.gpu)
        ]
    )


def peers_cells(device: torch.device, number: int, small: bool) -> list[Cell]:
    """Cells of `number` candidates of one caption, by DALLE-pytorch, ruDALL-E and transformers, in float32."""
    tokens, grid, text, heads = (4, 8, 16, 2) if small else (16, 32, 256, 8)
    sizes = number, tokens, grid, text, 64 * heads
    return [
        integrations.dalle_pytorch_sampling(device, 1, 1.0, tokens, grid, text, heads, number),
        integrations_rudalle.candidates_cell(device, *sizes),
        integrations_transformers.candidates_cell(device, *sizes),
    ]


def candidates_cell(
    device: torch.device,
    dtype: torch.dtype,
    number: int,
    tokens: int | None = None,
    preset: str = "small",
    compiled: bool = True,
) -> Cell:
    """Pictures of one caption, or their last `tokens` cells: the caption read and kept once, and as often as drawn; in
    eight bits, with compiled blocks, and on SDPA over dense caches. Against the copy of what the steps have to read:
    the weights, and the keys and values that are seen, the caption's once.
    """
    case = {"preset": preset, "candidates": number, "tokens": tokens or "all", "dtype": dtype_name(dtype)}

    def work() -> Work:
        config = PRESETS[preset]
        with torch.device("meta"):
            weights = sum(parameter.numel() for parameter in DalleTransformer(config).parameters())
        given = config.text_length + config.image_length - (tokens or config.image_length)
        keys = 0
        for pattern in config.patterns:
            seen = pattern.mask()[given : config.text_length + config.image_length - 1]
            keys += int(seen[:, :given].sum()) + number * int(seen[:, given:].sum())
        steps = config.text_length + config.image_length - given
        return Work(bytes=dtype.itemsize * (steps * weights + 2 * config.width * keys), ceiling="copy")

    def draw(copies: int, attention: type[SparseSelfAttention] = SparseSelfAttention, **options: Any) -> Trial:
        torch.manual_seed(0)
        config = PRESETS[preset]
        model = DalleTransformer(config).to(device).eval()
        if options.pop("compiled", False):
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * config.layers)
            for block in model.layers:  # one graph each, as each has a cache of its own
                block.step = torch.compile(block.step)  # type: ignore[method-assign]
        text = torch.randint(config.vocab_text, (1, config.caption_length), device=device)
        given = config.image_length - (tokens or config.image_length)
        prefix = torch.randint(config.vocab_image, (1, given), device=device)

        def run(copies: int = copies) -> Tensor:
            repeats = number // copies
            with attention_of(model, attention), autocast(device, dtype):
                return generate(
                    model,
                    text.expand(repeats, -1),
                    seed=1,
                    number=copies,
                    temperature=0.0,
                    image_prefix=prefix.expand(repeats, -1),
                    **options,
                )

        def verify() -> Check:
            """Greedy tokens against those of plain calls, of the first cell that is drawn with the cache's help: later
            ones may part where two are close, and this one too in fewer bits; then of the cell before it."""
            exact = dtype == torch.float32 and "cache_dtype" not in options
            cell = min(given + exact, config.image_length - 1)
            with autocast(device, dtype):
                wanted = generate(model, text, seed=1, temperature=0.0, image_prefix=prefix, use_cache=False)
            return Check((run()[:, cell] != wanted[:, cell]).double().mean().item(), 0.0)

        drawn = number * (config.image_length - given)
        return Trial([run], verify, counts={"tokens": drawn, "pictures": drawn / config.image_length})

    def contenders() -> Iterable[Contender]:
        yield Contender("dalle_kernels, the caption once", partial(draw, number))
        yield Contender("dalle_kernels, a caption for each", partial(draw, 1))
        yield Contender("dalle_kernels, eight bits", partial(draw, number, cache_dtype=torch.int8))
        if compiled:
            yield Contender("dalle_kernels, compiled blocks", partial(draw, number, compiled=True))
        yield Contender("SDPA mask, full cache", partial(draw, 1, SdpaMasked))

    return Cell("generation", case, dtype, work, contenders, f"{preset} {number} {dtype_name(dtype)}")


def cell(
    device: torch.device,
    text: int,
    grid: int,
    dtype: torch.dtype,
    batch: int,
    layers: int = 4,
    heads: int = 8,
    tokens: int | None = None,
) -> Cell:
    """Drawing the last `tokens` cells of a picture, greedily; reading the prefix before them is part of the time."""
    tokens = tokens or min(grid * grid, 512 if device.type == "cuda" else 32)
    case = {
        "grid": grid,
        "text": text,
        "layers": layers,
        "heads": heads,
        "batch": batch,
        "tokens": tokens,
        "dtype": dtype_name(dtype),
    }

    config = TransformerConfig(
        vocab_text=2048, text_length=text, grid=(grid, grid), vocab_image=1024, layers=layers, heads=heads
    )

    def contenders() -> Iterable[Contender]:
        drawing = Drawing(device, config, dtype, batch, tokens)
        yield Contender("dalle_kernels, cached", partial(drawing.trial, SparseSelfAttention, True))
        yield Contender("SDPA mask, full cache", partial(drawing.trial, SdpaMasked, True))
        yield Contender("dalle_kernels, uncached", partial(drawing.trial, SparseSelfAttention, False))
        yield Contender("SDPA mask, uncached", partial(drawing.trial, SdpaMasked, False))

    return Cell("generation", case, dtype, Work, contenders, f"{text} {batch} {dtype_name(dtype)}")


class Drawing:
    """One model and the pictures' beginnings, which all contenders go on with."""

    def __init__(
        self, device: torch.device, config: TransformerConfig, dtype: torch.dtype, batch: int, tokens: int
    ) -> None:
        torch.manual_seed(0)
        self.device, self.dtype, self.tokens = device, dtype, tokens
        self.model = DalleTransformer(config).to(device).eval()
        self.text = torch.randint(config.vocab_text, (batch, config.caption_length), device=device)
        self.prefix = torch.randint(config.vocab_image, (batch, config.image_length - tokens), device=device)

    def draw(self, cached: bool) -> Tensor:
        with autocast(self.device, self.dtype):
            return generate(self.model, self.text, seed=1, temperature=0.0, image_prefix=self.prefix, use_cache=cached)

    def trial(self, attention: type[SparseSelfAttention], cached: bool) -> Trial:
        def run() -> Tensor:
            with attention_of(self.model, attention):
                return self.draw(cached)

        def verify() -> Check:
            """The first greedy token against SDPA's without a cache; later ones may part where two are close."""
            with attention_of(self.model, SdpaMasked), autocast(self.device, self.dtype), torch.no_grad():
                wanted = self.model.image_head(self.model.hidden(self.text, self.prefix)[:, -1]).argmax(dim=-1)
            return Check((run()[:, self.prefix.shape[1]] != wanted).double().mean().item(), 0.0)

        tokens = self.text.shape[0] * self.tokens
        return Trial([run], verify, counts={"tokens": tokens, "pictures": tokens / self.model.config.image_length})
