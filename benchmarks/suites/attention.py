"""`sparse_attention`, forward and backward, against everything that can compute the same or a dense stand-in for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from benchmarks.competitors.adapter import Made, Problem
from benchmarks.competitors.attention import Attention, attention_competitors
from benchmarks.harness import Cell, Check, Contender, Trial, Work, copies_beyond_cache, dtype_name
from benchmarks.suites.choice import Choice, pattern_of
from dalle_kernels import Pattern, sparse_attention
from dalle_kernels.attention.op import OPERATION
from dalle_kernels.backends.choice import first
from dalle_kernels.backends.contract import Call
from dalle_kernels.patterns.schedule import schedule_for

FORWARD_FLOPS, BACKWARD_FLOPS = 4, 10  # per visible pair and element of a head: two products forward, five backward


def cells(choice: Choice) -> list[Cell]:
    """Forward and backward; without further wishes row, column and convolution over every grid, and short texts."""
    dtypes = choice.dtypes or ((torch.bfloat16,) if choice.gpu else (torch.float32, torch.bfloat16))
    names = choice.patterns or ("row", "column", "convolution")
    grids = choice.grids or ((32,) if choice.quick else (16, 32, 48, 64, 96, 128))
    sizes = [(text, grid) for grid in grids for text in choice.texts or (256,)]
    if not (choice.texts or choice.grids or choice.quick):
        sizes += [(text, 32) for text in (0, 64)]
    if choice.quick:
        # One of each kind: every competitor stands in at least one of them.
        dtypes = dtypes[:1]
    found = []
    for text, grid in sorted(sizes, key=lambda size: (size[1], -size[0])):
        for name in names:
            for dtype in dtypes:
                for backward in (False, True):
                    found.append(cell(choice.device, name, text, grid, dtype, backward))
    return found


def heads_for(device: torch.device, grid: int) -> tuple[int, int]:
    """(batch, heads): the paper's 62 heads on a GPU, what keeps the work within seconds on a CPU."""
    if device.type == "cuda":
        return (8 if grid <= 32 else 1), 62
    return 1, max(1, min(8, 8192 // grid**2))


def cell(
    device: torch.device,
    name: str,
    text: int,
    grid: int,
    dtype: torch.dtype,
    backward: bool,
    batch: int | None = None,
    heads: int | None = None,
    width: int = 64,
    competitors: Sequence[Attention] | None = None,
) -> Cell:
    """One attention cell; `competitors` None takes all."""
    usual_batch, usual_heads = heads_for(device, grid)
    batch, heads = batch or usual_batch, heads or usual_heads
    case = {
        "pattern": name,
        "grid": grid,
        "text": text,
        "batch": batch,
        "heads": heads,
        "width": width,
        "dtype": dtype_name(dtype),
        "pass": "backward" if backward else "forward",
    }
    problem = partial(Problem, batch=batch, heads=heads, width=width, dtype=dtype, device=device, backward=backward)

    def make() -> Problem:
        return problem(pattern_of(name, text, grid))

    def work() -> Work:
        pattern = make().pattern
        pairs, schedule = pattern.visible_pairs, schedule_for(pattern, (64, 64))
        flops = (BACKWARD_FLOPS if backward else FORWARD_FLOPS) * pairs * batch * heads * width
        tensors = 8 if backward else 4  # q, k, v, out; and their gradients
        size = tensors * batch * heads * pattern.length * width * dtype.itemsize
        return Work(flops, size, pairs, schedule.executed_pairs)

    series = f"{name} {text} {dtype_name(dtype)} {backward}"
    return Cell("attention", case, dtype, work, lambda: contenders(make(), competitors), series)


# --- Contenders -------------------------------------------------------------------------------------------------------


def contenders(problem: Problem, competitors: Sequence[Attention] | None = None) -> Iterable[Contender]:
    """Ours, each of our other backends that serves the call when named, and the competitors."""
    inputs = _Inputs(problem)
    yield Contender("dalle_kernels", lambda: _trial(problem, inputs, _ours(problem, "auto"), problem.pattern))
    call = Call(problem.device, problem.dtype, problem.width)
    candidates = OPERATION.candidates(call)
    for backend, _, refusal in candidates:
        if backend not in ("reference", first(candidates)) and refusal is None:
            name = f"dalle_kernels, {backend}"
            yield Contender(name, partial(_prepared, problem, inputs, partial(_ours, problem, backend)))
    for competitor in attention_competitors() if competitors is None else competitors:
        answers = competitor.answers(problem.pattern)
        yield Contender(
            competitor.name, partial(_prepared, problem, inputs, partial(competitor.make, problem), answers)
        )


def _prepared(problem: Problem, inputs: _Inputs, make: Callable[[], Made], answers: Pattern | None = None) -> Trial:
    return _trial(problem, inputs, make(), answers or problem.pattern)


def _ours(problem: Problem, backend: str) -> Made:
    pattern, device = problem.pattern, problem.device
    start = time.perf_counter()
    schedule_for(pattern, (64, 64), device=device)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, pattern, backend=backend)

    return Made(function, {"schedule_ms": (time.perf_counter() - start) * 1e3})


class _Inputs:
    """q, k, v and dO, shared by all contenders of a cell; rotating copies are made once."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    @cached_property
    def copies(self) -> list[tuple[Tensor, ...]]:
        problem = self._problem
        shape = (problem.batch, problem.heads, problem.pattern.length, problem.width)
        generator = torch.Generator(problem.device).manual_seed(0)

        def random() -> Tensor:
            return torch.randn(shape, generator=generator, device=problem.device).to(problem.dtype)

        size = 4 * problem.batch * problem.heads * problem.pattern.length * problem.width * problem.dtype.itemsize
        # Attention of this kind is bound by arithmetic on a CPU; on a GPU its forward is bound by memory.
        copies = copies_beyond_cache(size, problem.device) if problem.device.type == "cuda" else 1
        return [tuple(random() for _ in range(4)) for _ in range(copies)]


def _trial(problem: Problem, inputs: _Inputs, made: Made, answers: Pattern) -> Trial:
    def verify() -> Check:
        return check(problem, made.function, inputs.copies[0], answers)

    if not problem.backward:

        def forward(copy: tuple[Tensor, ...]) -> object:
            with torch.no_grad():
                return made.function(*copy[:3])

        return Trial([partial(forward, copy) for copy in inputs.copies], verify, made.notes)

    runs = []
    for *qkv, grad in inputs.copies:
        leaves = [tensor.detach().requires_grad_() for tensor in qkv]
        out = made.function(*leaves)
        runs.append(partial(torch.autograd.grad, out, leaves, grad, retain_graph=True))
    return Trial(runs, verify, made.notes)


# --- The truth --------------------------------------------------------------------------------------------------------


def check(problem: Problem, function: Callable[..., Tensor], copy: Sequence[Tensor], answers: Pattern) -> Check:
    """The largest error over the first and the last head, against float64; allowed is twice what plain PyTorch makes in
    the same precision, plus a few units of rounding of the largest element."""
    *qkv, grad = copy
    if problem.backward:
        leaves = [tensor.detach().requires_grad_() for tensor in qkv]
        got = torch.autograd.grad(function(*leaves), leaves, grad)
    else:
        with torch.no_grad():
            got = (function(*qkv),)
    worst = Check(0.0, 1.0)
    for b, h in {(0, 0), (problem.batch - 1, problem.heads - 1)}:
        head = [tensor[b, h] for tensor in copy]
        truth = dense_attention([tensor.double() for tensor in head], answers, problem.backward)
        plain = dense_attention(head, answers, problem.backward)
        for one, true, rounded in zip(got, truth, plain, strict=True):
            error = (one[b, h].double() - true).abs().max().item()
            slack = 4 * torch.finfo(problem.dtype).eps * true.abs().max().item()
            allowed = 2 * (rounded.double() - true).abs().max().item() + slack
            if not error <= worst.error / worst.allowed * allowed:
                worst = Check(error, allowed)
    return worst


def dense_attention(
    tensors: Sequence[Tensor], pattern: Pattern, backward: bool, chunk: int = 1024
) -> tuple[Tensor, ...]:
    """One head by the definition, in the dtype of its tensors [S, D], a chunk of queries at a time.

    Returns (out,), or (dq, dk, dv) with `backward`.
    """
    q, k, v, grad = tensors
    mask = pattern.mask().to(q.device)
    scale = q.shape[-1] ** -0.5
    out, dq = torch.empty_like(q), torch.empty_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, q.shape[0], chunk):
        rows = slice(start, min(start + chunk, q.shape[0]))
        keys = slice(0, int(mask[rows].any(0).nonzero().max()) + 1)  # none that a causal pattern hides is computed
        scores = (scale * q[rows] @ k[keys].mT).masked_fill(~mask[rows, keys], -torch.inf)
        p = scores.softmax(-1)
        out[rows] = p @ v[keys]
        if backward:
            dp = grad[rows] @ v[keys].mT
            ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
            dq[rows] = ds @ k[keys]
            dk[keys] += ds.mT @ q[rows]
            dv[keys] += p.mT @ grad[rows]
    return (dq, dk, dv) if backward else (out,)
