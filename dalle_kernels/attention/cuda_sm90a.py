"""The forward kernel for sm_90a (csrc/attention/forward_sm90a_kernel.cuh): when it serves a call, and what it walks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from dalle_kernels.attention import cuda_plan
from dalle_kernels.backends import cuda_library
from dalle_kernels.device import OnDevice, remembered
from dalle_kernels.patterns.patterns import Pattern

COLUMNS = 64  # keys a tile, and rows that are copied together: kColumns there
MOST_SLOTS = 32  # kMostSlots there
LOADS, LAST_USE, FIRST_SEES, FIRST_MASKED = 1, 2, 4, 64  # PlannedStep there
_BARRIER_BYTES = 1024  # kBarrierBytes there


@dataclass(frozen=True, eq=False)
class Sm90aPlan(OnDevice):
    """A `cuda_plan.Walk` with what this kernel asks beyond it.

    Attributes:
        walk: its last word of each step is flags: LOADS, LAST_USE of what lies in the slot before that is loaded again,
            FIRST_SEES << g where rows 64 g to 64 g + 63 of the row tile see any of the column tile, and
            FIRST_MASKED << g where they do not see all of it.
        runs: int32, one for each 64 positions up to a multiple of `rows`: the first of their tokens where these are
            consecutive, so that one copy fetches them all; the length where there are none; else -1.
    """

    walk: cuda_plan.Walk
    runs: torch.Tensor


@remembered(maxsize=256)
def walk_for(
    pattern: Pattern, rows: int, length: int, slots: int, parts: int, device: torch.device | str = "cpu"
) -> Sm90aPlan:
    """The walk over tiles of `rows` queries, a multiple of 64, by 64 keys; arguments as of `cuda_plan.walk_for`."""
    walk = cuda_plan.walk_for(pattern, rows, COLUMNS, False, length, slots, parts)
    steps = walk.steps.clone()
    steps[:, 3] = steps[:, 3] * LOADS + _last_uses(walk) * LAST_USE
    masks, used = walk.masks.view(-1, rows // COLUMNS, COLUMNS * COLUMNS // 32), steps[:, 2].long()
    for group in range(rows // COLUMNS):
        steps[:, 3] += (masks[:, group] != 0).any(1)[used] * (FIRST_SEES << group)
        steps[:, 3] += (masks[:, group] != -1).any(1)[used] * (FIRST_MASKED << group)
    return Sm90aPlan(replace(walk, steps=steps), _runs(walk.order, rows)).to(device)


def _last_uses(walk: cuda_plan.Walk) -> torch.Tensor:
    """Per step, whether its slot's tile is needed no more."""
    last = torch.zeros(len(walk.steps), dtype=torch.bool)
    borders = walk.tile_steps[walk.part_tiles.long()].tolist()
    for first, end in pairwise(borders):
        needed: set[int] = set()
        for step in range(end - 1, first - 1, -1):
            _, slot, _, loads = walk.steps[step].tolist()
            last[step] = slot not in needed
            needed.add(slot)
            if loads:
                needed.discard(slot)
    return last


def _runs(order: torch.Tensor, rows: int) -> torch.Tensor:
    length = len(order)
    runs = []
    for first in range(0, -(-length // rows) * rows, COLUMNS):
        tokens = order[first : first + COLUMNS]
        if not len(tokens):
            runs.append(length)
            continue
        start = int(tokens[0])
        consecutive = tokens.equal(torch.arange(start, start + len(tokens), dtype=tokens.dtype))
        ends_whole = len(tokens) == COLUMNS or start + len(tokens) == length  # what a copy takes beyond is zeros
        runs.append(start if consecutive and ends_whole else -1)
    return torch.tensor(runs, dtype=torch.int32)


def refuse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why the kernel for sm_80 serves a call that the CUDA backend takes, or None."""
    if not cuda_library.has_sm90a(q.device):
        return "it needs a GPU of compute capability 9.0 and a library built for 9.0a"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            return f"{name} repeats in memory (a stride of 0), which tensor maps do not describe"
    return None


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    padding: torch.Tensor | None,
    scale: float,
    pattern: Pattern,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Writes `out` and `lse`; all tensors as `cuda_library.aligned` leaves them."""
    batch, heads, length, width = q.shape
    groups = 4 if width <= 64 else 2  # kGroups there
    tile_bytes = -(-width // 64) * COLUMNS * 128
    multiprocessors = cuda_library.multiprocessors(q.device)
    room = cuda_library.shared_memory(q.device, 1) - _BARRIER_BYTES - groups * tile_bytes
    slots = min(room // (2 * tile_bytes), MOST_SLOTS)
    parts = cuda_plan.parts_for(pattern, COLUMNS * groups, COLUMNS, False, length, batch * heads, multiprocessors)
    walk = walk_for(pattern, COLUMNS * groups, length, slots, parts, q.device)
    # Where heads stay whole a block goes from one to the next; parts of them are blocks of their own.
    blocks = min(batch * heads, multiprocessors) if parts == 1 else batch * heads
    cuda_library.operations().attention_forward_sm90a(
        q, k, v, padding, walk.walk.order, *walk.walk.arguments, walk.runs, blocks, scale, out, lse
    )
