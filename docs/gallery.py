"""The gallery of patterns: a section each, with what is counted, drawn and quoted from the code itself."""

from __future__ import annotations

import ast
import inspect
import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

import dalle_kernels
from dalle_kernels import patterns
from dalle_kernels.patterns import Pattern, picture, schedule_for
from dalle_kernels.patterns.decode_table import decode_table_for
from dalle_kernels.simulate import report

TILE = (64, 64)


class Shown(NamedTuple):
    """One entry: an expression that makes the pattern, and where the pattern comes from."""

    title: str
    code: str
    source: str
    imports: str = ""  # what the expression needs besides dalle_kernels' names


_PAPER = "Ramesh et al. 2021, Zero-Shot Text-to-Image Generation"
_SPARSE = "Child et al. 2019, Generating Long Sequences with Sparse Transformers"
SHOWN = (
    Shown("Causal", "Causal(TokenLayout(256, (32, 32)))", "every autoregressive transformer: the dense baseline"),
    Shown("Row", "Row(TokenLayout(256, (32, 32)))", f"{_PAPER}, figure 11a"),
    Shown("Column", "Column(TokenLayout(256, (32, 32)))", f"{_PAPER}, figure 11b and c"),
    Shown("Convolution", "Convolution(TokenLayout(256, (32, 32)), kernel_size=11)", f"{_PAPER}, figure 11d"),
    Shown("Convolution, clamped", 'Convolution(TokenLayout(256, (32, 32)), 11, "clamp")', "ru-dalle, version 3"),
    Shown("Convolution on a torus", 'Convolution(TokenLayout(256, (32, 32)), 11, "torus")', "ru-dalle, version 2"),
    Shown(
        "Convolution from a corner, dilated",
        'Convolution(TokenLayout(256, (32, 32)), 5, "corner", dilation=2)',
        "DALLE-pytorch, `conv_like`",
    ),
    Shown("AxialRow", "AxialRow(TokenLayout(256, (32, 32)))", "DALLE-pytorch, `axial_row`"),
    Shown("Neighborhood", "Neighborhood((32, 32), window=7)", "Hassani et al. 2023, Neighborhood Attention; NATTEN"),
    Shown(
        "Neighborhood, dilated",
        "Neighborhood((32, 32), window=7, dilation=4)",
        "Hassani and Shi 2022, Dilated Neighborhood Attention; NATTEN",
    ),
    Shown(
        "Neighborhood with a stride",
        "Neighborhood((32, 32), window=8, stride=4)",
        "Hassani et al. 2025, Generalized Neighborhood Attention; NATTEN",
    ),
    Shown(
        "Neighborhood after text, causal along rows",
        "Neighborhood(TokenLayout(256, (32, 32)), window=7, causal=(True, False))",
        "NATTEN's `is_causal`, behind a caption",
    ),
    Shown("Neighborhood in three dimensions", "Neighborhood((4, 16, 16), window=(2, 5, 5))", "NATTEN's `na3d`: video"),
    Shown("Strided", "Strided(length=1024, stride=32)", f"{_SPARSE}, section 4.3"),
    Shown("Fixed", "Fixed(length=1024, stride=64, summary=8)", f"{_SPARSE}, section 4.3"),
    Shown(
        "Packed",
        "Packed((Row(TokenLayout(64, (16, 32))), Row(TokenLayout(64, (24, 16)))))",
        "Dehghani et al. 2023, Patch n' Pack: NaViT",
    ),
    Shown(
        "Union",
        "Row(TokenLayout(256, (32, 32))) | Column(TokenLayout(256, (32, 32)))",
        "Ho et al. 2019, Axial Attention",
    ),
    Shown(
        "Intersection",
        "Causal(TokenLayout(0, (32, 32))) & Neighborhood((32, 32), window=9)",
        "composed: what two patterns both show",
    ),
    Shown("Shifted", "Row(TokenLayout(64, (16, 32))).shifted(128, 1024)", "composed: a picture within a longer stream"),
    Shown(
        "Diagonal",
        "Diagonal(Row(TokenLayout(256, (32, 32))), first=256, columns=32, window=8)",
        "He et al. 2024, ZipAR: an order of drawing, rows of a picture side by side",
    ),
    Shown(
        "MaskPattern",
        "MaskPattern((torch.rand(1024, 1024) < 0.02).tril() | torch.eye(1024).bool())",
        "any boolean matrix of your own",
        "import torch\n\ntorch.manual_seed(0)\n",
    ),
)


