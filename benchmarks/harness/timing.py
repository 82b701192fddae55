"""Milliseconds of a call, sampled in turn with others."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch


class CpuTimer:
    """Milliseconds of one call. Short calls are repeated within a sample until it lasts long enough to be read."""

    def __init__(self, runs: Sequence[Callable[[], object]], shortest_ms: float = 0.5) -> None:
        self._turn = itertools.cycle(runs)
        self.repeats = 1
        once = self.sample()
        self.repeats = max(1, min(1000, math.ceil(shortest_ms / max(once, 1e-4))))
        self.estimate = self.sample() * self.repeats

    def sample(self) -> float:
        start = time.perf_counter()
        for _ in range(self.repeats):
            next(self._turn)()
        return (time.perf_counter() - start) * 1e3 / self.repeats


class GpuTimer:
    """Milliseconds of one call by CUDA events, round a CUDA graph of all copies where it can be captured."""

    def __init__(self, runs: Sequence[Callable[[], object]], shortest_ms: float = 0.5) -> None:
        self._turn = itertools.cycle(runs)
        self._graph: torch.cuda.CUDAGraph | None = None
        for run in runs:  # warm up, on the stream of the capture
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                for run in runs:
                    run()
            self._graph, self._calls = graph, len(runs)
        except RuntimeError:  # something in it waits for the host: timed call by call instead
            torch.cuda.synchronize()
            self._calls = 1
        self.repeats = 1
        self.sample()
        self.repeats = max(1, min(1000, math.ceil(shortest_ms / max(self.sample() * self._calls, 1e-4))))
        self.estimate = self.sample() * self.repeats * self._calls

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def sample(self) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(self.repeats):
            if self._graph is not None:
                self._graph.replay()
            else:
                next(self._turn)()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / (self.repeats * self._calls)


Timer: TypeAlias = CpuTimer | GpuTimer


def timer_of(runs: Sequence[Callable[[], object]], device: torch.device) -> Timer:
    return GpuTimer(runs) if device.type == "cuda" else CpuTimer(runs)


def interleave(timers: dict[str, Timer], seconds: float) -> Iterator[dict[str, list[float]]]:
    """Samples of each, in turn; yields all of them after every round. At least three rounds, at most fifty."""
    samples: dict[str, list[float]] = {name: [] for name in timers}
    slowest = max((timer.estimate for timer in timers.values()), default=0.0)
    # Contenders that are much faster than the slowest take a few samples a round: they can afford it.
    turns = {name: max(1, min(5, int(slowest / max(timer.estimate, 1e-6)))) for name, timer in timers.items()}
    names, begun = list(timers), time.perf_counter()
    for number in range(50):
        shift = number % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            for _ in range(turns[name]):
                samples[name].append(timers[name].sample())
        yield samples
        if number >= 2 and time.perf_counter() - begun > seconds:
            return


def quantile(samples: Sequence[float], share: float) -> float:
    """The nearest-rank quantile."""
    return sorted(samples)[min(len(samples) - 1, int(share * len(samples)))]
