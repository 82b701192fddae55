"""A page in the browser: pictures drawn row by row, completed and named, and what patterns see.

Needs Gradio, which only this module imports.
"""

from __future__ import annotations

import ast
import base64
import html
import io
import math
import queue
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
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

_MOST_BYTES, _MOST_PIXELS = 8 << 20, 1 << 24
"""Of a picture that is sent in."""
_MOST_PICTURES, _MOST_NAMES, _MOST_LETTERS, _MOST_WAITING = 16, 50, 500, 32
"""That one person may ask for: pictures, names, letters of a text; and people in the queue."""
_MOST_TOKENS, _TILE = 4096, (64, 64)
"""Of a pattern."""

_PATTERNS = (
    "Row(TokenLayout(16, (16, 16)))",
    "Column(TokenLayout(16, (16, 16)))",
    "Convolution(TokenLayout(16, (16, 16)), kernel_size=5)",
    "AxialRow(TokenLayout(16, (16, 16)))",
    "Row(TokenLayout(16, (16, 16))) | Column(TokenLayout(16, (16, 16)))",
    "Neighborhood((16, 16), window=7)",
    "Strided(256, stride=16)",
    "Fixed(256, stride=16, summary=2)",
    "Diagonal(Row(TokenLayout(16, (16, 16))), first=16, columns=16, window=4)",
    "Row(TokenLayout(256, (32, 32)))",
)
_STYLE = """
.pictures { display: flex; flex-wrap: wrap; gap: 12px; }
.pictures figure { margin: 0; width: 128px; text-align: center; }
.pictures img { width: 128px; image-rendering: pixelated; border: 1px solid var(--border-color-primary); }
"""


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


