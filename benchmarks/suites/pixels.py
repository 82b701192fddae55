"""A picture as 12,288 tokens, the bytes of 64 x 64 pixels, as the Sparse Transformer has ImageNet-64: a training step
and the drawing of a picture's end, against dense attention in time and memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from dalle_reference.pixels import PRESETS
from dalle_reference.transformer import TransformerConfig

from benchmarks.harness import Cell, Contender, Work, dtype_name
from benchmarks.suites.choice import Choice
from benchmarks.suites.generation import Drawing
from benchmarks.suites.models import NoAttention, SdpaCausal, SdpaMasked
from benchmarks.suites.training import Step
from dalle_kernels.nn import SparseSelfAttention


def cells(choice: Choice) -> list[Cell]:
    """`--grid` is a picture's side. On a GPU the model is as wide as "sparse-transformer", else as "bytes"."""
    dtypes = choice.dtypes or ((torch.bfloat16,) if choice.gpu else (torch.float32, torch.bfloat16))
    sides = choice.grids or ((16,) if choice.quick and not choice.gpu else (64,))
    batches, tokens = ((1,), 32) if choice.quick else ((1, 8), 512)
    found = []
    for side in sides:
        for dtype in dtypes[:1] if choice.quick else dtypes:
            found.append(step_cell(choice.device, side, dtype))
            found += [drawing_cell(choice.device, side, dtype, batch, tokens) for batch in batches]
    return found


def _config(device: torch.device, side: int) -> tuple[TransformerConfig, dict[str, int | str]]:
    preset = PRESETS["sparse-transformer" if device.type == "cuda" else "bytes"]
    config = replace(preset, resolution=side, layers=4).transformer
    return config, {"picture": f"{side} x {side} x 3", "layers": config.layers, "heads": config.heads}


def step_cell(device: torch.device, side: int, dtype: torch.dtype) -> Cell:
    """Forward, backward and the optimizer's step of one picture."""
    config, case = _config(device, side)

    def contenders() -> Iterable[Contender]:
        step = Step(device, config, dtype, batch=1)
        yield Contender("dalle_kernels", step.trial)
        yield Contender("SDPA mask", partial(step.trial, SdpaMasked))
        yield Contender("SDPA causal in every layer", partial(step.trial, SdpaCausal, same=False))
        yield Contender("no attention at all", partial(step.trial, NoAttention, same=False))

    case |= {"pass": "training step", "batch": 1, "dtype": dtype_name(dtype)}
    return Cell("pixels", case, dtype, Work, contenders, f"step {dtype_name(dtype)}")


def drawing_cell(device: torch.device, side: int, dtype: torch.dtype, batch: int, tokens: int) -> Cell:
    """The last `tokens` bytes of pictures, greedily; reading what is before them is part of the time."""
    config, case = _config(device, side)

    def contenders() -> Iterable[Contender]:
        drawing = Drawing(device, config, dtype, batch, tokens)
        yield Contender("dalle_kernels, cached", partial(drawing.trial, SparseSelfAttention, True))
        yield Contender("SDPA mask, full cache", partial(drawing.trial, SdpaMasked, True))

    case |= {"pass": "drawing", "batch": batch, "tokens": tokens, "dtype": dtype_name(dtype)}
    return Cell("pixels", case, dtype, Work, contenders, f"drawing {batch} {dtype_name(dtype)}")
