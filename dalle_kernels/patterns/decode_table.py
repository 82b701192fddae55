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

    Attributes:
        cache_length: slots that a cache needs.
        slot: int32 [S], where position j's key and value are written.
        prefix: int32 [S]; query i sees slots 0 to prefix[i] - 1, all of them,
        offsets, slots: int64 [S + 1], int32 [m]; and slots[offsets[i]] to slots[offsets[i + 1] - 1], ascending.
        max_list: the length of the longest such list.
    """

    cache_length: int
    slot: torch.Tensor
    prefix: torch.Tensor
    offsets: torch.Tensor
    slots: torch.Tensor
    max_list: int

    @staticmethod
    def build(pattern: Pattern) -> DecodeTable:
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
        last_use = np.full(length, -1, np.int32)
        np.maximum.at(last_use, key, query)
        slot, cache_length = _allocate(last_use, permanent=int(leading.max()))
        by_query = np.argsort(query.astype(np.int64) * cache_length + slot[key])
        counts = np.bincount(query, minlength=length)
        return DecodeTable(
            cache_length=cache_length,
            slot=torch.from_numpy(slot),
            prefix=torch.from_numpy(np.array(leading)),
            offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])),
            slots=torch.from_numpy(slot[key[by_query]]),
            max_list=int(counts.max()),
        )


def decode_table_for(pattern: Pattern, device: torch.device | str = "cpu") -> DecodeTable:
    """`DecodeTable.build`, remembered per (pattern, device)."""
    return _remembered(pattern, str(device))


@remembered(maxsize=64)
def _remembered(pattern: Pattern, device: str) -> DecodeTable:
    if device == "cpu":
        return DecodeTable.build(pattern)
    return _remembered(pattern, "cpu").to(device)


def _allocate(last_use: np.ndarray, permanent: int) -> tuple[np.ndarray, int]:
    """A slot for each position: its own index for the first `permanent`, which lie in some query's leading run."""
    slot = np.arange(last_use.size, dtype=np.int32)
    expiring: list[list[int]] = [[] for _ in range(last_use.size + 1)]
    free: deque[int] = deque()
    used = permanent
    for position in range(permanent, last_use.size):
        free.extend(expiring[position])
        if free:
            slot[position] = free.popleft()
        else:
            slot[position], used = used, used + 1
        expiring[max(int(last_use[position]), position) + 1].append(int(slot[position]))
    return slot, used
