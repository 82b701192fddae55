"""The walk of a CUDA block over a schedule, and which tile lies in which slot of shared memory meanwhile.

A block walks the tiles of a schedule in a fixed order and has a few slots of shared memory for them. Which tile makes
room for the next is known in advance, so the best choice is: the one that is needed again last (Belady 1966). Tiles
that every query visits, the text's, so stay where they are, and a window of image tiles slides along.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from heapq import heapreplace
from itertools import pairwise

import torch

from dalle_kernels.device import OnDevice, remembered
from dalle_kernels.patterns.patterns import Pattern
from dalle_kernels.patterns.schedule import Schedule, schedule_for

START = 8  # steps in whose time a block starts and its first tiles arrive: a guess until a GPU has been timed


@dataclass(frozen=True, eq=False)
class Walk(OnDevice):
    """A schedule's walk for `parts` blocks a head and `slots` tiles of shared memory. Tensors are int32 on one device.

    Attributes:
        order: [S], the token at each position.
        part_tiles: [parts + 1]; part p owns row tiles part_tiles[p] to part_tiles[p + 1] - 1.
        tile_steps: [row tiles + 1]; row tile t owns steps tile_steps[t] to tile_steps[t + 1] - 1.
        steps: [steps, 4]: column tile, slot, mask id, and 1 where the tile has to be loaded for this step.
        masks: [n, rows, columns / 32], the schedule's.
        slots: as asked for.
    """

    order: torch.Tensor
    part_tiles: torch.Tensor
    tile_steps: torch.Tensor
    steps: torch.Tensor
    masks: torch.Tensor
    slots: int

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """What a kernel takes besides `order`."""
        return self.part_tiles, self.tile_steps, self.steps, self.masks, self.slots

    @property
    def loads(self) -> int:
        """Tiles that all parts of a head load together."""
        return int(self.steps[:, 3].sum())


@remembered(maxsize=256)
def walk_for(
    pattern: Pattern,
    rows: int,
    columns: int,
    transposed: bool,
    length: int,
    slots: int,
    ahead: int,
    parts: int,
    device: torch.device | str = "cpu",
) -> Walk:
    """The walk over tiles of `rows` by `columns`, each loaded `ahead` steps before its use; remembered.

    Rows are queries and columns keys, or where `transposed` rows are keys and columns queries. `parts` is cut to the
    number of row tiles.

    Raises:
        ValueError: for fewer slots than the one in use and `ahead` being loaded.
    """
    if device != "cpu":
        return walk_for(pattern, rows, columns, transposed, length, slots, ahead, parts, "cpu").to(device)
    if slots <= ahead:
        raise ValueError(f"slots: got {slots}, wanted at least {ahead + 1}")
    schedule = _schedule(pattern, rows, columns, transposed, length)
    if transposed:
        lists = schedule.query_offsets, schedule.query_tiles, schedule.query_mask_ids
        masks = schedule.masks_transposed
    else:
        lists = schedule.key_offsets, schedule.key_tiles, schedule.mask_ids
        masks = schedule.masks
    offsets, tiles, mask_ids = (entries.tolist() for entries in lists)
    borders = _share(offsets, min(parts, len(offsets) - 1))
    placed: list[tuple[int, bool]] = []
    for first, last in pairwise(borders):
        placed += _place(tiles[offsets[first] : offsets[last]], slots, ahead)
    steps = [(tile, slot, mask, int(loads)) for tile, (slot, loads), mask in zip(tiles, placed, mask_ids, strict=True)]
    return Walk(
        order=schedule.order,
        part_tiles=torch.tensor(borders, dtype=torch.int32),
        tile_steps=torch.tensor(offsets, dtype=torch.int32),
        steps=torch.tensor(steps, dtype=torch.int32).reshape(-1, 4),
        masks=masks,
        slots=slots,
    )


@remembered(maxsize=256)
def parts_for(
    pattern: Pattern, rows: int, columns: int, transposed: bool, length: int, heads: int, at_a_time: int
) -> int:
    """In how many parts each of `heads` heads is done soonest, when `at_a_time` blocks run at a time; remembered.

    Blocks start in the order of the grid, all heads' first parts first, each where one has ended. A block takes its
    steps and what it costs to start one. More parts fill the last round better; fewer start less often and share more
    tiles.
    """
    if heads > 8 * at_a_time:
        return 1  # the last round is a small part of all
    schedule = _schedule(pattern, rows, columns, transposed, length)
    offsets = (schedule.query_offsets if transposed else schedule.key_offsets).tolist()

    def duration(parts: int) -> int:
        costs = [START + offsets[last] - offsets[first] for first, last in pairwise(_share(offsets, parts))]
        return makespan([cost for cost in costs for _ in range(heads)], at_a_time)

    best, least = 1, duration(1)
    for parts in range(2, len(offsets)):
        if heads * (START * parts + offsets[-1]) >= least * at_a_time:
            break  # not even if all blocks ended together, nor with more parts; to try them all takes seconds
        if (ends := duration(parts)) < least:
            best, least = parts, ends
    return best


@remembered(maxsize=256)
def _schedule(pattern: Pattern, rows: int, columns: int, transposed: bool, length: int) -> Schedule:
    """The schedule of a walk. A transposed one has the other's order, so that both read one set of statistics."""
    straight = schedule_for(pattern, (rows, columns), length)
    if not transposed:
        return straight
    best = schedule_for(pattern, (columns, rows), length)
    if best.order.equal(straight.order):
        return best
    return Schedule.build(pattern, (columns, rows), length, order=straight.order.numpy())


def makespan(costs: list[int], at_a_time: int) -> int:
    """When the last of blocks that start in this order has ended."""
    ends = [0] * at_a_time
    for cost in costs:
        heapreplace(ends, ends[0] + cost)
    return max(ends)


def _share(offsets: list[int], parts: int) -> list[int]:
    """Borders between runs of row tiles with about as many steps each; every run has a row tile."""
    borders, rows = [0], len(offsets) - 1
    for part in range(1, parts):
        border = bisect_left(offsets, offsets[-1] * part / parts)
        borders.append(min(max(border, borders[-1] + 1), rows - (parts - part)))
    return [*borders, rows]


def _place(walk: list[int], slots: int, ahead: int) -> list[tuple[int, bool]]:
    """For each tile of `walk` its slot, and whether it has to be loaded there, `ahead` steps before."""
    uses: dict[int, list[int]] = {}
    for step, tile in reversed(list(enumerate(walk))):
        uses.setdefault(tile, []).append(step)  # the next use is the last of the list
    holds: dict[int, int] = {}  # slot -> tile
    where: dict[int, int] = {}  # tile -> slot
    idle_since = [-1] * slots
    placed: list[tuple[int, bool]] = []
    for step, tile in enumerate(walk):
        uses[tile].pop()
        loads = tile not in where
        if loads:
            # A load runs beside the `ahead` steps before its own, so their slots are taken. Of tiles that are done with
            # the first that was makes room, so that loads can start early.
            busy = {slot for slot, _ in placed[max(step - ahead, 0) : step]}
            free = [slot for slot in range(slots) if slot not in busy]
            slot = max(free, key=lambda slot: (_next_use(uses, holds.get(slot)), -idle_since[slot]))
            if slot in holds:
                del where[holds[slot]]
            holds[slot], where[tile] = tile, slot
        idle_since[where[tile]] = step
        placed.append((where[tile], loads))
    return placed


def _next_use(uses: dict[int, list[int]], tile: int | None) -> float:
    return math.inf if tile is None or not uses[tile] else uses[tile][-1]
