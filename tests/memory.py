"""The memory of a training step, as torch's allocator sees it."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_of_second(step: Callable[[], None], kept: Callable[[], int]) -> int:
    """Bytes at the worst moment of a second step: what is `kept` between two, and what this one takes besides."""
    step()
    before = kept()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    now = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return before + peak


def moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All that an optimizer keeps."""
    return [value for state in optimizer.state.values() for value in state.values()]
