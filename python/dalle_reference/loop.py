"""The loop that both stages share: update, average, log, draw, save, and go on exactly where a run stopped.

Everything random in a step is a function of the seed, the step's number and the picture's place in the batch, so the
state of a run is its weights, the optimizer's moments, the running mean and the step: what a checkpoint holds. And so a
run is the same, up to rounding, on any number of processes: each takes its places of every batch (`parallel.World`).
"""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

import numpy as np
import torch
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from dalle_reference import checkpoint, schedules
from dalle_reference.config import RunConfig
from dalle_reference.ema import M, MovingAverage
from dalle_reference.errors import UserError
from dalle_reference.files import exclusive, replacing
from dalle_reference.optimizers import begin_state, moments, move, optimizers
from dalle_reference.parallel import Elsewhere, World, clip, joined, shard, whole
from dalle_reference.render import read_metrics
from dalle_reference.tensor_parallel import divide


class Trains(Protocol):
    """A configuration of something that is trained."""

    @property
    def run(self) -> RunConfig:
        """Where, and for how long."""


C = TypeVar("C", bound=Trains)
_UNCOMPRESSED = 2
"""Steps before gradients are compressed; no fewer have the hook."""
_BLOCK, _MIXED = 1 << 10, 1 << 6
"""Pictures that stand together, and how many such blocks are mixed at a time."""

Prepare = Callable[[int, list[range]], list[tuple[Any, ...]]]
Objective = Callable[..., tuple[torch.Tensor, Any]]
Describe = Callable[[int, list[Any]], dict[str, float]]


class Interrupted(Exception):  # noqa: N818 (nothing has gone wrong)
    """A run was asked to stop; its state is saved."""


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16 autocast where `precision` says so; "auto" where the hardware multiplies bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=_is_bf16(precision, device))


def _is_bf16(precision: str, device: torch.device) -> bool:
    fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return precision == "bf16" or (precision == "auto" and fast)


def batch_indices(step: int, batch: int, count: int, seed: int) -> np.ndarray:
    """The pictures of step `step`: epochs of shuffled order, one after the other, cut in batches."""
    return _pictures_at(range(step * batch, (step + 1) * batch), count, seed)


