"""Drawings of schedules at work, made of the very lists that kernels walk."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from dalle_kernels.attention.cuda_walk import walk_for
from dalle_kernels.patterns import Pattern, Row, Schedule, TokenLayout, schedule_for
from dalle_kernels.patterns.decode_table import decode_table_for

PAPER = Row(TokenLayout(256, (32, 32)))
SMALL = Row(TokenLayout(4, (4, 4)))
_CELL, _SECONDS = 24, 0.5  # of a drawing: pixels a tile, seconds a step
_GROUP = 16  # queries that a list of keys serves on the CPU


def pages() -> Iterator[tuple[str, bytes]]:
    schedule = schedule_for(PAPER, (64, 64))
    yield "inside/walk-forward.svg", walk(schedule, backward=False).encode()
    yield "inside/walk-backward.svg", walk(schedule, backward=True).encode()
    yield "inside/lists.svg", _figure(lambda axis: _draw_lists(axis, schedule), 6, 4.5)
    yield "inside/slots.svg", _figure(lambda axis: _draw_slots(axis, slots=12), 12, 3.6)
    yield "inside/cache.svg", _figure(lambda axis: _draw_cache(axis, SMALL), 7, 4)


def walk(schedule: Schedule, backward: bool) -> str:
    """An SVG of the tiles, numbered as one program visits them; frames go from each to the next, all at once."""
    lists = (
        (schedule.query_offsets, schedule.query_tiles, schedule.query_mask_ids)
        if backward
        else (schedule.key_offsets, schedule.key_tiles, schedule.mask_ids)
    )
    offsets, tiles, masks = (entries.tolist() for entries in lists)
    number = len(offsets) - 1
    side, longest = number * _CELL, max(np.diff(offsets))
    cells, frames = [], []
    for program in range(number):
        for step, place in enumerate(range(offsets[program], offsets[program + 1])):
            row, column = (tiles[place], program) if backward else (program, tiles[place])
            x, y = column * _CELL, row * _CELL
            fill = "#1f6fb4" if masks[place] else "#bcdcf2"
            ink = "#ffffff" if masks[place] else "#123"
            cells.append(f'<rect x="{x}" y="{y}" width="{_CELL - 1}" height="{_CELL - 1}" fill="{fill}"/>')
            cells.append(f'<text x="{x + _CELL / 2}" y="{y + 16}" fill="{ink}">{step + 1}</text>')
            frames.append(
                f'<rect x="{x}" y="{y}" width="{_CELL - 1}" height="{_CELL - 1}" fill="none" stroke="#e4572e"'
                f' stroke-width="3" opacity="0"><animate attributeName="opacity" calcMode="discrete" values="0;1;0"'
                f' dur="{longest * _SECONDS}s" repeatCount="indefinite"'
                f' keyTimes="0;{step / longest:.4f};{(step + 1) / longest:.4f}"/></rect>'
            )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}" width="{side}" height="{side}"'
        ' font-family="sans-serif" font-size="11" text-anchor="middle">'
        f'<rect width="{side}" height="{side}" fill="#f4f4f4"/>{"".join(cells)}{"".join(frames)}</svg>'
    )


def _draw_lists(axis: Any, schedule: Schedule) -> None:
    """A masked tile, and for each group of queries the keys that any of them sees."""
    words = schedule.masks[1].numpy().view(np.uint32)
    bits = (words[:, :, None] >> np.arange(32, dtype=np.uint32) & 1).reshape(schedule.tile).astype(float)
    for first in range(0, len(bits), _GROUP):
        group = bits[first : first + _GROUP]
        group[:, group.any(0)] += 0.6
    axis.imshow(bits, cmap="Blues", vmin=0, vmax=1.8, interpolation="nearest")
    for first in range(_GROUP, len(bits), _GROUP):
        axis.axhline(first - 0.5, color="#e4572e", linewidth=1)
    axis.set(xlabel="key of the tile", ylabel="query of the tile")
    axis.set_title("dark: visible; light: multiplied with them; white: left out", fontsize=9)


def _draw_slots(axis: Any, slots: int) -> None:
    """Which tile lies in which slot of shared memory at which step of the first of two parts of a head."""
    walk = walk_for(PAPER, 128, 32, False, PAPER.length, slots, ahead=2, parts=2)
    steps = walk.steps.numpy()[: int(walk.tile_steps[walk.part_tiles[1]])]
    held = np.full((slots, len(steps)), np.nan)
    for step, (tile, slot, _, _) in enumerate(steps):
        held[slot, step:] = tile
    axis.imshow(held, aspect="auto", cmap="viridis", interpolation="nearest")
    for step, (tile, slot, _, loads) in enumerate(steps):
        color = "white" if tile < np.nanmax(held) * 0.7 else "black"
        axis.text(step, slot, tile, ha="center", va="center", fontsize=6, color=color)
        if loads:
            axis.add_patch(_box(step, slot))
    axis.set(xlabel="step", ylabel="slot", yticks=range(slots))
    axis.set_title(f"{len(steps)} steps, {steps[:, 3].sum()} loads (framed); numbers name the tile in use", fontsize=9)


def _box(step: int, slot: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((step - 0.5, slot - 0.5), 1, 1, fill=False, edgecolor="#e4572e", linewidth=1.2)


def _draw_cache(axis: Any, pattern: Pattern) -> None:
    """The slots of a decoding cache over time: a key has one from its own step to its last use."""
    table = decode_table_for(pattern)
    last = torch.where(table.last_use < 0, pattern.length - 1, table.last_use).tolist()
    for key, slot in enumerate(table.slot.tolist()):
        if slot < 0:
            continue
        text = key < pattern.layout_or_none.text_length  # type: ignore[union-attr]
        end = pattern.length - 1 if text else last[key]
        axis.barh(
            slot, end - key + 1, left=key - 0.5, height=0.9, color="#bcdcf2" if text else "#8fc98f", edgecolor="white"
        )
        axis.text(key, slot, key, ha="center", va="center", fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="token being decoded", ylabel="slot", yticks=range(table.cache_length))
    axis.set_title(f"{pattern.length} tokens, {table.cache_length} slots; blue: text, which stays", fontsize=9)


def _figure(draw: Callable[[Any], None], width: float, height: float) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure.subplots())
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
