"""Neighbourhood attention, forward and forward + backward, beside what people use for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch

from benchmarks.competitors.adapter import Made, Problem
from benchmarks.competitors.attention import Attention
from benchmarks.competitors.neighborhood import neighborhood_competitors
from benchmarks.harness import Cell, Check, Contender, Trial, Work, dtype_name
from benchmarks.suites.attention import BACKWARD_FLOPS, FORWARD_FLOPS, check
from benchmarks.suites.choice import Choice
from dalle_kernels import Neighborhood, Pattern, sparse_attention
from dalle_kernels.patterns.schedule import schedule_for

PROBLEMS: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((56, 56), (7, 7)),
    ((64, 64), (13, 13)),
    ((128, 128), (13, 13)),
    ((16, 32, 32), (3, 5, 5)),
)
HEADS = ((4, 32), (8, 64))


def cells(choice: Choice) -> list[Cell]:
    """Every problem, number and width of heads and dtype."""
    dtypes = choice.dtypes or ((torch.bfloat16,) if choice.gpu else (torch.float32, torch.bfloat16))
    problems, heads = (PROBLEMS[:1], HEADS[:1]) if choice.quick else (PROBLEMS, HEADS)
    return [
        cell(choice.device, shape, window, number, width, dtype, backward)
        for shape, window in problems
        for number, width in heads
        for dtype in (dtypes[:1] if choice.quick else dtypes)
        for backward in (False, True)
    ]


def cell(
    device: torch.device,
    shape: tuple[int, ...],
    window: tuple[int, ...],
    heads: int,
    width: int,
    dtype: torch.dtype,
    backward: bool,
    competitors: Sequence[Attention] | None = None,
) -> Cell:
    """One problem at batch 1; `competitors` None takes all."""
    case = {
        "shape": " x ".join(map(str, shape)),
        "window": " x ".join(map(str, window)),
        "heads": heads,
        "width": width,
        "dtype": dtype_name(dtype),
        "pass": "forward + backward" if backward else "forward",
    }

    def make() -> Problem:
        return Problem(Neighborhood(shape, window), 1, heads, width, dtype, device, backward)

    def work() -> Work:
        pattern = make().pattern
        pairs = pattern.visible_pairs
        flops = (FORWARD_FLOPS + (BACKWARD_FLOPS if backward else 0)) * pairs * heads * width
        size = (8 if backward else 4) * heads * pattern.length * width * dtype.itemsize
        return Work(flops, size, pairs, schedule_for(pattern, (64, 64)).executed_pairs)

    series = f"{len(shape)} axes {dtype_name(dtype)} {backward}"
    return Cell("neighborhood", case, dtype, work, lambda: contenders(make(), competitors), series)


def contenders(problem: Problem, competitors: Sequence[Attention] | None = None) -> Iterable[Contender]:
    shape = (1, problem.heads, problem.pattern.length, problem.width)
    generator = torch.Generator(problem.device).manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, device=problem.device).to(problem.dtype) for _ in range(4)]

    def prepared(competitor: Attention) -> Trial:
        return _trial(problem, inputs, competitor.make(problem), competitor.answers(problem.pattern))

    for competitor in [_OURS, *(neighborhood_competitors() if competitors is None else competitors)]:
        yield Contender(competitor.name, partial(prepared, competitor))


_OURS = Attention("dalle_kernels", lambda problem: Made(lambda q, k, v: sparse_attention(q, k, v, problem.pattern)))


def _trial(problem: Problem, inputs: Sequence[torch.Tensor], made: Made, answers: Pattern) -> Trial:
    *qkv, grad = inputs

    def forward() -> object:
        with torch.no_grad():
            return made.function(*qkv)

    def both() -> object:
        leaves = [tensor.detach().requires_grad_() for tensor in qkv]
        return torch.autograd.grad(made.function(*leaves), leaves, grad)

    def verify() -> Check:
        return check(problem, made.function, inputs, answers)

    return Trial([both if problem.backward else forward], verify, made.notes)
