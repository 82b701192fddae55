"""Processes that train together and make steps when they are told to, so that several such teams are timed in turn.

Each runs the reference's own loop (`dalle_reference.loop.Run`), which asks for a batch before a step: there it waits.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Training:
    """What a team trains.

    Attributes:
        model, run: fields of a `TransformerConfig` and of a `RunConfig` that are not the defaults.
        batch: pictures of a step, all processes together.
        threads: of each process.
    """

    model: dict[str, Any]
    run: dict[str, Any] = field(default_factory=dict)
    batch: int = 16
    threads: int = 1


class Team:
    """Some processes on this machine, by gloo; one alone has no group. They end with the object."""

    def __init__(self, processes: int, training: Training) -> None:
        context = multiprocessing.get_context("spawn")
        folder = Path(tempfile.mkdtemp(prefix="team-"))
        self._ends: list[Connection] = []
        started = []
        for rank in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, processes, folder, training, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            started.append(process)
        self._finalizer = weakref.finalize(self, _end, self._ends, started, folder)
        self._replies()

    def steps(self, count: int, save: bool = False) -> list[float]:
        """Makes so many steps, after a checkpoint where `save`: the loss of each."""
        for end in self._ends:
            end.send((save, count))
        losses, _ = zip(*self._replies(), strict=True)
        return torch.tensor(losses).mean(dim=0).tolist()

    def gradient_bytes(self) -> int:
        """Bytes of gradients, compressed ones as they are, that a process gave to be added up since it began."""
        for end in self._ends:
            end.send((False, 0))
        return self._replies()[0][1]

    def close(self) -> None:
        """Ends the processes."""
        self._finalizer()

    def _replies(self) -> list[tuple[list[float], int]]:
        replies = []
        for end in self._ends:
            try:
                reply = end.recv()
            except EOFError:
                raise RuntimeError("a process of the team has ended") from None
            if isinstance(reply, str):
                raise RuntimeError(reply)
            replies.append(reply)
        return replies


def _end(ends: Sequence[Connection], processes: Sequence[Any], folder: Path) -> None:
    for end in ends:
        end.close()
    for process in processes:
        process.join(10)
        if process.is_alive():
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def _work(rank: int, size: int, folder: Path, training: Training, orders: Connection) -> None:
    """A process of a team, until the other end of `orders` is closed."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (the loop's bar of progress; it lives as long as the process)
    torch.set_num_threads(training.threads)
    try:
        if size > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
        _train(rank, size, folder, training, orders)
    except EOFError:
        pass
    except Exception as error:
        orders.send(f"{type(error).__name__}: {error}")


def _train(rank: int, size: int, folder: Path, training: Training, orders: Connection) -> None:
    from dalle_reference.config import RunConfig
    from dalle_reference.loop import Run
    from dalle_reference.parallel import World
    from dalle_reference.transformer import DalleTransformer, TransformerConfig

    config = TransformerConfig(**training.model)
    run_config = RunConfig(
        **{"out": folder / "run", "steps": 10**6, "batch": training.batch, "warm_up_steps": 10, "precision": "fp32"},
        **{"save_every": 10**6, "draw_every": 0, "device": "cpu", **training.run},
    )
    world = World(torch.device("cpu"), rank, size)
    torch.manual_seed(0)
    model = DalleTransformer(config)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    losses: list[float] = []
    handed = left = 0

    def objective(model: DalleTransformer, text: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, None]:
        loss = model.loss(text, image).total
        losses.append(loss.item())
        return loss, None

    def prepare(step: int, parts: list[range]) -> list[tuple[torch.Tensor, ...]]:
        nonlocal left, handed
        while not left:
            orders.send((losses.copy(), handed))
            losses.clear()
            save, left = orders.recv()
            if save:
                run.save()
        left -= 1
        if size > 1 and not run_config.powersgd_rank:
            handed += whole
        return [pictures(config.grid, config.vocab_text, config.vocab_image, step, part) for part in parts]

    add_up = dist.all_reduce

    def counted(tensor: torch.Tensor, *rest: Any, **named: Any) -> Any:
        nonlocal handed
        if named.get("async_op"):  # a gradient; the loop's own questions wait for their answers
            handed += tensor.nbytes
        return add_up(tensor, *rest, **named)

    dist.all_reduce = counted
    run_config.out.mkdir(exist_ok=True)
    run = Run(run_config, "transformer", model, objective, {}, world)
    run.train(prepare, lambda *_: {}, lambda *_: None)


def pictures(
    grid: tuple[int, int], vocab_text: int, vocab_image: int, step: int, places: range
) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions [n, 4] and tokens [n, cells] of a rectangle on a ground: two colours, a row and a column.

    What a picture shows goes by step and place, as in training: one process or several see the same.
    """
    from dalle_reference.loop import sample_generator

    captions, images = [], []
    for place in places:
        chance = sample_generator(0, step, place)
        ground, colour = chance.integers(min(vocab_text, vocab_image, 64), size=2)
        row, column = chance.integers(grid[0]), chance.integers(grid[1])
        image = torch.full(grid, int(ground))
        image[row:, column:] = int(colour)
        captions.append(torch.tensor([ground, colour, row, column]) % vocab_text)
        images.append(image.flatten())
    return torch.stack(captions), torch.stack(images)
