"""What the page shows: pictures drawn row by row, completed and named, as HTML; and what patterns see, as pictures."""

from __future__ import annotations

import ast
import base64
import html
import io
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_kernels.patterns import Pattern, Schedule, picture
from dalle_kernels.simulate import parse, report
from dalle_reference.clip import CLIP
from dalle_reference.data import decode_picture
from dalle_reference.dvae import DiscreteVAE
from dalle_reference.errors import UserError
from dalle_reference.files import read_bounded
from dalle_reference.generate import generate
from dalle_reference.judge import agreement, name_shares
from dalle_reference.tokenizer import CaptionTokenizer
from dalle_reference.transformer import DalleTransformer

MOST_BYTES, _MOST_PIXELS = 8 << 20, 1 << 24
"""Of a picture that is sent in."""
MOST_NAMES, MOST_LETTERS = 50, 500
"""That one person may ask for: names, letters of a text."""
_MOST_TOKENS, _TILE = 4096, (64, 64)
"""Of a pattern."""


@dataclass(frozen=True)
class Painter:
    """What draws: a transformer, its tokenizer, its dVAE."""

    model: DalleTransformer
    tokenizer: CaptionTokenizer
    dvae: DiscreteVAE


@dataclass(frozen=True)
class Judge:
    """What ranks and names: a CLIP and its tokenizer."""

    clip: CLIP
    tokenizer: CaptionTokenizer


