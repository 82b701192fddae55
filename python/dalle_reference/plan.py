"""What a training step would need on so many GPUs, found without one: `dalle-reference plan`.

The step is run as it is, forward, backward and AdamW's update, on tensors that have shapes and no memory
(FakeTensorMode) and with a process group that sends nothing. What lives is added up after each operation, and what
passes between processes is counted as it is asked for.

What a kernel takes inside of itself is not seen, nor is what the allocator loses between blocks.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dalle_kernels import KVCache, Pattern
from dalle_reference.config import RunConfig
from dalle_reference.optimizers import begin_state, optimizers
from dalle_reference.parallel import World, clip, local, shard
from dalle_reference.tensor_parallel import divide
from dalle_reference.transformer import DalleTransformer, Recompute, TransformerConfig


@dataclass(frozen=True)
class Layout:
    """How a step is spread over GPUs.

    Attributes:
        gpus: how many.
        batch: pictures of a step, all GPUs together.
        parallel, accumulate, recompute, replicate, tensor: as in the training commands.
        bf16: the model computes in bfloat16; weights and moments are float32 either way.
    """

    gpus: int
    batch: int
    parallel: Literal["ddp", "fsdp"] = "fsdp"
    accumulate: int = 1
    recompute: Recompute = "none"
    bf16: bool = True
    replicate: int = 1
    tensor: int = 1

    @property
    def shares(self) -> int:
        """How many parts a batch is divided into."""
        return self.gpus // self.tensor

    @property
    def together(self) -> int:
        """How many have all weights among them."""
        return self.gpus // self.replicate if self.parallel == "fsdp" else 1


@dataclass(frozen=True)
class Needs:
    """What one GPU needs for a step.

    Attributes:
        weights, moments, average: bytes of its part of each.
        peak: bytes at the worst moment, these and all activations, gradients and gathered weights.
        sent: bytes that it sends, by the collective that asks; "tensor" where processes that compute together do.
        flops: floating-point operations, what is computed anew included.
        parameters: of the model.
    """

    weights: int
    moments: int
    average: int
    peak: int
    sent: dict[str, int]
    flops: float
    parameters: int


def needs(config: TransformerConfig, layout: Layout) -> Needs:
    """Runs a step that has no memory.

    Raises:
        ValueError: if GPUs and parts do not divide the batch, or the layout the GPUs.
        UserError: if `tensor` does not divide the model's heads and vocabularies.

    Example:
        >>> tiny = TransformerConfig(vocab_text=64, vocab_image=64, grid=(4, 4), layers=2)
        >>> needs(tiny, Layout(gpus=4, batch=8)).peak < 50e6
        True
    """
    if layout.gpus % (layout.tensor * layout.replicate):
        asked = f"tensor {layout.tensor} x replicate {layout.replicate}"
        raise ValueError(f"tensor, replicate: got {asked}, wanted a divisor of {layout.gpus} GPUs")
    if layout.batch % (layout.shares * layout.accumulate):
        raise ValueError(f"batch: got {layout.batch}, wanted a multiple of {layout.shares} x {layout.accumulate}")
    sharded = layout.parallel == "fsdp" and layout.gpus > 1
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with _pretended_group(layout if sharded else None) as mesh:
        with fake:
            model, mean = DalleTransformer(config), DalleTransformer(config).requires_grad_(False)
        model.recompute = layout.recompute
        parameters = sum(parameter.numel() for parameter in model.parameters())
        step = _Step(model)
        if sharded:  # outside of the mode, in which meshes cannot be made of meshes
            own_mesh = mesh["replicate", "shard"] if layout.replicate > 1 else mesh["shard"]
            for module in (model, mean):
                if layout.tensor > 1:
                    divide(module, mesh["tensor"])
                shard(step if module is model else module, own_mesh, layout.bf16)
        with fake, loss_parallel() if layout.tensor > 1 else nullcontext():
            return _seen(step, mean, layout, parameters)


def _seen(step: _Step, mean: DalleTransformer, layout: Layout, parameters: int) -> Needs:
    """What is seen of a step."""
    model, config = step.model, step.model.config
    own = layout.batch // (layout.shares * layout.accumulate)
    (optimizer,) = optimizers(model, RunConfig(Path("unused")))
    text = torch.zeros(own, config.caption_length, dtype=torch.int64)
    image = torch.zeros(own, config.image_length, dtype=torch.int64)
    begin_state(optimizer)
    kept = [*model.parameters(), *mean.parameters(), *_moments(optimizer)]

    def add_gradients() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=layout.bf16):
            loss = step(text, image)
        loss.backward()

    def update() -> None:
        clip(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_([*map(local, mean.parameters())], [*map(local, model.parameters())], 0.5)

    if layout.tensor > 1:  # DTensors try an operation whole when they first meet it, and remember what comes of it
        add_gradients()
        update()
    live = _Live(layout.tensor > 1)
    with live:
        live.watch([local(tensor) for tensor in kept])
        passes = min(layout.accumulate, 2)  # the third and later ones are as the second
        for _ in range(passes):
            add_gradients()
        live.repeat(layout.accumulate / passes)
        update()
    weights, average = _bytes(model.parameters()), _bytes(mean.parameters())
    sent = dict(live.sent)
    if layout.parallel == "ddp" and layout.gpus > 1:
        sent["allreduce"] = round(2 * (layout.gpus - 1) / layout.gpus * weights)
        live.peak += weights  # where gradients are sent from, and stay
    return Needs(weights, _bytes(_moments(optimizer)), average, live.peak, sent, live.flops, parameters)


def fitting(
    config: TransformerConfig,
    gpus: int,
    batch: int,
    memory: float,
    bf16: bool,
    replicate: Iterable[int] = (1,),
    tensor: Iterable[int] = (1,),
) -> list[tuple[Layout, Needs]]:
    """The layouts whose peak is at most `memory` bytes: of each way to share and to compute anew, the fewest parts.

    Of every pair of `replicate` and `tensor`, of which ddp has 1 alone.
    """
    found = []
    grids = list(itertools.product(replicate, tensor))
    ways = [Layout(gpus, batch, "fsdp", replicate=groups, tensor=beside) for groups, beside in grids if gpus > 1]
    if (1, 1) in grids:
        ways.insert(0, Layout(gpus, batch, "ddp"))
    for way, recompute in itertools.product(ways, get_args(Recompute)):
        # Weights, moments and mean alone are soon counted.
        if 16 * _parameters(config) / way.together > memory:
            continue
        own = batch // way.shares
        parts = [1 << power for power in range((own & -own).bit_length())]
        tried: dict[int, tuple[Layout, Needs]] = {}

        def fits(accumulate: int, way: Any = way, recompute: Any = recompute, tried: Any = tried) -> bool:
            layout = replace(way, accumulate=accumulate, recompute=recompute, bf16=bf16)
            tried[accumulate] = layout, needs(config, layout)
            return tried[accumulate][1].peak <= memory

        # From two parts on, which keep gradients between them, more parts never need more.
        fewest = 0 if fits(1) else bisect.bisect_left(parts, True, lo=1, key=fits)
        if fewest < len(parts):
            found.append(tried[parts[fewest]])
    return found


@functools.lru_cache(maxsize=1)
def _parameters(config: TransformerConfig) -> int:
    with FakeTensorMode():
        return sum(parameter.numel() for parameter in DalleTransformer(config).parameters())


def sampling_bytes(config: TransformerConfig, candidates: int, bf16: bool = True) -> int:
    """Bytes that one GPU needs to draw so many candidates of a caption: weights, keys and values, logits."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    with FakeTensorMode():
        model = DalleTransformer(config)
        weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize

    def kept(pattern: Pattern, copies: int) -> int:
        """Bytes of one head's cache; it says how much candidates share once it has the prompt."""
        cache = KVCache(pattern, 1, 1, config.head_dim, dtype, copies=copies)
        prompt = torch.zeros(1, 1, config.text_length, config.head_dim, dtype=dtype)
        cache.prefill(prompt, prompt)
        return cache.nbytes

    total = 0
    for pattern, layers in Counter(config.patterns).items():
        two, three = kept(pattern, 2), kept(pattern, 3)
        total += layers * config.heads * (two + (candidates - 2) * (three - two))
    return weights + total + 4 * candidates * config.vocab_image


