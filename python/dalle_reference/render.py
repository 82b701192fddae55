"""Sheets of pictures with captions in any script, and curves of a run's metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dalle_reference.files import replacing

_GAP = 8
_MOST_SHOWN = 200
"""Letters of a caption."""


def to_picture(image: torch.Tensor, side: int) -> Image.Image:
    """[3, H, S] in 0..1 (or uint8) as a picture `side` pixels wide, each pixel a clean square where it can be."""
    if image.dtype != torch.uint8:
        image = (image.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    whole = side % picture.width == 0
    size = (side, round(side * picture.height / picture.width))
    return picture.resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def sheet(
    path: Path,
    images: torch.Tensor | Sequence[torch.Tensor],
    captions: Sequence[str] | None = None,
    columns: int = 8,
    side: int = 96,
    heading: str = "",
    footer: str = "",
) -> None:
    """Writes a sheet of pictures, row by row, each with its caption beneath.

    Args:
        path: the .png to write.
        images: N of [3, H, S] in 0..1 or uint8, all as high as the first.
        captions: N texts in any of Latin, Cyrillic, Chinese and Korean; None for none.
        columns: pictures in a row.
        side: width of a picture on the sheet, in pixels.
        heading, footer: what stands above and below, in as many lines as it takes.
    """
    size = 13
    captions = [" ".join(caption[:_MOST_SHOWN].split()) for caption in captions or ()]
    wrapped = [_wrap(caption, size, side + _GAP - 4) for caption in captions]
    line = size + 4
    text_height = max((len(lines) for lines in wrapped), default=0) * line + (4 if wrapped else 0)
    rows = math.ceil(len(images) / columns)
    width = columns * (side + _GAP) + _GAP
    above = _wrap(heading, size + 1, width - 2 * _GAP) if heading else []
    below = _wrap(footer, size - 3, width - 2 * _GAP) if footer else []
    top = len(above) * line + _GAP if above else 0
    height = round(side * images[0].shape[1] / images[0].shape[2])
    cell = height + text_height + _GAP
    canvas = Image.new("RGB", (width, top + rows * cell + _GAP + len(below) * line), "white")
    draw = ImageDraw.Draw(canvas)
    for number, text in enumerate(above):
        draw.text((_GAP, _GAP // 2 + number * line), text, fill="black", font=_font(heading, size + 1))
    for index, image in enumerate(images):
        left, upper = _GAP + index % columns * (side + _GAP), top + _GAP + index // columns * cell
        canvas.paste(to_picture(image, side), (left, upper))
        for number, text in enumerate(wrapped[index] if wrapped else []):
            font = _font(text, size)
            middle = left + (side - draw.textlength(text, font=font)) / 2
            draw.text((middle, upper + height + 2 + number * line), text, fill="black", font=font)
    for number, text in enumerate(below, -len(below)):
        draw.text((_GAP, canvas.height + number * line - 2), text, fill="#666666", font=_font(footer, size - 3))
    with replacing(path) as draft:
        canvas.save(draft, "png")


def pairs(
    path: Path, originals: torch.Tensor, decoded: torch.Tensor, *, columns: int = 8, heading: str, footer: str = ""
) -> None:
    """Writes a sheet of rows of originals, each above the row of what a dVAE makes of them: [N, 3, S, S] in 0..1."""
    rows: list[torch.Tensor] = []
    for above, below in zip(originals.split(columns), decoded.split(columns), strict=True):
        blank = torch.ones_like(below[0])
        for row in (above, below):
            rows += [*row, *[blank] * (columns - len(row))]
    sheet(path, rows, columns=columns, heading=heading, footer=footer)


def _wrap(text: str, size: int, width: int, most: int = 3) -> list[str]:
    """Lines no wider than `width`; broken at spaces, or anywhere in scripts that have none; at most `most`."""
    font = _font(text, size)
    pieces = [piece + " " for piece in text.split()] if " " in text else list(text)
    pieces = [part for piece in pieces for part in ([piece] if font.getlength(piece) <= width else list(piece))]
    lines = [""]
    for piece in pieces:
        if lines[-1] and font.getlength((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1].rstrip()[:-1] + "…"]
    return [line.strip() for line in lines]


@cache
def _load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    if name == "latin":
        import matplotlib

        return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)
    from importlib.resources import files

    folder = files("justmytype_intl_cjk") / "fonts" / "ofl"
    font = ImageFont.truetype(str(folder / name.lower() / f"{name}[wght].ttf"), size)
    font.set_variation_by_axes([400])
    return font


def _font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that has every letter of `text`: Noto Sans for Korean and Chinese, DejaVu Sans for the rest."""
    codes = [ord(character) for character in text]
    if any(0xAC00 <= code < 0xD7B0 or 0x1100 <= code < 0x1200 or 0x3130 <= code < 0x3190 for code in codes):
        return _load_font("NotoSansKR", size)
    if any(0x2E80 <= code < 0xA4D0 or 0xF900 <= code < 0xFB00 or 0xFE30 <= code < 0xFFF0 for code in codes):
        return _load_font("NotoSansSC", size)
    return _load_font("latin", size)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a metrics.jsonl; a last line that a kill cut short is left out."""
    records: list[dict[str, float]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        records.append(record)
    return records


def curves(path: Path, runs: Mapping[str, Path], panels: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """Draws metrics of runs: for each run's name its metrics.jsonl, and its panels, each a list of metrics.

    Example:
        >>> curves(Path("curves.png"), {"dVAE": run / "metrics.jsonl"}, {"dVAE": [["nll"], ["kl"]]})
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(len(entries) for entries in panels.values())
    figure = Figure(figsize=(3.6 * columns, 2.6 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), columns, squeeze=False)
    for row, (run, entries) in zip(axes, panels.items(), strict=True):
        records = read_metrics(runs[run])
        for axis in row[len(entries) :]:
            axis.set_visible(False)
        for axis, metrics in zip(row, entries, strict=False):
            for metric in metrics:
                points = [(record["step"], record[metric]) for record in records if metric in record]
                if points:
                    steps, values = np.array(points).T
                    axis.plot(steps, values, linewidth=0.8, alpha=0.35 if len(points) > 50 else 1.0, color="C0")
                    if len(points) > 50:
                        window = max(2, len(points) // 50)
                        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
                        axis.plot(steps[window - 1 :], smooth, linewidth=1.4, color="C0")
            axis.set_title(f"{run}: {', '.join(metrics)}", fontsize=9)
            axis.set_xlabel("step", fontsize=8)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
    with replacing(path) as draft:
        figure.savefig(draft, dpi=110)


def lines(path: Path, places: Sequence[float], values: Mapping[str, Sequence[float]], across: str, up: str) -> None:
    """Draws named lines over `places`, which are apart by factors; `across` and `up` say what the axes are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, heights in values.items():
        axis.plot(places, heights, marker="o", label=name)
    axis.set(xscale="log", xlabel=across, ylabel=up, ylim=(0, None))
    axis.set_xticks(places, [f"{place:g}" for place in places])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    with replacing(path) as draft:
        figure.savefig(draft, dpi=110)