def distinct_indices(step: int, batch: int, count: int, seed: int) -> np.ndarray:
    """As `batch_indices`, but no batch reaches into the next epoch, so that none holds anything twice."""
    epoch, number = divmod(step, count // batch)
    first = epoch * count + number * batch
    return _pictures_at(range(first, first + batch), count, seed)


def _pictures_at(places: range, count: int, seed: int) -> np.ndarray:
    """The pictures at `places` of an endless row of epochs."""
    window = _BLOCK * _MIXED
    at = ((*divmod(place % count, window), place // count) for place in places)
    return np.array([_shuffled(count, seed, epoch, number)[rest] for number, rest, epoch in at])


@lru_cache(maxsize=4)
def _shuffled(count: int, seed: int, epoch: int, window: int) -> np.ndarray:
    """The pictures of one window of an epoch's order: all, if it has room for them.

    Else blocks of pictures that stand together come in any order, and those of a window are mixed. So a window is all
    that is ever held, and what is read of a disk lies together. Blocks are cut elsewhere in each epoch.
    """
    chance = np.random.default_rng([seed, epoch])
    if count <= _BLOCK * _MIXED:
        return chance.permutation(count)
    shift = chance.integers(count)
    blocks = np.append(chance.permutation(count // _BLOCK), count // _BLOCK)  # the last one is shorter
    mixed = blocks[window * _MIXED : (window + 1) * _MIXED, None] * _BLOCK + np.arange(_BLOCK)
    return (np.random.default_rng([seed, epoch, window]).permutation(mixed[mixed < count]) + shift) % count


def step_generator(seed: int, step: int) -> np.random.Generator:
    """The chance that step `step` may use."""
    return np.random.default_rng([seed, step, 1])


def sample_generator(seed: int, step: int, place: int) -> np.random.Generator:
    """The chance that one picture of step `step` may use, the one at `place` in its batch."""
    return np.random.default_rng([seed, step, 2, place])


def alone_in_its_folder(train: Callable[[C, World], Path]) -> Callable[[C], Path]:
    """A training function whose processes have the run's folder to themselves, and begin (or go on) where a run may.

    Processes that `torchrun` has started anew, because one of them had ended, go on from the newest checkpoint.

    It raises UserError if the folder holds a run and `resume` was not asked for, if there is none to resume, or if
    another process is at work there.
    """

    @wraps(train)
    def train_alone(config: C) -> Path:
        run = config.run
        with joined(run.device) as processes, ExitStack() as held:
            world = replace(processes, tensor=run.tensor)
            # Where there are several machines, torchrun counts on each of them what happened there.
            restarted = bool(world.total(torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))))

            def begin() -> bool:
                """Whether to resume; the folder is this run's from here on."""
                if world.size % (run.tensor * run.replicate):
                    asked = f"tensor {run.tensor} x replicate {run.replicate}"
                    raise UserError(f"tensor, replicate: got {asked}, wanted a divisor of {world.size} processes")
                if run.batch % (world.shares * run.accumulate):
                    shares = f"{world.shares} processes" + f" x {run.accumulate} parts" * (run.accumulate > 1)
                    raise UserError(f"batch: got {run.batch}, wanted a multiple of {shares}")
                if run.out.exists() and not run.out.is_dir():
                    raise UserError(f"{run.out}: is no folder; choose another --out")
                begun = checkpoint.latest(run.out) is not None
                if run.resume and not (begun or restarted):
                    raise UserError(
                        f"{run.out}: no checkpoint there to go on from; without --resume the run begins anew"
                    )
                held.enter_context(exclusive(run.out))
                begun = checkpoint.latest(run.out) is not None
                if begun and not (run.resume or restarted):
                    raise UserError(f"{run.out}: holds a run already; go on with --resume, or choose another --out")
                return begun

            resume = world.first(begin)
            try:
                return train(replace(cast(Any, config), run=replace(run, resume=resume)), world)
            except OSError as error:  # a full disk, most of all
                raise UserError(f"{run.out}: {error}; what was saved before stands") from error

    return train_alone


class _Pass(torch.nn.Module):
    """A model and its objective as one module, whose forward pass DistributedDataParallel sees."""

    def __init__(self, model: torch.nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, *arguments: Any) -> tuple[torch.Tensor, Any]:
        # A divided model's losses are DTensors, which every process has whole. FSDP wants what is no view.
        return tree_map_only(DTensor, lambda loss: loss.to_local().clone(), self.objective(self.model, *arguments))


class Run(Generic[M]):
    """One training run: a model, its optimizer, its running mean, and the folder they are kept in.

    Args:
        config: length, step sizes, places.
        kind: what checkpoints call it, "dvae" for one.
        model: to train; on its device already, the same on every process.
        objective: (model, arguments of a part of a batch) -> the part's mean loss, and what `describe` is to see of it.
        document: the configuration as checkpoints keep it.
        world: the processes that share each batch.

    Raises:
        UserError: if the run to resume is damaged or of another configuration.
    """

    def __init__(
        self,
        config: RunConfig,
        kind: str,
        model: M,
        objective: Objective,
        document: Mapping[str, Any],
        world: World,
    ) -> None:
        self.config, self.kind, self.model, self.document, self.world = config, kind, model, document, world
        self._pass: torch.nn.Module = _Pass(model, objective)
        self.average = MovingAverage(model, config.average)
        self._sharded = world.size > 1 and config.parallel == "fsdp"
        if self._sharded:
            self._whole = copy.deepcopy(self.average.module).to("meta")
            bf16 = _is_bf16(config.precision, world.device)
            grid = world.grid(config.replicate)
            for module in (model, self.average.module):
                if world.tensor > 1:
                    divide(module, grid["tensor"])
                own = grid["replicate", "shard"] if config.replicate > 1 else grid["shard"]
                shard(self._pass if module is model else module, own, bf16)
        self.optimizers = optimizers(model, config)
        self.step = 0
        self.metrics = config.out / "metrics.jsonl"
        self._beside = world
        self._saving: Future[Path] | None = None
        self._compression: PowerSGDState | None = None
        if world.size > 1 and not self._sharded:
            places = [world.device] if world.device.type == "cuda" else None
            if config.powersgd_rank:
                self._compression = PowerSGDState(
                    None, config.powersgd_rank, start_powerSGD_iter=_UNCOMPRESSED, random_seed=config.seed % 2**32
                )
            self._pass = DistributedDataParallel(self._pass, device_ids=places, gradient_as_bucket_view=True)
            if self._compression is not None:
                self._pass.register_comm_hook(self._compression, _compressed)
        if config.resume:
            self._resume()
        elif world.main:
            # What a run that left no checkpoint has measured is measured again.
            self.metrics.unlink(missing_ok=True)

    def train(self, prepare: Prepare, describe: Describe, draw: Callable[[M, int, Any], None]) -> None:
        """Makes the steps that remain.

        Args:
            prepare: (step, places in the batch) -> the objective's arguments for each range of places.
            describe: (step, what the objective gave for each) -> numbers to log; every process calls it.
            draw: (running mean of the model, step, TensorBoard writer): writes pictures of what the model does.

        Raises:
            Interrupted: after SIGINT or SIGTERM, with the state saved.
            UserError: if the loss is no longer a number; the last checkpoint stands.
        """
        config, world = self.config, self.world
        self.model.train()
        if self._compression is not None and self.step:
            self._resume_compression(prepare)
        with ExitStack() as opened:
            stop = opened.enter_context(_stop_flag())
            self._beside = opened.enter_context(world.beside())
            opened.push(self._end)
            if world.tensor > 1:
                opened.enter_context(loss_parallel())
            log, board = opened.enter_context(self._records()) if world.main else (None, None)
            bar = opened.enter_context(
                tqdm(
                    total=config.steps * config.batch,
                    initial=self.step * config.batch,
                    desc=self.kind,
                    unit="pictures",
                    smoothing=0.05,
                    mininterval=0.5 if sys.stderr.isatty() else 15.0,
                    dynamic_ncols=sys.stderr.isatty(),
                    disable=not world.main,
                )
            )
            since, began = self.step, time.perf_counter()
            while self.step < config.steps:
                last = self.step + 1 == config.steps
                detailed = self.step % config.log_every == 0 or last
                rate = self._learning_rate()
                value, seen, stopping = self._gradients(prepare, detailed, stop)
                norm = clip(self.model.parameters(), config.clip)
                for optimizer in self.optimizers:
                    move(optimizer, rate)
                self.model.zero_grad(set_to_none=True)
                self.average.update(self.model, self.step)
                numbers = describe(self.step, seen) if detailed else {}
                self.step += 1
                bar.set_postfix(loss=f"{value:.4f}", refresh=False)
                bar.update(config.batch)
                if detailed:
                    speed = (self.step - since) * config.batch / (time.perf_counter() - began)
                    since, began = self.step, time.perf_counter()
                    numbers |= {
                        "gradient_norm": float(norm),
                        "learning_rate": rate,
                        "pictures_per_second": speed,
                    }
                    with world.together():
                        if world.main:
                            self._log(log, board, {"step": self.step, "loss": value, **numbers})
                if self.step % config.save_every == 0 or last or stopping:
                    self.save()
                if last:
                    self.settle()
                if config.draw_every and (self.step % config.draw_every == 0 or last):
                    mean = self._mean()
                    with world.together():
                        if world.main:
                            draw(mean, self.step, board)
                if stopping and not last:
                    raise self._stopped()

    def _arguments(self, prepare: Prepare, stop: _Stop) -> list[tuple[Any, ...]]:
        """What `prepare` gives for the next step.

        Who asks a run to stop often asks all of its processes, those too that decode pictures, which just end. Then
        the step cannot be made, but those before it can be saved.
        """
        config, world = self.config, self.world
        try:
            with world.together():
                self._require_saved()
                return prepare(self.step, world.parts(config.batch, config.accumulate))
        except (UserError, OSError, ValueError, Elsewhere) as error:  # on every process, if on one
            if not int(world.total(torch.tensor(int(bool(stop))))) or not self.step:
                raise
            # Where the checkpoint before failed, and on whatever process: a new one is what can be done about it.
            with suppress(Exception):
                self.settle()
            self.save()
            raise self._stopped() from error

    def _stopped(self) -> Interrupted:
        config = self.config
        return Interrupted(f"{config.out}: stopped at step {self.step} of {config.steps}, saved; --resume goes on")

    def _gradients(self, prepare: Prepare, detailed: bool, stop: _Stop) -> tuple[float, list[Any], bool]:
        """Adds up a step's gradients: its loss, what `describe` is to see where `detailed`, whether to stop."""
        config, world = self.config, self.world
        parts = self._arguments(prepare, stop)
        total, seen = 0.0, []
        for number, arguments in enumerate(parts, 1):
            waits = isinstance(self._pass, DistributedDataParallel) and number < len(parts)
            with self._pass.no_sync() if waits else nullcontext():  # type: ignore[operator]
                value, trouble = math.nan, None
                try:
                    with autocast(config.precision, world.device):
                        loss, output = self._pass(*arguments)
                    value = float(loss.detach())
                except ValueError as error:  # also how operations refuse NaN
                    trouble = self._not_a_number(error)
                    if self._sharded:  # the others are in the middle of it, and wait for this one's weights
                        raise trouble from error
                if trouble is None and not math.isfinite(value):
                    trouble = self._not_a_number(f"the loss is {value}")
                # One question for all that a step must know of the others.
                losses, troubled, asked = world.total(
                    torch.tensor([value, trouble is not None, bool(stop)]).double()
                ).tolist()
                if trouble is not None:
                    raise trouble
                if troubled:
                    raise Elsewhere
                (loss / len(parts)).backward()
            total += losses / (world.size * len(parts))
            if detailed:
                seen.append(output)
        return total, seen, asked > 0

    def _not_a_number(self, reason: object) -> UserError:
        return UserError(f"{self.config.out}: step {self.step}: {reason}; try a smaller step size")

    @contextmanager
    def _records(self) -> Iterator[tuple[Any, Any]]:
        """The file of metrics and TensorBoard's writer."""
        from torch.utils.tensorboard.writer import SummaryWriter

        with (
            self.metrics.open("a", encoding="utf-8") as log,
            SummaryWriter(str(self.config.out), purge_step=self.step) as board,
        ):
            yield log, board

    def save(self) -> None:
        """Begins a checkpoint of this moment once the one before is written; steps may follow while it is written."""
        self.settle()
        self._saving = checkpoint.begin(
            self.config.out, self.kind, self.step, self.document, self._state(), world=self._beside
        )

    def settle(self) -> None:
        """Waits for the checkpoint that was begun last, and raises what went wrong with it."""
        if self._saving is None:
            return
        try:
            self._saving.result()
        finally:
            if self._saving.done():  # else a signal came: it is waited for again in the end
                self._saving = None

    def _require_saved(self) -> None:
        """Raises what went wrong on this process with the checkpoint that was begun last, as soon as that is known."""
        known = self._saving is not None and self._saving.done()
        if known and not isinstance(cast(Future[Path], self._saving).exception(), Elsewhere):  # which another says
            self.settle()

    def _end(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Waits for the last checkpoint, however training ends; an earlier error is the one to be told."""
        with suppress(Exception) if error is not None and not isinstance(error, Interrupted) else nullcontext():
            self.settle()

    def _state(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint holds, by name."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.average.module.state_dict().items()}
        names: dict[torch.Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer in self.optimizers:
            tensors |= moments(optimizer, names, self.world)
        return tensors | self._compression_state()

    def _compression_state(self) -> dict[str, torch.Tensor]:
        """What compression has left out of this process's gradients, and the matrices that the next begins with."""
        if self._compression is None:
            return {}
        groups = {name: getattr(self._compression, f"{name}_dict") for name in ("error", "p_memory", "q_memory")}
        return {f"{self._own}.{name}.{i}": value for name, group in groups.items() for i, value in group.items()}

    @property
    def _own(self) -> str:
        """What the names of tensors begin with that this process alone has."""
        return f"compression-{self.world.rank}-of-{self.world.size}"

    def _mean(self) -> M:
        """The running mean with all of its weights on the main process, for which every process gives its part."""
        if not self._sharded:
            return self.average.module
        mean = copy.deepcopy(self._whole)
        if self.world.main:
            mean.to_empty(device=self.world.device)
        places = mean.state_dict()
        for name, value in self.average.module.state_dict().items():
            value = whole(value)
            if self.world.main:
                places[name].copy_(value)
        return mean

    def _learning_rate(self) -> float:
        config = self.config
        rate = schedules.half_cosine(self.step, config.steps, config.learning_rate, config.final_learning_rate)
        return rate * schedules.warm_up(self.step, config.warm_up_steps)

    @staticmethod
    def _log(log: Any, board: Any, record: dict[str, float]) -> None:
        log.write(json.dumps(record) + "\n")
        log.flush()
        for name, value in record.items():
            if name != "step":
                board.add_scalar(name, value, record["step"])

    def _resume(self) -> None:
        saved = checkpoint.load(self.config.out, self.kind, self.world)
        self.world.first(lambda: checkpoint.require_same(saved, self.document))
        for optimizer in self.optimizers:
            begin_state(optimizer)
        if self.config.moments == "8bit":
            with self.world.together():
                if not set(self._state()) <= saved.names():
                    raise UserError(
                        f"{saved.path}: its 8-bit moments lie as other processes divided them; go on with as many, "
                        "divided alike"
                    )
        saved.read(self._state(), self.world)
        self.step = saved.step
        if not self.world.main:
            return
        # Lines after the checkpoint are about to be made again.
        kept = [record for record in read_metrics(self.metrics) if record["step"] <= self.step]
        with replacing(self.metrics) as draft:
            draft.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")

    def _resume_compression(self, prepare: Prepare) -> None:
        """Goes on with what compression has left out, where as many processes saved it.

        DDP groups gradients anew after its first pass, by the order in which they came. So one pass is made for
        nothing, and what is read then meets the groups that it was saved for.
        """
        assert self._compression is not None
        self._gradients(prepare, False, _Stop())
        self.model.zero_grad(set_to_none=True)
        saved = checkpoint.load(self.config.out, self.kind, self.world)
        saved.read(self._state(), self.world)
        self._compression.iter = self.step
        for name, value in saved.group(self._own).items():
            group, number = name.split(".")
            getattr(self._compression, f"{group}_dict")[int(number)] = value.to(self.world.device)


def _compressed(state, bucket):  # without types, for annotations are strings here, which DDP refuses
    """PowerSGD of one group of gradients after the other: what it sends for several at a time has no order on gloo."""
    future = powerSGD_hook(state, bucket)
    future.wait()
    return future


class _Stop:
    asked = False

    def __bool__(self) -> bool:
        return self.asked


@contextmanager
def _stop_flag() -> Iterator[_Stop]:
    """True once SIGINT or SIGTERM has come; a second one stops at once."""
    stop = _Stop()

    def on_signal(number: int, frame: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        with suppress(OSError):  # written past Python's buffers, in which this may be an interruption
            os.write(2, b"\nstopping after this step; again to stop at once\n")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
