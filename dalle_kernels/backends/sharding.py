"""Operations on DTensors: the dimensions along which each falls apart, so that every process computes its own part.

An operation is local where its inputs are divided along one of its axes: batch and heads of attention, the rows of a
lookup. Inputs that an axis does not name are needed whole by every process, and their gradients are partial sums. Where
an operation chooses among what is divided, such as a codebook's rows, each process chooses among its own, and then they
compare; where it mixes what is divided, they merge what each has. What is divided otherwise is redistributed: queries,
keys and values that are divided along the sequence are exchanged for heads, and the results exchanged back
(DeepSpeed-Ulysses, Jacobs et al. 2023, section 3); all else is made whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from dalle_kernels.checks import rows_contiguous

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

In = TypeVar("In", bound=tuple[Any, ...])
Out = TypeVar("Out", bound=tuple[Any, ...])


class Axis(NamedTuple):
    """A dimension along which an operation falls apart, by its place in each input and output that has it.

    Attributes:
        inputs: fields of the room's `Inputs`; the first of them decides.
        outputs: fields of its `Outputs`; those not named are sums over the axis, or nothing that anybody reads.
        means: outputs that are means over it.
        draws: whether noise counts rows along it, from `row_offset` on; along others nothing that draws is divided.
        exchanged: the operation does not fall apart along it: it is exchanged for another, and its results back.
    """

    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    means: tuple[str, ...] = ()
    draws: bool = False
    exchanged: bool = False


class Choice(NamedTuple):
    """A dimension along which an operation chooses the best, so that a part of it gives the best of that part.

    Attributes:
        axis: the inputs that have it; no output has.
        least: the output that is smallest where the choice is best.
        which: the output that says which was chosen, the first of equal ones.
        among: the input that says how many there are.
        possible: whether a call's choice is by `least`.
    """

    axis: Axis
    least: str
    which: str
    among: str
    possible: Callable[[Any], bool]


class Merge(NamedTuple):
    """A dimension along which an operation mixes, so that what its parts give can be merged.

    Attributes:
        axis: the inputs that have it; no output has.
        possible: (inputs, backend, the whole's size, processes that it is divided among) -> whether they can be merged.
        merged: (the operation, inputs of this process's part, backend, the whole's size, the mesh and its dimension
            along which it is divided) -> the whole's outputs. Where the call draws, inputs that all processes have are
            not cut.
    """

    axis: Axis
    possible: Callable[[Any, str, int, int], bool]
    merged: Callable[[Any, Any, str, int, tuple[DeviceMesh, int]], Any]


def divided(values: Iterable[Any]) -> bool:
    """Whether a DTensor is among the values."""
    # Not imported where nobody has: it takes half a second.
    module = getattr(torch.distributed, "tensor", None)
    return module is not None and any(isinstance(value, module.DTensor) for value in values)


def everywhere(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor`, which all processes have, as what a DTensor `like` can be computed with; itself beside any other."""
    if not divided((like,)):
        return tensor
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    return DTensor.from_local(tensor, like.device_mesh)


def flattened(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    """`tensor.reshape(shape)`, rows of any dimensions as a table. What a DTensor cannot do in parts it does whole."""
    if tensor.dim() == len(shape):
        return tensor
    if divided((tensor,)):
        from torch.distributed.tensor import Replicate

        its: Any = tensor
        mesh, parts = its.device_mesh, [1] * its.dim()
        for at, placement in enumerate(its.placements):
            if placement.is_shard():
                parts[placement.dim] *= mesh.size(at)
        if any(size % count for size, count in zip(its.shape[:-1], parts, strict=False)):
            tensor = its.redistribute(placements=[Replicate()] * mesh.ndim)
    return tensor.reshape(shape)


def locally(
    call: Callable[[In, str], Out], axes: Sequence[Axis], inputs: In, backend: str, choice: Choice | Merge | None = None
) -> Out:
    """`call(inputs, backend)` of DTensors, each process on its own part.

    Raises:
        TypeError: where an input is a DTensor and another is not.
        ValueError: where they lie on different meshes.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    given: dict[str, Any] = inputs._asdict()  # type: ignore[attr-defined]
    tensors = {name: value for name, value in given.items() if isinstance(value, DTensor)}
    mesh = next(iter(tensors.values())).device_mesh
    for name, value in given.items():
        if name in _NUMBERS or not isinstance(value, torch.Tensor):
            continue
        if name not in tensors:
            raise TypeError(f"{name}: got a torch.Tensor, wanted a DTensor as {next(iter(tensors))} is")
        if tensors[name].device_mesh != mesh:
            wanted = f"{mesh} as {next(iter(tensors))} is on"
            raise ValueError(f"{name}: got a DTensor on {tensors[name].device_mesh}, wanted {wanted}")

    leader = next(iter(axes[0].inputs))
    draws = given.get("seed") is not None and given.get("noise", True)
    own = [_along(axes, leader, placement) for placement in tensors[leader].placements]

    def possible(axis: Axis) -> bool:
        divides = [mesh.size(at) for at, by in enumerate(own) if by is not None and (by is axis or by.exchanged)]
        return not axis.exchanged and (axis.draws or not draws) and _fits(axis, tensors, math.prod(divides))

    usable = [axis for axis in axes if possible(axis)]
    chosen = [
        None if axis is None else axis if axis in usable else next(iter(usable), None) if axis.exchanged else None
        for axis in own
    ]

    parts: dict[str, Any] = {}
    merge: tuple[Callable[..., Any], int, int] | None = None
    cut = _cut(choice.axis, chosen, tensors) if isinstance(choice, Merge) else None
    if isinstance(choice, Merge) and cut is not None:
        name, at = next(iter(choice.axis.inputs.items()))
        size = tensors[name].shape[at]
        if choice.possible(inputs, backend, size, mesh.size(cut)):
            chosen[cut] = choice.axis
            merge = choice.merged, size, cut
    best = choice if isinstance(choice, Choice) and choice.possible(inputs) else None
    if best is not None:
        name, at = next(iter(best.axis.inputs.items()))
        cuts = [axis is None and by.is_shard(at) for axis, by in zip(chosen, tensors[name].placements, strict=True)]
        count = math.prod(mesh.size(place) for place, cut in enumerate(cuts) if cut)
        if tensors[name].shape[at] % count == 0:
            chosen = [best.axis if cut else axis for axis, cut in zip(chosen, cuts, strict=True)]
            parts[best.among] = tensors[name].shape[at] // count

    def placed(places: Callable[[Axis], Mapping[str, int]], name: str, otherwise: Placement) -> list[Placement]:
        """By dimension of the mesh; `otherwise` where its axis does not name it, whole where there is no axis."""
        return [
            Replicate() if axis is None else Shard(places(axis)[name]) if name in places(axis) else otherwise
            for axis in chosen
        ]

    def local(name: str, tensor: DTensor) -> torch.Tensor:
        wanted = placed(lambda axis: axis.inputs, name, Replicate())
        grad = placed(lambda axis: axis.inputs, name, Partial())
        if merge is not None and draws and not tensor.placements[merge[2]].is_shard():
            wanted[merge[2]], grad[merge[2]] = Replicate(), Partial()
        part = tensor.redistribute(placements=wanted).to_local(grad_placements=grad)
        return part.contiguous() if tensor.is_contiguous() else rows_contiguous(part)

    parts |= {name: local(name, tensor) for name, tensor in tensors.items()}
    if draws:
        # One seed for all: where the caller gave none, each process has drawn its own.
        if isinstance(given["seed"], torch.Tensor):
            parts["seed"] = distribute_tensor(given["seed"], mesh, [Replicate()] * mesh.ndim).to_local()
        first, _ = _share(chosen, next(axis for axis in axes if axis.draws), tensors[leader], mesh)
        parts["row_offset"] = given["row_offset"] + first
    given_parts: In = inputs._replace(**parts)  # type: ignore[attr-defined]
    if merge is None:
        results = call(given_parts, backend)
    else:
        merged, size, at = merge
        results = merged(call, given_parts, backend, size, (mesh, at))
        chosen[at] = None  # the results are the whole's, on each process
    if best is not None and best.axis in chosen:
        first, _ = _share(chosen, best.axis, tensors[next(iter(best.axis.inputs))], mesh)
        results = _best(results, best, first, mesh, [at for at, axis in enumerate(chosen) if axis is best.axis])

    def whole(name: str, result: torch.Tensor) -> torch.Tensor:
        shape = list(result.shape)
        for axis in (axis for place, axis in enumerate(chosen) if axis is not None and axis not in chosen[:place]):
            if name in axis.outputs:
                shape[axis.outputs[name]] = tensors[leader].shape[axis.inputs[leader]]
            elif name in axis.means:
                _, count = _share(chosen, axis, tensors[leader], mesh)
                if not count:  # the mean of nothing; other processes wait for this one's part of the gradient
                    result = result.nan_to_num(0.0)
                result = result * (count / max(tensors[leader].shape[axis.inputs[leader]], 1))
        laid = placed(lambda axis: axis.outputs, name, Partial())
        stride = _stride(result, shape)
        joined = DTensor.from_local(result, mesh, laid, run_check=False, shape=torch.Size(shape), stride=stride)
        back = [
            Shard(before.outputs[name]) if before is not None and before.exchanged and name in before.outputs else now
            for before, now in zip(own, laid, strict=True)
        ]
        if best is not None:
            back = [Replicate() if axis is best.axis else now for axis, now in zip(chosen, back, strict=True)]
        return joined.redistribute(placements=back)

    return type(results)(*(whole(name, result) for name, result in results._asdict().items()))  # type: ignore[attr-defined]


def _best(results: Out, choice: Choice, first: int, mesh: DeviceMesh, dimensions: Sequence[int]) -> Out:
    """Each process's results where its choice is the best of all, and zeros elsewhere; the first of equal ones is."""
    from torch.distributed._functional_collectives import all_reduce

    def least(values: torch.Tensor) -> torch.Tensor:
        for dimension in dimensions:
            values = all_reduce(values, "min", (mesh, dimension))
        return values

    values: dict[str, torch.Tensor] = results._asdict()  # type: ignore[attr-defined]
    values[choice.which] = values[choice.which] + first
    by = values[choice.least].detach()
    worse = by > least(by)  # NaN is not: a row of NaN stays one
    index = torch.where(worse, torch.iinfo(torch.int64).max, values[choice.which])
    wins = index == least(index)
    for name, value in values.items():
        values[name] = torch.where(wins.view(*wins.shape, *(1,) * (value.dim() - wins.dim())), value, 0)
    return type(results)(**values)


_NUMBERS = ("temperature", "seed", "row_offset")  # alike in all processes, so that they may be plain tensors


def _along(axes: Sequence[Axis], leader: str, placement: Placement) -> Axis | None:
    """The axis that the deciding input is divided along."""
    if not placement.is_shard():
        return None
    return next((axis for axis in axes if placement.is_shard(axis.inputs[leader])), None)


def _cut(axis: Axis, chosen: Sequence[Axis | None], tensors: Mapping[str, DTensor]) -> int | None:
    """The first dimension of the mesh, free so far, by which an input is divided along the axis."""
    named = [(tensors[name].placements, at) for name, at in axis.inputs.items() if name in tensors]
    free = (place for place, taken in enumerate(chosen) if taken is None)
    return next((place for place in free if any(laid[place].is_shard(at) for laid, at in named)), None)


def _fits(axis: Axis, tensors: Mapping[str, DTensor], parts: int) -> bool:
    """Whether its inputs come apart at the same places, though they may have fewer heads than the first of them."""
    named = [(tensors[name], at) for name, at in axis.inputs.items() if name in tensors]
    if any(at >= tensor.dim() for tensor, at in named):
        return False
    sizes = {tensor.shape[at] for tensor, at in named}
    return len(sizes) == 1 or all(size % parts == 0 for size in sizes)


def _share(chosen: Sequence[Axis | None], axis: Axis, leader: DTensor, mesh: DeviceMesh) -> tuple[int, int]:
    """Where this process's part of the axis begins, and its length: torch.chunk by each mesh dimension in turn."""
    first, count = 0, leader.shape[axis.inputs[next(iter(axis.inputs))]]
    for place, divided_by in enumerate(chosen):
        if divided_by is axis:
            size = -(-count // mesh.size(place))
            begin = min(size * mesh.get_local_rank(place), count)
            first, count = first + begin, min(size, count - begin)
    return first, count


def _stride(part: torch.Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor of `shape` whose dimensions follow one another in memory as the part's do."""
    stride, step = [0] * len(shape), 1
    for dimension in sorted(range(len(shape)), key=lambda at: (part.stride(at), -at)):
        stride[dimension], step = step, step * max(1, shape[dimension])
    return tuple(stride)
