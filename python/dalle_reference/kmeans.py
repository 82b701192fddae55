"""k-means by Lloyd's algorithm, on the operations of a codebook."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_kernels import code_statistics, vq_lookup


def lloyd(rows: Tensor, codes: Tensor, rounds: int) -> Tensor:
    """Moves codes to the means of the rows that are nearest to them, again and again.

    A code that no row is nearest to moves to the row that is worst served.

    Args:
        rows: float32 [N, D].
        codes: float32 [K, D], where they begin.

    Returns:
        float32 [K, D]; the same on any number of threads.
    """
    codes = codes.clone()
    for _ in range(rounds):
        nearest, indices = vq_lookup(rows, codes)[:2]
        counts, sums = code_statistics(rows, indices, len(codes))
        used = counts > 0
        codes[used] = sums[used] / counts[used, None]
        worst = (rows - nearest).square().sum(dim=1).argsort(descending=True, stable=True)
        codes[~used] = rows[worst[torch.arange(int((~used).sum())) % len(rows)]]
    return codes


def some_of(rows: Tensor, count: int, chance: torch.Generator) -> Tensor:
    """`count` rows in random order, none twice before each has come once."""
    order = torch.randperm(len(rows), generator=chance)
    return rows[order[torch.arange(count) % len(rows)].to(rows.device)].contiguous()