class _Step(torch.nn.Module):
    def __init__(self, model: DalleTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        loss = self.model.loss(text, image).total
        return loss.to_local().clone() if isinstance(loss, DTensor) else loss  # as the training loop has it


class _Live(TorchDispatchMode):
    """Adds up the storages that live, after each operation, and what collectives are asked to send."""

    def __init__(self, computes_together: bool) -> None:
        super().__init__()
        self._computes_together = computes_together
        self.peak = 0
        self.flops = 0
        self._counts = {**flop_registry, **_attention_flops()}
        self.sent: Counter[str] = Counter()
        self._total = 0
        self._storages: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def watch(self, tensors: Any) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._storages:
                    self._storages[key] = weakref.ref(storage, functools.partial(self._forget, key)), size
                    self._total += size
        self.peak = max(self.peak, self._total)

    def repeat(self, times: float) -> None:
        """Counts what was sent and computed so far so many times."""
        self.flops = round(self.flops * times)
        self.sent = Counter({name: round(size * times) for name, size in self.sent.items()})

    def _forget(self, key: int, _: object) -> None:
        self._total -= self._storages.pop(key)[1]

    def _measure_again(self) -> None:
        """FSDP gives weights back by making their storages empty, and takes them up by making them large."""
        for key, (reference, size) in list(self._storages.items()):
            storage = reference()
            if storage is not None and storage.nbytes() != size:
                self._storages[key] = reference, storage.nbytes()
                self._total += storage.nbytes() - size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._computes_together and any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it asks of its parts comes here again
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in self._counts:
            self.flops += self._counts[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        self._count_sent(func, args, result)
        if func.namespace in ("c10d", "fsdp") or func._opname == "split_with_sizes_copy":
            self._measure_again()
        self.watch(result)
        return result

    def _count_sent(self, func: Any, args: Any, result: Any) -> None:
        """By ring algorithms: each process passes on all but its own part of what is whole."""
        name, where = _COLLECTIVES.get((func.namespace, func._opname), ("", 0))
        of_tensor = func.namespace == "_c10d_functional"
        if not name or (of_tensor and not self._computes_together):
            return
        size = sum(leaf.nbytes for leaf in tree_leaves((result, *args)[where]) if isinstance(leaf, Tensor))
        group = next(group for group in map(_group, args) if group is not None).size()
        self.sent["tensor " * of_tensor + name] += round(size * (group - 1) / group * (2 if name == "allreduce" else 1))


# What is asked for under FSDP, and by DTensors: the name and where what is whole stands, the result or an argument.
_COLLECTIVES = {
    ("c10d", "_allgather_base_"): ("allgather", 1),
    ("c10d", "_reduce_scatter_base_"): ("reduce_scatter", 2),
    ("c10d", "allreduce_"): ("allreduce", 1),
    ("_c10d_functional", "all_gather_into_tensor"): ("allgather", 0),
    ("_c10d_functional", "reduce_scatter_tensor"): ("reduce_scatter", 1),
    ("_c10d_functional", "all_reduce"): ("allreduce", 1),
    ("_c10d_functional", "all_reduce_"): ("allreduce", 1),
    ("_c10d_functional", "all_to_all_single"): ("alltoall", 1),
}


def _group(argument: Any) -> dist.ProcessGroup | None:
    """The process group that an argument of a collective is, or names."""
    if isinstance(argument, dist.ProcessGroup):
        return argument
    if isinstance(argument, torch.ScriptObject):
        return dist.ProcessGroup.unbox(argument)
    if isinstance(argument, str) and argument not in ("sum", "avg", "max", "min"):
        return dist.distributed_c10d._resolve_process_group(cast(Any, argument))
    return None


@contextmanager
def _pretended_group(layout: Layout | None) -> Iterator[Any]:
    """The grid of a process group that sends nothing, of which this process is the first; None where there is none."""
    if layout is None:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=layout.gpus, store=FakeStore())
    try:
        yield World(torch.device("cpu"), 0, layout.gpus, tensor=layout.tensor).grid(layout.replicate)
    finally:
        dist.destroy_process_group()


def _moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


def _bytes(tensors: Any) -> int:
    return sum(local(tensor).nbytes for tensor in tensors)


def _attention_flops() -> dict[Any, Any]:
    """Of the visible pairs: two products forward, five backward, of 2 D operations a pair."""

    def forward(q: Tensor, *rest: Any, **_: Any) -> int:
        return 4 * math.prod(q.shape[:2]) * q.shape[3] * _pattern(rest).visible_pairs

    def backward(*arguments: Any, **_: Any) -> int:
        q = next(entry for entry in arguments if isinstance(entry, Tensor) and entry.dim() == 4)
        return 10 * math.prod(q.shape[:2]) * q.shape[3] * _pattern(arguments).visible_pairs

    def _pattern(arguments: tuple[Any, ...]) -> Pattern:
        return next(Pattern.parse(entry) for entry in arguments if isinstance(entry, str) and entry != "auto")

    ops = torch.ops.dalle_kernels
    return {ops.attention_forward: forward, ops.attention_backward: backward}
