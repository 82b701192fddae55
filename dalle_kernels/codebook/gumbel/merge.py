"""Gumbel lookups of a codebook that is divided among processes: each takes its codes, and what they find is merged.

With s the noisy scores of a row, t the clean ones, and of each process's codes m_r = max s,
S_r = sum e((s - m_r) / tau), P_r = sum e(t - m_r), y_r their mixture and H_r the entropy of their softmax, those of all
codes are

    m = max m_r          S = sum e((m_r - m) / tau) S_r          y = sum e((m_r - m) / tau) S_r y_r / S
    P = sum p_r,  p_r = e(m_r - m) P_r                           H = sum p_r (H_r - log p_r) / P + log P

A backward pass that is given these instead of a process's own makes that process's part of every gradient.

Noise goes by a code's place in its quarter of the whole codebook, and a kernel draws for four quarters at once. So
where there is noise a process takes not the codes that it has but as many out of each quarter: rows of the codebook are
exchanged once, an nth of what gathering it would send.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from dalle_kernels.backends.contract import Call

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_QUARTERS = 4


def may_merge(
    operation: Any, call_of: Callable[[Any], Call], inputs: Any, backend: str, codes: int, count: int
) -> bool:
    """Whether `count` processes can each take as many codes, with noise of each quarter, by the backend that serves."""
    if not inputs.noise:
        return codes % count == 0
    chosen = operation.choose(backend, call_of(inputs))
    return codes % (_QUARTERS * count) == 0 and chosen.refuse(call_of(inputs._replace(counter_offset=1))) is None


def merged(entry: Any, inputs: Any, backend: str, codes: int, group: tuple[DeviceMesh, int]) -> Any:
    """The lookup's outputs of all `codes`, on every process of `group`; see `sharding.Merge`."""
    if inputs.noise:
        parts = {
            name: _of_each_quarter(getattr(inputs, name), at, codes, group)
            for name, at in (("logits", 1), ("weight", 0), ("bias", 0), ("codebook", 0))
            if getattr(inputs, name, None) is not None
        }
        mesh, at = group
        inputs = inputs._replace(**parts, counter_offset=mesh.get_local_rank(at) * _share(codes, group))
        if getattr(inputs, "tied", False):
            inputs = inputs._replace(codebook=inputs.weight.detach())
    differentiable = (getattr(inputs, name) for name in entry.needs)
    return entry.outputs._make(_Merged.apply(entry, inputs, backend, codes, group, *differentiable))


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, entry: Any, inputs: Any, backend: str, codes: int, group: tuple[DeviceMesh, int], *_: Any
    ) -> tuple[torch.Tensor, ...]:
        own = entry(inputs._replace(hard=False), backend)
        maximum = _reduced(own.maximum, "max", group)
        code = torch.where(
            own.maximum < maximum, torch.iinfo(torch.int64).max, _code(own.indices, inputs, codes, group)
        )
        indices = _reduced(code, "min", group)

        lower = own.maximum - maximum
        none = own.kl.isnan() & (own.maximum <= torch.finfo(torch.float32).min)  # -inf rules all of these codes out
        noisy = torch.where(none, 0, (lower / inputs.temperature + own.log_noisy).exp())
        clean = torch.where(none, 0, (lower + own.log_clean).exp())
        moment = torch.where(clean == 0, 0, clean * (math.log(len(inputs.codebook)) - own.kl - clean.log()))
        mixture = torch.where((noisy == 0)[:, None], 0, noisy[:, None] * own.latents)
        sums = _reduced(torch.cat([torch.stack([noisy, clean, moment], 1), mixture], 1), "sum", group)
        noisy, clean, moment = sums[:, :3].unbind(1)
        mixture = sums[:, 3:] / noisy[:, None]
        log_noisy, log_clean = noisy.log(), clean.log()
        kl = math.log(codes) - moment / clean - log_clean

        latents = mixture.to(own.latents.dtype)
        mine = code == indices
        if inputs.hard:
            latents = _reduced(torch.where(mine[:, None], inputs.codebook[own.indices], 0), "sum", group)
        made = own._replace(
            latents=latents, indices=indices, kl=kl, maximum=maximum, log_noisy=log_noisy, log_clean=log_clean
        )
        ctx.entry, ctx.backend = entry, backend
        within = torch.where(mine, own.indices, -1)
        of_part = made._replace(
            indices=within, kl=kl - math.log(codes / len(inputs.codebook)), mixture=mixture.contiguous()
        )
        entry.keep(ctx, inputs._asdict() | of_part._asdict())
        ctx.mark_non_differentiable(*(value for name, value in made._asdict().items() if name not in ("latents", "kl")))
        ctx.set_materialize_grads(False)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        return *(None,) * 5, *ctx.entry.gradients(ctx, grads, ctx.backend)


def _reduced(values: torch.Tensor, by: str, group: tuple[DeviceMesh, int]) -> torch.Tensor:
    # Not imported where nobody divides: it takes half a second.
    from torch.distributed._functional_collectives import all_reduce, wait_tensor

    return wait_tensor(all_reduce(values, by, group))


def _share(codes: int, group: tuple[DeviceMesh, int]) -> int:
    """How many codes of each quarter a process takes."""
    mesh, at = group
    return codes // (_QUARTERS * mesh.size(at))


def _code(within: torch.Tensor, inputs: Any, codes: int, group: tuple[DeviceMesh, int]) -> torch.Tensor:
    """Which of all codes those of a process's part are."""
    mesh, at = group
    if not inputs.noise:
        return within + mesh.get_local_rank(at) * len(inputs.codebook)
    share = _share(codes, group)
    return within // share * (codes // _QUARTERS) + inputs.counter_offset + within % share


def _of_each_quarter(part: torch.Tensor, dim: int, codes: int, group: tuple[DeviceMesh, int]) -> torch.Tensor:
    """This process's share of each quarter of the codes, along `dim`, of `part`, which has all or its nth of them."""
    mesh, at = group
    count, rank = mesh.size(at), mesh.get_local_rank(at)
    quarter, share = codes // _QUARTERS, _share(codes, group)
    if part.shape[dim] == codes:
        return part.unflatten(dim, (_QUARTERS, quarter)).narrow(dim + 1, rank * share, share).flatten(dim, dim + 1)
    from torch.distributed._functional_collectives import all_to_all_single_autograd

    takers = [_runs(rank, taker, codes, count) for taker in range(count)]
    rows = part.movedim(dim, 0)
    sent = torch.cat([rows.narrow(0, *run) for run in itertools.chain(*takers)])
    sends = [sum(number for _, number in run) for run in takers]
    gets = [sum(number for _, number in _runs(holder, rank, codes, count)) for holder in range(count)]
    return all_to_all_single_autograd(sent, gets, sends, group).movedim(0, dim).contiguous()


def _runs(holder: int, taker: int, codes: int, count: int) -> list[tuple[int, int]]:
    """Where, among the codes that one of `count` processes holds, those lie that another takes: first and number."""
    quarter, share, size = codes // _QUARTERS, codes // (_QUARTERS * count), codes // count
    found = []
    for place in range(_QUARTERS):
        begin = place * quarter + taker * share - holder * size
        low, high = max(begin, 0), min(begin + share, size)
        if low < high:
            found.append((low, high - low))
    return found
