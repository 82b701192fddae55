"""What a benchmark is made of: cells, and the contenders that perform each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    return {value: name for name, value in DTYPES.items()}[dtype]


class UnavailableError(Exception):
    """A contender cannot run here; the message says why, and becomes its row."""


class TooSlowError(Exception):
    """A contender's first call took so long that timing it would hold up everything else."""


@dataclass
class Check:
    """How far an answer is from the truth, and how far it may be."""

    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False where the error is NaN


@dataclass
class Trial:
    """A contender made ready.

    Attributes:
        runs: what is timed, one callable for each rotating copy of the input.
        verify: computes the answer once more, outside the timing, and compares it with the truth.
        notes: further figures of the row, such as the time that building a block mask took.
        counts: what one run makes how many of; the row says them per second.
        elsewhere: other processes do the work, whose memory is not seen here.
    """

    runs: Sequence[Callable[[], object]]
    verify: Callable[[], Check]
    notes: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    elsewhere: bool = False


@dataclass(frozen=True)
class Contender:
    """A name, and how to make it ready; `prepare` raises UnavailableError where it cannot run."""

    name: str
    prepare: Callable[[], Trial]


def when_installed(make: Callable[[], Any], contenders: Callable[[Any], Iterable[Contender]]) -> Iterator[Contender]:
    """The contenders for what `make` makes; where that cannot be imported, a row that says so."""
    try:
        made = make()
    except ImportError as error:
        reason = str(error)

        def prepare() -> Trial:
            raise UnavailableError(reason)

        yield Contender("dalle_kernels", prepare)
    else:
        yield from contenders(made)


@dataclass(frozen=True)
class Work:
    """What a cell's computation amounts to, whoever performs it."""

    flops: float = 0.0
    bytes: float = 0.0
    visible_pairs: int | None = None
    executed_pairs: int | None = None
    ceiling: str = "gemm"  # which ceiling bounds it: "gemm", or "copy" for what is bound by memory


@dataclass(frozen=True)
class Cell:
    """One computation on one input.

    Attributes:
        suite: the benchmark that it belongs to.
        case: what distinguishes it, printed and saved.
        dtype: of the input; picks the ceiling.
        work: see `Work`.
        contenders: made when the cell's turn comes, so that a list of cells costs nothing.
        series: cells that differ only in size share a series: a contender that gave up on one skips the larger ones.
        finish: adds to our row what follows from several rows.
    """

    suite: str
    case: dict[str, Any]
    dtype: torch.dtype
    work: Callable[[], Work]
    contenders: Callable[[], Iterable[Contender]]
    series: str = ""
    finish: Callable[[dict[str, dict[str, Any]]], dict[str, Any]] | None = None

    def __str__(self) -> str:
        return f"{self.suite}: " + ", ".join(f"{name} {value}" for name, value in self.case.items())


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        device: where.
        seconds: how long the rounds of one cell may take together.
        patience: a contender whose first call takes longer than this many seconds is not timed.
        only: names of contenders; empty for all. Ours is always there.
    """

    device: torch.device
    seconds: float = 4.0
    patience: float = 30.0
    only: tuple[str, ...] = ()
