"""Patterns to look at: in the terminal, and as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dalle_kernels.patterns.schedule import Schedule, schedule_for

if TYPE_CHECKING:
    from dalle_kernels.patterns.patterns import Grid, Pattern

LARGEST_MASK = 2048  # tokens; beyond, a figure shows tiles instead of pairs
_TILE = (64, 64)


def keys_of(pattern: Pattern, query: int) -> np.ndarray:
    """The keys that `query` sees, ascending."""
    found = [np.arange(int(pattern.leading(pattern.length)[query]))]
    for queries, keys in pattern.pairs(pattern.length):
        found.append(keys[queries == query])
    return np.sort(np.concatenate(found))


def middle(pattern: Pattern) -> int:
    """The query to show where none is named: the cell in the middle of the grid, or a plain sequence's last token."""
    grid = pattern.grid_or_none
    if grid is None:
        return pattern.length - 1
    return grid.text_length + int(np.ravel_multi_index([side // 2 for side in grid.shape], grid.shape))


def check_query(pattern: Pattern, query: int | None) -> int:
    if query is None:
        return middle(pattern)
    if not isinstance(query, (int, np.integer)) or not 0 <= query < pattern.length:
        raise ValueError(f"query: got {query!r}, wanted an int from 0 to {pattern.length - 1}, or None")
    return int(query)


def counts(pattern: Pattern, schedule: Schedule) -> str:
    """One line: tokens, pairs, and the most that skipping the others can save."""
    dense = pattern.length**2
    return (
        f"{pattern.length:,} tokens, {pattern.visible_pairs:,} visible pairs of {dense:,} "
        f"({dense / max(pattern.visible_pairs, 1):.2f}x fewer), {schedule.executed_pairs:,} in tiles of "
        f"{schedule.tile[0]} x {schedule.tile[1]}"
    )


def text(pattern: Pattern, query: int | None = None) -> str:
    """The keys of one query as characters: Q itself, # a key, . another token; text in front, then a row a line."""
    query = check_query(pattern, query)
    marks = np.full(pattern.length, ".")
    marks[keys_of(pattern, query)] = "#"
    marks[query] = "Q"
    grid = pattern.grid_or_none
    lines = [repr(pattern), counts(pattern, schedule_for(pattern, _TILE)), f"query {query} sees:"]
    if grid is None:
        return "\n".join([*lines, *_wrapped(marks)])
    front, cells = marks[: grid.text_length], marks[grid.text_length :].reshape(grid.shape)
    if front.size:
        lines += _wrapped(front)
    layers = cells.reshape(-1, *cells.shape[-2:]) if cells.ndim > 1 else cells[None, None]
    for number, layer in enumerate(layers):
        if cells.ndim == 3:
            lines.append(f"layer {number}:")
        lines += [" ".join(row) for row in layer]
    return "\n".join(lines)


def _wrapped(marks: np.ndarray, width: int = 100) -> list[str]:
    return ["".join(marks[start : start + width]) for start in range(0, marks.size, width)]


def plot(pattern: Pattern, path: str | Path, query: int | None = None) -> Path:
    """Writes a figure: the mask with its tiles, in the order that kernels walk, and one query's keys on the grid."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    query, path = check_query(pattern, query), Path(path)
    schedule, grid = schedule_for(pattern, _TILE), pattern.grid_or_none
    figure, axes = pyplot.subplots(1, 2 if grid is None else 3, figsize=(15 if grid else 10, 5), layout="constrained")
    draw_pairs(axes[0], pattern, schedule)
    draw_tiles(axes[1], schedule)
    if grid is not None:
        draw_keys(axes[2], pattern, grid, query)
    figure.suptitle(f"{pattern!r}\n{counts(pattern, schedule)}", fontsize=9)
    partial = path.with_name(f"{path.stem}.partial{path.suffix or '.png'}")
    figure.savefig(partial, dpi=110)
    pyplot.close(figure)
    return partial.replace(path)


def draw_pairs(axis: Any, pattern: Pattern, schedule: Schedule) -> None:
    if pattern.length <= LARGEST_MASK:
        order = schedule.order.numpy()
        axis.imshow(pattern.mask().numpy()[np.ix_(order, order)], cmap="Greys", interpolation="nearest", vmax=1.4)
        for edge in range(_TILE[0], pattern.length, _TILE[0]):
            axis.axhline(edge - 0.5, color="tab:blue", linewidth=0.3)
            axis.axvline(edge - 0.5, color="tab:blue", linewidth=0.3)
    else:
        axis.text(0.5, 0.5, f"{pattern.length:,} tokens:\ntoo many to draw a mask", ha="center", va="center")
        axis.set(xticks=[], yticks=[])
    axis.set(title="pairs, in the schedule's order", xlabel="key", ylabel="query")


def draw_tiles(axis: Any, schedule: Schedule) -> None:
    """White: skipped; light: every pair of the tile is visible; dark: some are."""
    rows = schedule.key_offsets.numel() - 1
    picture = np.zeros((rows, schedule.query_offsets.numel() - 1))
    query_tile = np.repeat(np.arange(rows), np.diff(schedule.key_offsets.numpy()))
    picture[query_tile, schedule.key_tiles.numpy()] = np.where(schedule.mask_ids.numpy() == 0, 0.4, 0.9)
    axis.imshow(picture, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axis.set(
        title=f"{schedule.key_tiles.numel()} tiles: light full, dark masked", xlabel="key tile", ylabel="query tile"
    )


def draw_keys(axis: Any, pattern: Pattern, grid: Grid, query: int) -> None:
    picture = np.zeros(pattern.length)
    picture[keys_of(pattern, query)] = 0.5
    picture[query] = 1
    cells = picture[grid.text_length :].reshape(grid.shape)
    if cells.ndim == 1:
        cells = cells[None]
    if cells.ndim == 3:  # layers side by side, a gap between them
        cells = np.concatenate([np.pad(layer, ((0, 0), (0, 1)), constant_values=np.nan) for layer in cells], 1)
    axis.imshow(cells, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    seen = int((picture[: grid.text_length] > 0).sum())
    front = f", {seen} of {grid.text_length} text tokens" if grid.text_length else ""
    axis.set(title=f"keys of query {query}{front}", xticks=[], yticks=[])