def draw(
    painter: Painter,
    judge: Judge | None,
    caption: str,
    number: int,
    temperature: float,
    guidance_scale: float,
    seed: int | None,
    file: str | None = None,
    kept: int = 0,
    *,
    warn: Callable[[str], object] | None = None,
) -> Iterator[str]:
    """Pictures of a caption as HTML, after each row and once at the end, with a judge then best first.

    Args:
        file: a picture whose first `kept` rows of tokens every picture begins with.
        warn: told of a caption of which the model reads the beginning only.

    Raises:
        UserError: for a file that is no picture, or none where rows are to be kept.
    """
    config, device = painter.model.config, painter.model.row_position.device
    caption = caption[:MOST_LETTERS]
    if warn is not None and painter.tokenizer.is_cut(caption, config.caption_length):
        warn(f"The caption is long: the model reads its first {config.caption_length} tokens.")
    prefix = None
    if kept:
        pixels = _picture(file, painter.dvae.config.resolution)[None].to(device) / 255.0
        prefix = painter.dvae.encode(pixels).flatten(1)[:, : int(kept) * config.grid[1]]
    text = painter.tokenizer.encode([caption], config.caption_length).to(device)
    settings = {"temperature": temperature, "guidance_scale": guidance_scale, "image_prefix": prefix}
    for rows, tokens in _by_rows(painter.model, text, number=int(number), seed=int(seed or 0), **settings):
        pictures = painter.dvae.decode(tokens.unflatten(1, config.grid))
        pictures[:, :, rows * pictures.shape[2] // config.grid[0] :] = 0.9
        yield _figures(pictures, [f"row {rows} of {config.grid[0]}"] * len(pictures))
    if judge is None:
        yield _figures(pictures, [caption] * len(pictures))
    else:
        agreed = agreement(judge.clip, judge.tokenizer, pictures, caption)
        best = agreed.argsort(descending=True)
        yield _figures(pictures[best], [f"agreement {value:.2f}" for value in agreed[best].tolist()])


def _by_rows(model: DalleTransformer, text: Tensor, **settings: Any) -> Iterator[tuple[int, Tensor]]:
    """What `generate` draws, whenever a row is done: how many are, and the tokens [B * number, H * W] so far.

    Whoever closes the iterator, as is done when somebody leaves the page, ends the drawing too.
    """
    news: queue.SimpleQueue[tuple[int, Tensor] | BaseException | None] = queue.SimpleQueue()
    rows, columns = model.config.grid
    left = threading.Event()

    def tell(done: int, tokens: Tensor) -> None:
        if left.is_set():
            raise GeneratorExit
        if done % columns == 0 and done < rows * columns:
            news.put((done // columns, tokens.clone()))

    def work() -> None:
        try:
            news.put((rows, generate(model, text, progress=tell, **settings)))
            news.put(None)
        except BaseException as error:  # handed to whoever reads
            news.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while (item := news.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        left.set()


def classify(judge: Judge, file: str | None, names: str) -> tuple[str, dict[str, float]]:
    """The picture as CLIP sees it, as HTML, and how likely each of the names is, one a line.

    Raises:
        UserError: for a file that is no picture, and where there is no name, or too much of them.
    """
    pixels = _picture(file, judge.clip.config.resolution)
    listed = list(dict.fromkeys(name.strip()[:MOST_LETTERS] for name in names.splitlines() if name.strip()))
    if not 1 <= len(listed) <= MOST_NAMES:
        raise UserError(f"names: got {len(listed)}, wanted 1 to {MOST_NAMES}, one a line")
    shares = name_shares(judge.clip, judge.tokenizer, pixels[None], listed)[0].tolist()
    return _figures(pixels[None], ["as the model sees it"]), dict(zip(listed, shares, strict=True))


def _picture(file: str | None, resolution: int) -> Tensor:
    """uint8 [3, S, S] of a file that was sent in."""
    if file is None:
        raise UserError("picture: got none, wanted a file")
    path = Path(file)
    try:
        data = read_bounded(path, MOST_BYTES)
    except UserError as error:  # where uploads lie is no business of those who send them
        raise UserError(str(error).removeprefix(f"{path.parent}/")) from error
    try:
        with Image.open(io.BytesIO(data)) as opened:
            pixels = opened.width * opened.height
    except Exception as error:  # what a damaged file raises depends on its format
        raise UserError(f"{path.name}: cannot be read as a picture") from error
    if pixels > _MOST_PIXELS:
        raise UserError(f"{path.name}: has {pixels:,} pixels, wanted at most {_MOST_PIXELS:,}")
    return decode_picture(data, resolution, path.name)


def _figures(pictures: Tensor, captions: Sequence[str]) -> str:
    """Pictures [N, 3, S, S], uint8 or in 0..1, as HTML, each with its caption beneath."""
    if pictures.dtype != torch.uint8:
        pictures = (pictures.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    figures = []
    for pixels, caption in zip(pictures.permute(0, 2, 3, 1).cpu().numpy(), captions, strict=True):
        stored = io.BytesIO()
        Image.fromarray(pixels).save(stored, "png")
        source = f"data:image/png;base64,{base64.b64encode(stored.getvalue()).decode()}"
        words = html.escape(caption)
        figures.append(f'<figure><img src="{source}" alt="{words}"><figcaption>{words}</figcaption></figure>')
    return f'<div class="pictures">{"".join(figures)}</div>'


def look(expression: str, point: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray, str]:
    """A pattern in two pictures, uint8 [rows, columns, 3], and in words.

    The first shows the tokens, text above the grid, and which of them the query sees (blue; orange: itself); the second
    the schedule's tiles (white: skipped, light: full, dark: masked), those of the query's row in orange.

    Args:
        expression: as `dalle_kernels.simulate.parse` takes it.
        point: (x, y) on the first picture, the query; the middle of the grid where None.

    Raises:
        ValueError: for an expression that makes no pattern, or one that is too large for the page.
    """
    pattern = _pattern(expression)
    places = token_places(pattern)
    scale = max(2, min(24, 560 // max(places.shape)))
    query = picture.middle(pattern)
    if point is not None:
        x, y = (min(at // scale, side - 1) for at, side in zip(point, places.shape[::-1], strict=True))
        query = int(places[y, x]) if places[y, x] >= 0 else query
    seen = picture.keys_of(pattern, query)
    kinds = np.ones(pattern.length + 1, int)
    kinds[seen], kinds[query], kinds[-1] = 2, 3, 0  # the last is where no token stands
    words = [f"query             {query:,}, which sees {len(seen):,} keys", *report(pattern, _TILE)[1:]]
    return _enlarge(_SHADES[kinds[places]], scale), _tiles(pattern, query), "\n".join(words)


_SHADES = np.array([[255, 255, 255], [226, 228, 232], [66, 133, 214], [240, 140, 40]], np.uint8)
"""Nothing, a token, a key, the query."""
_TILE_SHADES = np.array(
    [[[255, 255, 255], [170, 200, 235], [40, 90, 160]], [[255, 240, 225], [250, 190, 120], [220, 110, 20]]], np.uint8
)
"""Skipped, full and masked tiles; those that the query is in."""


def _pattern(expression: str) -> Pattern:
    """The pattern of an expression that is small enough to be drawn while others wait."""
    wanted = f"wanted at most {_MOST_TOKENS:,}"
    if len(expression) > MOST_LETTERS:
        raise ValueError(f"pattern: got {len(expression):,} letters, wanted at most {MOST_LETTERS}")
    try:
        numbers = [node.value for node in ast.walk(ast.parse(expression.strip())) if isinstance(node, ast.Constant)]
    except (SyntaxError, RecursionError, MemoryError):
        numbers = []  # `parse` says what is wrong
    if too_large := [number for number in numbers if isinstance(number, int) and number > _MOST_TOKENS]:
        raise ValueError(f"pattern: got the number {too_large[0]:,}, {wanted} on this page")
    pattern = parse(expression)
    if pattern.length > _MOST_TOKENS:
        raise ValueError(f"pattern: got {pattern.length:,} tokens, {wanted} on this page")
    return pattern


def token_places(pattern: Pattern) -> np.ndarray:
    """Which token stands where on a picture: int [rows, columns], -1 for none.

    Text comes first, then the grid, layer by layer, each after an empty row; tokens without a grid fill a square.
    """
    grid = pattern.grid_or_none
    front, shape = (0, (pattern.length,)) if grid is None else (grid.text_length, grid.shape)
    columns = shape[-1] if len(shape) > 1 else math.ceil(math.sqrt(pattern.length))
    text, cells = np.split(np.arange(pattern.length), [front])
    parts = [text] if text.size else []
    parts += np.split(cells, math.prod(shape[:-2])) if len(shape) > 2 else [cells]
    rows = [np.full((1, columns), -1)]
    for part in parts:
        rows += [np.pad(part, (0, -part.size % columns), constant_values=-1).reshape(-1, columns), rows[0]]
    return np.concatenate(rows[1:-1])


def _tiles(pattern: Pattern, query: int) -> np.ndarray:
    schedule = Schedule.build(pattern, _TILE)
    query_tiles, key_tiles = schedule.key_offsets.numel() - 1, schedule.query_offsets.numel() - 1
    kinds = np.zeros((query_tiles, key_tiles), int)
    visits = np.repeat(np.arange(query_tiles), np.diff(schedule.key_offsets.numpy()))
    kinds[visits, schedule.key_tiles.numpy()] = np.where(schedule.mask_ids.numpy() == 0, 1, 2)
    own = np.arange(query_tiles) == int((schedule.order == query).nonzero()) // _TILE[0]
    return _enlarge(_TILE_SHADES[own[:, None].astype(int), kinds], max(8, min(48, 400 // query_tiles)))


def _enlarge(picture: np.ndarray, scale: int) -> np.ndarray:
    """Each pixel as a square of `scale`, with a line between squares that have room for it."""
    large = picture.repeat(scale, 0).repeat(scale, 1)
    if scale >= 6:
        large[::scale] = large[:, ::scale] = 255
    return large