def make(shown: Shown) -> Pattern:
    names: dict[str, Any] = {name: getattr(patterns, name) for name in patterns.__all__}
    exec(shown.imports, names)
    return eval(shown.code, names)


def missing() -> list[str]:
    """The public patterns that the gallery does not show."""
    kinds = [getattr(patterns, name) for name in patterns.__all__]
    kinds = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Pattern) and kind is not Pattern]
    seen = {type(make(shown)) for shown in SHOWN}
    return [kind.__name__ for kind in kinds if kind not in seen]


def pages() -> Iterator[tuple[str, str | bytes]]:
    """(path, content): the page and its pictures."""
    if absent := missing():
        raise ValueError(f"docs/gallery.py shows no {', '.join(absent)}")
    lines = [_HEAD]
    for shown in SHOWN:
        pattern = make(shown)
        name = shown.title.lower().replace(" ", "-").replace(",", "")
        lines += _section(shown, pattern, name)
        for kind, image in draw(pattern).items():
            yield f"patterns/{name}-{kind}.png", image
    yield "patterns/index.md", "\n".join(lines)


_HEAD = """# Every pattern

A pattern says which keys each query sees; [your own](own.md) is one expression. Beside each: its mask in the order in
which kernels walk the tokens, its tiles of 64 x 64 (white is skipped, light is full, dark needs a bit mask), that order
over the grid from dark to bright, and what the query in the middle sees (bright: itself). The figures are counted by
`dalle_kernels.simulate` when this page is built.
"""


def _section(shown: Shown, pattern: Pattern, name: str) -> list[str]:
    used = {node.id for node in ast.walk(ast.parse(shown.code)) if isinstance(node, ast.Name)} - {"torch"}
    called = sorted(used & set(patterns.__all__))
    home = "dalle_kernels" if all(hasattr(dalle_kernels, name) for name in called) else "dalle_kernels.patterns"
    titles = {"pairs": "the mask", "tiles": "its tiles", "order": "the order of tokens", "keys": "one query's keys"}
    grid = pattern.grid_or_none
    kinds = ["pairs", "tiles", *(["order", "keys"] if grid else [])]
    figures = "\n".join(f"![{shown.title}: {titles[kind]}]({name}-{kind}.png)" for kind in kinds)
    code = f"{shown.imports}from {home} import {', '.join(called)}\n\npattern = {shown.code}"
    said = inspect.cleandoc(type(pattern).__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return [
        f"## {shown.title}",
        "",
        said,
        "",
        f"Source: {shown.source}.",
        "",
        f'<div class="panels" markdown>\n{figures}\n</div>',
        "",
        "```python",
        code,
        "```",
        "",
        "```text",
        *report(pattern)[1:],
        *_cache(pattern),
        "```",
        "",
    ]


def _cache(pattern: Pattern) -> list[str]:
    try:
        table = decode_table_for(pattern)
    except ValueError:  # some query sees a later key
        return []
    return [f"decoding          a cache of {table.cache_length:,} tokens holds all that is still to be seen"]


def draw(pattern: Pattern) -> dict[str, bytes]:
    """PNG files by what they show."""
    schedule, grid = schedule_for(pattern, TILE), pattern.grid_or_none
    drawn = {
        "pairs": _panel(lambda axis: picture.draw_pairs(axis, pattern, schedule)),
        "tiles": _panel(lambda axis: picture.draw_tiles(axis, schedule)),
    }
    if grid is not None:
        place = np.empty(pattern.length)
        place[schedule.order.numpy()] = np.arange(pattern.length)
        cells = place[grid.text_length :].reshape(grid.shape)
        cells = np.concatenate(list(cells), 1) if cells.ndim == 3 else cells
        drawn["order"] = _panel(lambda axis: _draw_order(axis, cells))
        drawn["keys"] = _panel(lambda axis: picture.draw_keys(axis, pattern, grid, picture.middle(pattern)))
    return drawn


def _draw_order(axis: Any, cells: np.ndarray) -> None:
    axis.imshow(cells, cmap="magma", interpolation="nearest")
    axis.set(title="order: first dark, last bright", xticks=[], yticks=[])


def _panel(draw: Any) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4.2), layout="constrained")
    draw(figure.subplots())
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
