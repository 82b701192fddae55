"""What other orders of drawing, and caches of eight bits, cost in quality and give in speed, by a demo's model.

    dalle-reference demo                          # once; it leaves runs/demo
    python -m benchmarks drawing runs/demo        # the table; --quick tries it with a few captions

Each way draws the pictures of the captions that the demo asks for, with its settings and one seed. Beside the time
stand the steps that a picture takes, the retrieval (how often the training picture nearest to a drawn one by its tokens
is the caption's own), and the likelihood: what the model, reading a drawn picture in raster order, gives its tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Row(NamedTuple):
    """One way of drawing, measured."""

    way: str
    steps: int
    seconds: float
    """For all captions at once, the median of several times."""
    right: float
    """The share of captions whose picture is found."""
    nats: float
    """Minus the log-likelihood of a token, the mean over all of them."""


def ways(columns: int, quick: bool) -> dict[str, dict[str, Any]]:
    """Arguments of `generate` by what the table calls them."""
    windows = [columns // 2] if quick else [columns, columns * 3 // 4, columns // 2, columns // 4, 1]
    found: dict[str, dict[str, Any]] = {"raster": {}, "raster, eight bits": {"cache_dtype": torch.int8}}
    for window in sorted({max(window, 1) for window in windows}, reverse=True):
        found[f"diagonal, window {window}"] = {"order": "diagonal", "window": window}
    half = {"order": "diagonal", "window": max(columns // 2, 1), "cache_dtype": torch.int8}
    return found | {f"diagonal, window {half['window']}, eight bits": half}


def measure(
    model: Any, text: Tensor, targets: Tensor, gallery: Tensor, quick: bool, seed: int = 0, **sampling: Any
) -> Iterator[Row]:
    """A row for each way; the ways take turns. `targets` [B]: the rows of `gallery` [N, cells] that captions mean."""
    from dalle_reference.evaluate import retrieval
    from dalle_reference.generate import generate

    asked = ways(model.config.grid[1], quick)
    seconds: dict[str, list[float]] = {way: [] for way in asked}
    steps: dict[str, int] = {}
    drawn: dict[str, Tensor] = {}
    for _ in range(1 if quick else 5):
        for way, options in asked.items():
            calls: list[int] = []
            began = time.perf_counter()
            drawn[way] = generate(
                model, text, seed=seed, progress=lambda done, _, calls=calls: calls.append(done), **sampling, **options
            )
            if text.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[way].append(time.perf_counter() - began)
            steps[way] = len(calls)
    for way, tokens in drawn.items():
        with torch.no_grad():
            _, logits = model(text, tokens)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()).item()
        right = retrieval(tokens.cpu(), targets, gallery).right
        yield Row(way, steps[way], median(seconds[way]), right, nats)


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown; speed as times the first row's."""
    lines = ["| way | steps | seconds | times as fast | retrieval | nats a token |", "|---|---|---|---|---|---|"]
    for row in rows:
        speed = rows[0].seconds / row.seconds
        lines.append(
            f"| {row.way} | {row.steps} | {row.seconds:.3g} | {speed:.2f}x | {row.right:.1%} | {row.nats:.4f} |"
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("demo", type=Path, nargs="?", default=Path("runs/demo"), help="what `demo` left")
    parser.add_argument("--quick", action="store_true", help="16 captions, once, and two windows")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cache", type=Path, help="where the demo's decoded pictures are kept")
    options = parser.parse_args(arguments)
    from dalle_reference import demo
    from dalle_reference.loop import autocast

    asked = demo.asked(demo.DemoConfig(out=options.demo, device=options.device, cache=options.cache))
    count = 16 if options.quick else len(asked.text)
    with autocast(asked.precision, asked.text.device):
        rows = measure(
            asked.model, asked.text[:count], asked.targets[:count], asked.gallery, options.quick, **demo.SAMPLING
        )
        print(*table(list(rows)), sep="\n")
    return 0
