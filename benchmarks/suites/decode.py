"""`decode_attention` at the last position, against SDPA over a full cache and a copy of the bytes it must read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from benchmarks.competitors.adapter import Made, Problem
from benchmarks.competitors.decode import Decode, decode_competitors
from benchmarks.harness import Cell, Check, Contender, Trial, Work, copies_beyond_cache, dtype_name
from benchmarks.suites.choice import Choice, pattern_of
from dalle_kernels import Causal, KVCache, decode_attention
from dalle_kernels.decode.eight_bit import quantize, widen

YARDSTICK = "copying the visible keys and values"


def cells(choice: Choice) -> list[Cell]:
    """Every pattern at batch 8, without further wishes also batch 1; and the candidates of one prompt."""
    dtypes = choice.dtypes or ((torch.bfloat16,) if choice.gpu else (torch.float32, torch.bfloat16))
    names = choice.patterns or (("row",) if choice.quick else ("row", "column", "convolution"))
    batches = (8,) if choice.quick else (8, 1, 64) if choice.gpu else (8, 1)
    grids, texts = choice.grids or ((32,) if choice.quick else (32, 64)), choice.texts or (256,)
    return [
        cell(choice.device, name, text, grid, dtype, batch)
        for grid in grids
        for text in texts
        for name in names
        for dtype in dtypes
        for batch in batches
    ] + [
        candidates_cell(choice.device, name, text, grids[0], dtype, candidates)
        for text in texts
        for name in names
        for dtype in dtypes
        for candidates in ((64,) if choice.quick else (16, 64, 512))
    ]


def candidates_cell(
    device: torch.device, name: str, text: int, grid: int, dtype: torch.dtype, candidates: int, heads: int = 8
) -> Cell:
    """A step of many candidates of one caption, in the middle of the picture: its keys kept once, and for each,
    and once in eight bits."""
    width = 64
    case = {
        "pattern": name,
        "grid": grid,
        "text": text,
        "candidates": candidates,
        "heads": heads,
        "width": width,
        "dtype": dtype_name(dtype),
    }

    def prepare(shares: bool, cache_dtype: torch.dtype = dtype) -> Trial:
        problem = Problem(pattern_of(name, text, grid), candidates, heads, width, dtype, device)
        return _candidates(problem, text, text + grid * grid // 2, shares, cache_dtype)

    def contenders() -> Iterable[Contender]:
        yield Contender("dalle_kernels, the prompt once", partial(prepare, True))
        yield Contender("dalle_kernels, a cache for each", partial(prepare, False))
        yield Contender("dalle_kernels, the prompt once, eight bits", partial(prepare, True, torch.int8))

    return Cell("decode", case, dtype, Work, contenders, f"{name} {text} {candidates} candidates {dtype_name(dtype)}")


def _candidates(problem: Problem, text: int, position: int, shares: bool, cache_dtype: torch.dtype) -> Trial:
    generator = torch.Generator(problem.device).manual_seed(0)

    def normal(batch: int, tokens: int) -> list[Tensor]:
        shape = (batch, problem.heads, tokens, problem.width)
        return [torch.randn(shape, generator=generator, device=problem.device).to(problem.dtype) for _ in range(2)]

    prompt, cells, (q, _) = normal(1, text), normal(problem.batch, position + 1 - text), normal(problem.batch, 1)
    copies = problem.batch if shares else 1
    cache = KVCache(
        problem.pattern,
        problem.batch // copies,
        problem.heads,
        problem.width,
        dtype=cache_dtype,
        device=problem.device,
        copies=copies,
    )
    cache.prefill(*(tensor.expand(problem.batch // copies, -1, -1, -1) for tensor in prompt))
    k, v = (tensor[:, :, -1:] for tensor in cells)
    with torch.no_grad():
        before = [tensor[:, :, :-1] for tensor in cells]
        decode_attention(before[0], *before, cache, text)
    run = partial(_again, q, k, v, cache, torch.full((), position, device=problem.device))

    def verify() -> Check:
        visible = problem.pattern.mask()[position, : position + 1].nonzero()[:, 0].to(problem.device)
        keys, values = (
            torch.cat([one.expand(problem.batch, -1, -1, -1), own], 2)[:, :, visible]
            for one, own in zip(prompt, cells, strict=True)
        )
        if cache.scales is not None:
            keys, values = (widen(*quantize(tensor), torch.float32) for tensor in (keys, values))
        true, rounded = (
            (wide(q) @ wide(keys).mT * problem.width**-0.5).softmax(-1) @ wide(values)
            for wide in (Tensor.double, lambda tensor: tensor.to(problem.dtype))
        )
        slack = 4 * torch.finfo(problem.dtype).eps * true.abs().max().item()
        with torch.no_grad():
            error = (run().double() - true).abs().max().item()
        return Check(error, 2 * (rounded.double() - true).abs().max().item() + slack)

    return Trial([run], verify, {"note": f"{cache.nbytes / 2**20:.1f} MiB of cache"})


def cell(
    device: torch.device,
    name: str,
    text: int,
    grid: int,
    dtype: torch.dtype,
    batch: int,
    heads: int = 8,
    width: int = 64,
    competitors: Sequence[Decode] | None = None,
) -> Cell:
    """One decoding step at the last position of the sequence."""
    case = {
        "pattern": name,
        "grid": grid,
        "text": text,
        "batch": batch,
        "heads": heads,
        "width": width,
        "dtype": dtype_name(dtype),
    }

    def make() -> Problem:
        return Problem(pattern_of(name, text, grid), batch, heads, width, dtype, device)

    def work() -> Work:
        visible = int(make().pattern.mask()[-1].sum())
        elements = batch * heads * visible * width
        return Work(4 * elements, 2 * elements * dtype.itemsize, visible, None, "copy")

    return Cell(
        "decode",
        case,
        dtype,
        work,
        lambda: contenders(make(), competitors),
        f"{name} {text} {batch} {dtype_name(dtype)}",
    )


class _State:
    """The whole sequence's keys and values before the last position, and rotating sets of the last token's q, k, v."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.length, self.position = problem.pattern.length, problem.pattern.length - 1
        generator = torch.Generator(problem.device).manual_seed(0)
        shape = (problem.batch, problem.heads, self.length, problem.width)
        self.keys, self.values = (
            torch.randn(shape, generator=generator, device=problem.device).to(problem.dtype) for _ in range(2)
        )
        self.visible = problem.pattern.mask()[self.position].nonzero()[:, 0].to(problem.device)
        per_key = 2 * problem.batch * problem.heads * problem.width * problem.dtype.itemsize
        self.copies = copies_beyond_cache(len(self.visible) * per_key, problem.device)
        new = (problem.batch, problem.heads, 1, problem.width)
        self.token = [torch.randn(new, generator=generator, device=problem.device).to(problem.dtype) for _ in range(3)]

    def truth(self, dense: bool) -> tuple[Tensor, Tensor]:
        """The answer in float64, and in plain PyTorch in the dtype of the tensors."""
        pattern = self.problem.pattern
        visible = torch.arange(self.length, device=self.visible.device) if dense else self.visible
        assert bool(pattern.mask()[self.position, self.position])
        q, k, v = self.token
        keys, values = self.keys.clone(), self.values.clone()
        keys[:, :, self.position :], values[:, :, self.position :] = k, v
        answers = []
        for wide in (Tensor.double, lambda tensor: tensor):
            scores = wide(q) @ wide(keys[:, :, visible]).mT * q.shape[-1] ** -0.5
            answers.append(scores.softmax(-1) @ wide(values[:, :, visible]))
        return answers[0], answers[1]


