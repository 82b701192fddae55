"""A run on several processes: the group that `torchrun` starts, and what the processes ask of one another.

Everything here is torch.distributed's. A process alone has no group, and asks itself for nothing.

What fails on one process ends all: that one raises its error and says it, the others raise `Elsewhere` and are silent.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

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
        group: what they ask one another in; the default one where None.
        tensor: how many beside one another compute the same pictures together (`tensor_parallel`).
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    tensor: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def shares(self) -> int:
        """How many parts a batch is divided into."""
        return self.size // self.tensor

    def parts(self, batch: int, accumulate: int = 1) -> list[range]:
        """The places in a batch that this process has, one range for each time that gradients are added up.

        Example:
            >>> World(torch.device("cpu"), rank=1, size=2).parts(8, accumulate=2)
            [range(2, 4), range(6, 8)]
        """
        width = batch // (self.shares * accumulate)
        own = self.rank // self.tensor * width
        return [range(first, first + width) for first in range(own, batch, self.shares * width)]

    def mesh(self) -> DeviceMesh:
        """All processes in a row, as DTensors want them."""
        return init_device_mesh(self.device.type, (self.size,))

    def grid(self, replicate: int) -> DeviceMesh:
        """All processes as `replicate` groups that have the same weights, whose members divide them, `tensor` of which
        compute together."""
        sizes = (replicate, self.shares // replicate, self.tensor)
        return init_device_mesh(self.device.type, sizes, mesh_dim_names=("replicate", "shard", "tensor"))

    @contextmanager
    def beside(self) -> Iterator[World]:
        """The same processes in a group of their own (gloo), for a thread that asks while others do; all call it."""
        if self.size == 1:
            yield self
            return
        group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        try:
            yield replace(self, group=group)
        finally:
            dist.destroy_process_group(group)

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
            dist.broadcast_object_list(result, src=0, group=self.group)
        return result[0]

    def collect(self, value: T) -> list[T]:
        """Every process's value."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

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
            dist.all_reduce(values, group=self.group)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes, in float64, on the CPU."""
        return self.total(values.detach().double()) / self.size

    def least(self, values: Tensor) -> None:
        """Puts the least over processes in the place of each value."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MIN, group=self.group)

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
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])

    def gather_differentiably(self, rows: Tensor) -> Tensor:
        """The rows [n, ...] of all processes, of one n, on the device; gradients go back to whose rows they are."""
        return DTensor.from_local(rows, self.mesh(), [Shard(0)]).full_tensor(grad_placements=[Partial()])


ALONE = World(torch.device("cpu"))
"""A process that shares nothing."""


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
        backend = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            place = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            rank = int(os.environ["RANK"])
            dist.init_process_group(backend, store=_of_this_start(place, rank, size), rank=rank, world_size=size)
        else:
            dist.init_process_group(backend)
    try:
        yield World(here, dist.get_rank(), size)
    except RuntimeError as error:
        if type(error) is not UserError and (isinstance(error, dist.DistBackendError) or "gloo" in str(error)):
            raise Elsewhere from error
        raise
    if not within:
        dist.destroy_process_group()


def _of_this_start(store: dist.Store, rank: int, size: int) -> dist.Store:
    """A part of torchrun's store that only processes which were started together know of.

    The store outlives them. Those of a later start would find the addresses of the dead in it, and wait for half an
    hour to be connected, wherever one asks for another's before that one has written it anew. How often torchrun has
    started is no name for the part: on several machines each counts for itself. So whoever comes asks the main process
    under a name of its own, and that one answers until all have heard it.
    """
    if rank:
        mine = secrets.token_hex(16)
        store.set(f"asks/{rank}", mine)
        start = store.get(f"answer/{mine}").decode()
        store.add(f"{start}/heard", 1)
    else:
        start = secrets.token_hex(16)
        while store.add(f"{start}/heard", 0) < size - 1:
            for other in range(1, size):
                if store.check([f"asks/{other}"]):
                    store.set(f"answer/{store.get(f'asks/{other}').decode()}", start)
            time.sleep(0.02)
    return dist.PrefixStore(start, store)


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


def shard(root: nn.Module, mesh: DeviceMesh, bf16: bool) -> None:
    """Gives each process its part of every parameter (FSDP2), in place.

    What stands in a list of modules, such as a transformer's blocks, is gathered when its turn comes and given back;
    the rest is gathered once a pass. Passes begin with `root`'s forward.

    Args:
        bf16: parameters are gathered in bfloat16, and gradients added up in float32.

    Raises:
        UserError: for a parameter without dimensions, which FSDP2 cannot divide.
    """
    for name, parameter in root.named_parameters():
        if not parameter.dim():
            raise UserError(
                f"parallel: got fsdp, wanted ddp for a model with a single number among its weights ({name})"
            )
    halves = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    if not all(parameter.is_contiguous() for parameter in root.parameters()):
        root.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP takes no other
    for part in (*_units(root), root):
        fully_shard(part, mesh=mesh, mp_policy=halves if bf16 else MixedPrecisionPolicy())


def _units(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _units(child)


def clip(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Scales gradients so that their norm is `most` at the most, and returns what it was, 0-dim.

    As torch's `clip_grad_norm_`, which takes gradients of one mesh alone.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    meshes: dict[Any, list[Tensor]] = {}
    for grad in grads:
        meshes.setdefault(getattr(grad, "device_mesh", None), []).append(grad)
    norms = torch.stack([_whole_number(nn.utils.get_total_norm(some)) for some in meshes.values()])
    norm = norms[0] if len(norms) == 1 else norms.norm()
    torch._foreach_mul_([*map(local, grads)], (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _whole_number(value: Tensor) -> Tensor:
    """As `whole`, by one dimension of the mesh after the other, as torch would too, but with a warning."""
    if not isinstance(value, DTensor):
        return value
    for at in range(value.device_mesh.ndim):
        value = value.redistribute(placements=[*[Replicate()] * (at + 1), *value.placements[at + 1 :]])
    return value.to_local()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor as every process sees it, or the tensor; all processes ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
