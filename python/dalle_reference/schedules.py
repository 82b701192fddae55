"""How temperatures, weights and step sizes move while training."""

from __future__ import annotations

import math


def half_cosine(step: int, steps: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at `steps`, and `end` ever after."""
    if step >= steps:
        return end
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def warm_up(step: int, steps: int) -> float:
    """From nearly 0 in even steps to 1, reached after `steps` steps."""
    return min(1.0, (step + 1) / steps) if steps > 0 else 1.0