def contenders(problem: Problem, competitors: Sequence[Decode] | None = None) -> Iterable[Contender]:
    """Ours, the competitors, and the yardstick."""
    state = lru_cache(maxsize=1)(partial(_State, problem))  # made when first wanted
    yield Contender("dalle_kernels", lambda: _ours(state()))
    for competitor in decode_competitors() if competitors is None else competitors:
        yield Contender(competitor.name, lambda competitor=competitor: _theirs(state(), competitor))
    yield Contender(YARDSTICK, lambda: _copy(state()))


def _trial(state: _State, runs: list[Callable[[], object]], made: Made, dense: bool) -> Trial:
    def verify() -> Check:
        true, rounded = state.truth(dense)
        with torch.no_grad():
            error = (runs[0]().double() - true).abs().max().item()  # type: ignore[attr-defined]
        slack = 4 * torch.finfo(state.problem.dtype).eps * true.abs().max().item()
        return Check(error, 2 * (rounded.double() - true).abs().max().item() + slack)

    return Trial(runs, verify, made.notes)


def _ours(state: _State) -> Trial:
    problem, q, k, v = state.problem, *state.token
    position = torch.full((), state.position, device=problem.device)
    runs = []
    for _ in range(state.copies):
        cache = KVCache(
            problem.pattern, problem.batch, problem.heads, problem.width, dtype=problem.dtype, device=problem.device
        )
        cache.prefill(state.keys[:, :, : state.position], state.values[:, :, : state.position])
        runs.append(partial(_again, q, k, v, cache, position))
    note = {"note": f"a cache of {cache.keys.shape[2]} slots"}
    return _trial(state, runs, Made(decode_attention, note), isinstance(problem.pattern, Causal))


def _again(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, position: Tensor) -> Tensor:
    """The last step, which a cache takes once more if it is told to go back."""
    out = decode_attention(q, k, v, cache, position)
    if cache.lengths is not None:
        cache.lengths -= 1
    return out


def _theirs(state: _State, competitor: Decode) -> Trial:
    made = competitor.make(state.problem, state.position)
    q, k, v = state.token
    # Full caches are longer than what is read of them, but a few of them exceed the cache memory all the same.
    runs = [
        partial(made.function, q, k, v, state.keys.clone(), state.values.clone()) for _ in range(min(state.copies, 16))
    ]
    return _trial(state, runs, made, competitor.dense)


def _copy(state: _State) -> Trial:
    """The bytes that any implementation must read, copied: read once and written once."""
    sources = [torch.stack([x[:, :, state.visible] for x in (state.keys, state.values)]) for _ in range(state.copies)]
    targets = [torch.empty_like(source) for source in sources]
    runs = [partial(target.copy_, source) for source, target in zip(sources, targets, strict=True)]

    def verify() -> Check:
        runs[0]()
        return Check(float(not torch.equal(sources[0], targets[0])), 0.0)

    return Trial(runs, verify)
