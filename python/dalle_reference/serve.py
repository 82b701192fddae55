"""A page in the browser: pictures drawn row by row, completed and named, and what patterns see.

Needs Gradio, which only this module imports.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
import numpy as np

from dalle_reference.errors import UserError
from dalle_reference.views import MOST_BYTES, MOST_LETTERS, MOST_NAMES, Judge, Painter, classify, draw, look

_MOST_PICTURES, _MOST_WAITING = 16, 32
"""That one person may ask for, and people in the queue."""
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
        max_file_size=MOST_BYTES,
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
            caption = gr.Textbox(label="Caption", max_length=MOST_LETTERS, elem_id=f"{name}-caption".lower())
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
            yield from draw(painter, judge, *values, warn=gr.Warning)

    for event in (button.click, caption.submit):
        _on(event, drawn, [caption, number, temperature, guidance, seed, *given], shown, show_progress="minimal")


def _naming_tab(judge: Judge) -> None:
    with gr.Row():
        with gr.Column():
            file = gr.File(label="Picture", elem_id="classify-picture")
            names = gr.Textbox(
                label=f"What it may show: up to {MOST_NAMES} names, one a line", lines=5, elem_id="classify-names"
            )
            button = gr.Button("Classify", variant="primary", elem_id="classify-button")
        with gr.Column():
            seen = gr.HTML(elem_id="classify-seen")
            guesses = gr.Label(label="Guesses", num_top_classes=5, elem_id="classify-guesses")

    def named(file: str | None, names: str) -> tuple[str, dict[str, float]]:
        with _told():
            return classify(judge, file, names)

    _on(button.click, named, [file, names], [seen, guesses])


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
