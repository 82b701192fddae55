"""A run on several processes: the group that `torchrun` starts, and what the processes ask of one another.

Everything here is torch.distributed's. A process alone has no group, and asks itself for nothing.

What fails on one process ends all: that one raises its error and says it, the others raise `Elsewhere` and are silent.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard

from dalle_reference.errors import UserError

T = TypeVar("T")


class Elsewhere(Exception):  # noqa: N818 (the error is another process's)
    """Another process has failed, and says why."""


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one's place among them.

    Attributes:
        device: where this process computes.
        rank: its number; 0 prints, and writes what is written once.
        size: how many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def parts(self, batch: int, accumulate: int = 1) -> list[range]:
        """The places in a batch that this process has, one range for each time that gradients are added up.

        Example:
            >>> World(torch.device("cpu"), rank=1, size=2).parts(8, accumulate=2)
            [range(2, 4), range(6, 8)]
        """
        width = batch // (self.size * accumulate)
        return [range(first, first + width) for first in range(self.rank * width, batch, self.size * width)]

    def agree(self, trouble: Exception | None = None) -> None:
        """Goes on only where no process has trouble; the same call on every process.

        Raises:
            Exception: `trouble`, if it is this one's.
            Elsewhere: if it is another's.
        """
        troubled = int(self.total(torch.tensor(int(trouble is not None))))
        if trouble is not None:
            raise trouble
        if troubled:
            raise Elsewhere

    @contextmanager
    def together(self) -> Iterator[None]:
        """What may fail on one process alone: after the block all go on, or all stop."""
        trouble: Exception | None = None
        try:
            yield
        except (UserError, OSError, ValueError) as error:
            trouble = error
        self.agree(trouble)

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives on the main process, on every one; the others wait for it."""
        result: list[Any] = [None]
        with self.together():
            if self.main:
                result = [work()]
        if self.size > 1:
            dist.broadcast_object_list(result, src=0)
        return result[0]

    def main_first(self, load: Callable[[], T]) -> T:
        """What `load` gives, on every process: on the main one first, whose cache of it the others then read."""
        loaded: list[T] = []
        for turn in (True, False):
            with self.together():
                if self.main is turn:
                    loaded.append(load())
        return loaded[0]

    def total(self, values: Tensor) -> Tensor:
        """The sum over processes of a tensor of one shape, on the CPU."""
        values = values.detach().cpu()
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes, in float64, on the CPU."""
        return self.total(values.detach().double()) / self.size

    def least(self, values: Tensor) -> None:
        """Puts the least over processes in the place of each value."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MIN)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, [n, ...] of any n each, one after the other, on the CPU."""
        rows = rows.detach().cpu()
        if self.size == 1:
            return rows
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(rows)
        counts = self.total(counts)
        padded = rows.new_zeros(int(counts.max()), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])

    def gather_differentiably(self, rows: Tensor) -> Tensor:
        """The rows [n, ...] of all processes, of one n, on the device; gradients go back to whose rows they are."""
        mesh = init_device_mesh(self.device.type, (self.size,))
        return DTensor.from_local(rows, mesh, [Shard(0)]).full_tensor(grad_placements=[Partial()])


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The processes that `torchrun` started together, or this one alone; `device` as a configuration names it.

    Raises:
        UserError: for a device that is not there.
        Elsewhere: if another process has ended.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(resolve_device(device))
        return
    here = resolve_device(device)
    if here.type == "cuda":
        here = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(here)
    within = dist.is_initialized()
    if not within:
        dist.init_process_group("cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo")
    try:
        yield World(here, dist.get_rank(), size)
    except RuntimeError as error:
        if type(error) is not UserError and (isinstance(error, dist.DistBackendError) or "gloo" in str(error)):
            raise Elsewhere from error
        raise
    if not within:
        dist.destroy_process_group()


def resolve_device(name: str) -> torch.device:
    """The device that a configuration's name means."""
    found = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if found else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", name):
        raise UserError(f"device: got {name!r}, wanted cpu, cuda, cuda:1 or the like, or auto")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= found:
        raise UserError(f"device: got {name}, but torch finds {found or 'no'} GPU{'s' * (found > 1)} here")
    return device