def serve(page: gr.Blocks, host: str, port: int) -> None:
    """Serves the page until the process is asked to stop, which is a KeyboardInterrupt.

    Nothing is asked of other machines: no analytics, no fonts.

    Raises:
        UserError: where nobody can listen at that address, or somebody does.
    """
    try:  # Gradio would say that it found no free port, whatever was amiss
        socket.create_server((host, port)).close()
    except (OSError, UnicodeError) as error:
        raise UserError(f"{host}:{port}: cannot be listened at ({error})") from error
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        prevent_thread_lock=True,
        quiet=True,
        max_file_size=_MOST_BYTES,
        footer_links=[],
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=_STYLE,
    )
    for asked_to_stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(asked_to_stop, signal.default_int_handler)
    print(f"http://{host}:{port} (Ctrl-C stops it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def make_page(painter: Painter | None, judge: Judge | None) -> gr.Blocks:
    """The page, with a tab for each thing that the models at hand can do; the patterns need none.

    One person's request is worked on at a time; others wait in a queue.
    """
    with gr.Blocks(title="dalle_reference", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown("# dalle_reference")
        if painter is not None:
            with gr.Tab("Draw"):
                _drawing_tab(painter, judge, completes=False)
            with gr.Tab("Complete"):
                _drawing_tab(painter, judge, completes=True)
        if judge is not None:
            with gr.Tab("Classify"):
                _naming_tab(judge)
        with gr.Tab("Patterns"):
            _patterns_tab(page)
    return page.queue(max_size=_MOST_WAITING, default_concurrency_limit=1)


@contextmanager
def _told() -> Iterator[None]:
    """What was asked amiss becomes a message on the page."""
    try:
        yield
    except (UserError, ValueError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def _on(event: Callable[..., Any], function: Callable[..., Any], inputs: Any, outputs: Any, **options: Any) -> None:
    """Connects an event; whatever uses a model waits for whoever is using one."""
    event(function, inputs, outputs, api_visibility="private", concurrency_id="models", **options)


def _drawing_tab(painter: Painter, judge: Judge | None, completes: bool) -> None:
    rows = painter.dvae.config.grid[0]
    kept = painter.model.config.grid[0] // 2 or 1  # half of what is drawn, which of two panels is the upper one
    name = "Complete" if completes else "Draw"
    with gr.Row():
        with gr.Column(scale=1):
            caption = gr.Textbox(label="Caption", max_length=_MOST_LETTERS, elem_id=f"{name}-caption".lower())
            given: list[Any] = []
            if completes:
                given = [
                    gr.File(label="Picture", elem_id="complete-picture"),
                    gr.Slider(1, rows, kept, step=1, label=f"Rows of {rows} that are kept"),
                ]
            number = gr.Slider(1, _MOST_PICTURES, 8, step=1, label="Pictures")
            temperature = gr.Slider(0.0, 2.0, 0.4, step=0.05, label="Temperature")
            guidance = gr.Slider(0.0, 5.0, 1.5, step=0.1, label="Guidance (1: none)")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
            button = gr.Button(name, variant="primary", elem_id=f"{name}-button".lower())
        with gr.Column(scale=2):
            shown = gr.HTML(elem_id=f"{name}-shown".lower())

    def drawn(*values: Any) -> Iterator[str]:
        with _told():
            yield from draw(painter, judge, *values)

    for event in (button.click, caption.submit):
        _on(event, drawn, [caption, number, temperature, guidance, seed, *given], shown, show_progress="minimal")


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
) -> Iterator[str]:
    """Pictures of a caption as HTML, after each row and once at the end, with a judge then best first.

    Args:
        file: a picture whose first `kept` rows of tokens every picture begins with.

    Raises:
        UserError: for a file that is no picture, or none where rows are to be kept.
    """
    config, device = painter.model.config, painter.model.row_position.device
    caption = caption[:_MOST_LETTERS]
    if painter.tokenizer.is_cut(caption, config.caption_length):
        gr.Warning(f"The caption is long: the model reads its first {config.caption_length} tokens.")
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


def _naming_tab(judge: Judge) -> None:
    with gr.Row():
        with gr.Column():
            file = gr.File(label="Picture", elem_id="classify-picture")
            names = gr.Textbox(
                label=f"What it may show: up to {_MOST_NAMES} names, one a line", lines=5, elem_id="classify-names"
            )
            button = gr.Button("Classify", variant="primary", elem_id="classify-button")
        with gr.Column():
            seen = gr.HTML(elem_id="classify-seen")
            guesses = gr.Label(label="Guesses", num_top_classes=5, elem_id="classify-guesses")

    def named(file: str | None, names: str) -> tuple[str, dict[str, float]]:
        with _told():
            return classify(judge, file, names)

    _on(button.click, named, [file, names], [seen, guesses])


def classify(judge: Judge, file: str | None, names: str) -> tuple[str, dict[str, float]]:
    """The picture as CLIP sees it, as HTML, and how likely each of the names is, one a line.

    Raises:
        UserError: for a file that is no picture, and where there is no name, or too much of them.
    """
    pixels = _picture(file, judge.clip.config.resolution)
    listed = list(dict.fromkeys(name.strip()[:_MOST_LETTERS] for name in names.splitlines() if name.strip()))
    if not 1 <= len(listed) <= _MOST_NAMES:
        raise UserError(f"names: got {len(listed)}, wanted 1 to {_MOST_NAMES}, one a line")
    shares = name_shares(judge.clip, judge.tokenizer, pixels[None], listed)[0].tolist()
    return _figures(pixels[None], ["as the model sees it"]), dict(zip(listed, shares, strict=True))


def _picture(file: str | None, resolution: int) -> Tensor:
    """uint8 [3, S, S] of a file that was sent in."""
    if file is None:
        raise UserError("picture: got none, wanted a file")
    path = Path(file)
    try:
        data = read_bounded(path, _MOST_BYTES)
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


def _patterns_tab(page: gr.Blocks) -> None:
    expression = gr.Dropdown(
        list(_PATTERNS),
        value=_PATTERNS[0],
        allow_custom_value=True,
        label="Pattern: choose one, or write an expression and press Enter",
        elem_id="pattern",
    )
    with gr.Row():
        keys = gr.Image(label="Keys", format="png", buttons=[], interactive=False, elem_id="pattern-keys")
        tiles = gr.Image(label="Tiles", format="png", buttons=[], interactive=False, elem_id="pattern-tiles")
    said = gr.Code(label="Counts", language=None, interactive=False, wrap_lines=True, elem_id="pattern-counts")

    def show(expression: str) -> tuple[np.ndarray, np.ndarray, str]:
        with _told():
            return look(expression or "")

    def point(expression: str, event: gr.SelectData) -> tuple[np.ndarray, np.ndarray, str]:
        with _told():
            return look(expression or "", tuple(event.index))

    shown = [keys, tiles, said]
    for event in (page.load, expression.change):
        event(show, expression, shown, api_visibility="private", show_progress="hidden")
    keys.select(point, expression, shown, api_visibility="private", show_progress="hidden")


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
    if len(expression) > _MOST_LETTERS:
        raise ValueError(f"pattern: got {len(expression):,} letters, wanted at most {_MOST_LETTERS}")
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
