"""Which cache slots a token writes and reads when tokens are decoded one at a time.

A key stays in the cache until the last query that sees it; after that its slot is handed to a new key. This is
register allocation by linear scan, and it finds the shortest cache for any pattern: text plus W + 1 slots for rows,
text plus 5 W + 6 for an 11 x 11 convolution.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from dalle_kernels.device import OnDevice, remembered
from dalle_kernels.patterns.patterns import Pattern


@dataclass(frozen=True, eq=False)
class DecodeTable(OnDevice):
    """The slots of every position, on one device.

    With a prompt of p tokens that several continuations share, keys from p on have the slots of this table, keys before
    p those of `shared`, and only queries from p on are asked for.

    Attributes:
        cache_length: slots that a cache needs.
        slot: int32 [S], where position j's key and value are written; -1 where nowhere.
        prefix: int32 [S]; query i sees slots 0 to prefix[i] - 1, all of them,
        offsets, slots: int64 [S + 1], int32 [m]; and slots[offsets[i]] to slots[offsets[i + 1] - 1], ascending.
        max_list: the length of the longest such list.
        last_use: int32 [S], the last query that sees key j besides those that it leads; -1 where there is none.
        rewind: for how many positions beyond its last use a key keeps its slot.
        shared: the same for the keys of the prompt, which are written once and stay; None without a prompt.
    """

    cache_length: int
    slot: torch.Tensor
    prefix: torch.Tensor
    offsets: torch.Tensor
    slots: torch.Tensor
    max_list: int
    last_use: torch.Tensor
    rewind: int = 0
    shared: DecodeTable | None = None

    @staticmethod
    def build(pattern: Pattern, prompt: int = 0, rewind: int = 0) -> DecodeTable:
        """Derives the table from `pattern`.

        Raises:
            ValueError: if some query sees a later key, which no cache can hold.
        """
        length = pattern.length
        leading, pairs = pattern.leading(length), list(pattern.pairs(length))
        position = np.arange(length, dtype=np.int32)
        empty = [np.zeros(0, np.int32)]
        query = np.concatenate([query for query, _ in pairs] or empty)
        key = np.concatenate([key for _, key in pairs] or empty)
        if (key > query).any() or (leading > position + 1).any():
            raise ValueError(f"pattern: {pattern} lets a query see later keys, so it cannot be decoded")
        asked = query >= prompt
        leading, query, key = np.where(position >= prompt, leading, 0), query[asked], key[asked]
        last_use = np.full(length, -1, np.int32)
        np.maximum.at(last_use, key, query)
        old, shared = key < prompt, None
        if prompt:
            within = np.minimum(leading, prompt)
            kept = (np.arange(length) < within.max()) | ((last_use >= 0) & (position < prompt))
            slot = np.where(kept, np.cumsum(kept) - 1, -1).astype(np.int32)
            shared = _table(within, query[old], key[old], slot, int(kept.sum()), last_use)
        leading = np.maximum(leading - prompt, 0).astype(np.int32)
        slot, cache_length = _allocate(last_use, prompt, int(leading.max()), rewind)
        return _table(leading, query[~old], key[~old], slot, cache_length, last_use, rewind, shared)

    def written(self, latest: np.ndarray | None, start: int, stop: int) -> np.ndarray:
        """The latest token of each slot, -1 for none: `latest` (none where None), after those of `start` to `stop`."""
        latest = np.full(self.cache_length, -1) if latest is None else latest.copy()
        slots = self.slot.numpy()[start:stop]
        kept = slots >= 0
        latest[slots[kept]] = start + np.flatnonzero(kept)  # of several in one slot the last one stays
        return latest

    def holds(self, position: int, latest: np.ndarray) -> bool:
        """Whether slots of these latest tokens have every key before `position` that queries from there on see."""
        slot, last_use = self.slot.numpy()[:position], self.last_use.numpy()[:position]
        wanted = np.flatnonzero((last_use >= position) & (slot >= 0))
        return bool((latest[slot[wanted]] == wanted).all())


@remembered(maxsize=64)
def decode_table_for(
    pattern: Pattern, device: torch.device | str = "cpu", prompt: int = 0, rewind: int = 0
) -> DecodeTable:
    """`DecodeTable.build`, remembered per (pattern, device, prompt, rewind)."""
    if device == "cpu":
        return DecodeTable.build(pattern, prompt, rewind)
    return decode_table_for(pattern, "cpu", prompt, rewind).to(device)


def _table(
    leading: np.ndarray,
    query: np.ndarray,
    key: np.ndarray,
    slot: np.ndarray,
    cache_length: int,
    last_use: np.ndarray,
    rewind: int = 0,
    shared: DecodeTable | None = None,
) -> DecodeTable:
    by_query = np.argsort(query.astype(np.int64) * max(cache_length, 1) + slot[key])
    counts = np.bincount(query, minlength=slot.size)
    return DecodeTable(
        cache_length=cache_length,
        slot=torch.from_numpy(slot),
        prefix=torch.from_numpy(np.array(leading, np.int32)),
        offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])),
        slots=torch.from_numpy(slot[key[by_query]]),
        max_list=int(counts.max()),
        last_use=torch.from_numpy(last_use),
        rewind=rewind,
        shared=shared,
    )


def _allocate(last_use: np.ndarray, first: int, permanent: int, rewind: int) -> tuple[np.ndarray, int]:
    """A slot for each position from `first` on; `permanent` keep their own, as some query's leading run has them."""
    length = last_use.size
    slot = np.maximum(np.arange(length, dtype=np.int32) - first, -1)
    expiring: list[list[int]] = [[] for _ in range(length + 1)]
    free: deque[int] = deque()
    used = permanent
    for position in range(first + permanent, length):
        free.extend(expiring[position])
        if free:
            slot[position] = free.popleft()
        else:
            slot[position], used = used, used + 1
        expiry = max(int(last_use[position]), position) + 1 + rewind
        expiring[min(expiry, length)].append(int(slot[position]))
    return slot, used
