"""`gumbel_lookup`, `vq_lookup` and `logit_laplace_nll` against eager and compiled PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.competitors.adapter import Lookup, Made
from benchmarks.competitors.codebook import (
    gumbel_competitors,
    laplace_competitors,
    vq_best_competitors,
    vq_competitors,
)
from benchmarks.harness import Cell, Check, Contender, Trial, Work, copies_beyond_cache, dtype_name
from benchmarks.suites.choice import Choice
from dalle_kernels import gumbel_lookup, logit_laplace_nll, vq_lookup
from dalle_kernels.noise import GUMBEL_STREAM, VQ_STREAM, gumbel_noise

SEED, TEMPERATURE = 1234567, 0.9
CODES, WIDTH = 8192, 128


def cells(choice: Choice) -> list[Cell]:
    """Rows as a 32 x 32 grid of codes gives them, 8192 codes of width 128; forward, and forward with backward."""
    dtypes = choice.dtypes or ((torch.bfloat16, torch.float32) if choice.gpu else (torch.float32, torch.bfloat16))
    if choice.quick:
        dtypes = dtypes[:1]
    pictures = 32 if choice.gpu else 1
    sizes = [pictures * grid**2 for grid in choice.grids or (32,)]
    found = []
    for rows in sizes:
        for dtype in dtypes:
            for hard in (False, True):
                for backward in (False, True):
                    if not (choice.quick and hard):
                        found.append(gumbel_cell(choice.device, rows, dtype, hard, backward))
            for backward in (False, True):
                found.append(vq_cell(choice.device, rows, dtype, backward))
            if not choice.quick:
                found.append(vq_best_cell(choice.device, rows, dtype, k=8))
                found.append(vq_best_cell(choice.device, rows, dtype, temperature=TEMPERATURE))
            found.append(laplace_cell(choice.device, pictures * 3 * 256**2, dtype))
    return found


# --- gumbel_lookup ----------------------------------------------------------------------------------------------------


def gumbel_cell(
    device: torch.device,
    rows: int,
    dtype: torch.dtype,
    hard: bool,
    backward: bool,
    codes: int = CODES,
    width: int = WIDTH,
    competitors: Sequence[Lookup] | None = None,
) -> Cell:
    """A Gumbel-softmax lookup with its KL; `backward`: the forward pass and the gradients of both."""
    case = {
        "operation": "gumbel_lookup",
        "rows": rows,
        "codes": codes,
        "width": width,
        "dtype": dtype_name(dtype),
        "mode": "hard" if hard else "soft",
        "pass": "forward + backward" if backward else "forward",
    }

    def work() -> Work:
        # Forward: the mixture. Backward: dL codebook^T and y^T dL, the latter only where soft.
        products = (0 if hard and not backward else 1) + (2 - hard if backward else 0)
        table = rows * codes * dtype.itemsize
        return Work(
            2.0 * products * rows * codes * width,
            table * (3 if backward else 1),
            ceiling="copy" if device.type == "cuda" else "gemm",
        )

    return Cell(
        "codebook", case, dtype, work, lambda: _gumbel(device, rows, dtype, hard, backward, codes, width, competitors)
    )


class _Problem:
    """Logits, codebook, the gradients of latents and KL, and the noise that our seed gives."""

    def __init__(self, device: torch.device, rows: int, dtype: torch.dtype, codes: int, width: int) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        copies = min(8, copies_beyond_cache(rows * codes * dtype.itemsize, device))
        self.logits = [(2 * random(rows, codes)).to(dtype) for _ in range(copies)]
        self.codebook = random(codes, width).to(dtype)
        self.grads = (random(rows, width).to(dtype), random(rows))
        self.seed = torch.tensor(SEED, device=device)
        self.noise = gumbel_noise(self.seed, rows, codes, GUMBEL_STREAM)


def _gumbel(
    device: torch.device,
    rows: int,
    dtype: torch.dtype,
    hard: bool,
    backward: bool,
    codes: int,
    width: int,
    competitors: Sequence[Lookup] | None,
) -> Iterable[Contender]:
    table = lru_cache(maxsize=1)(partial(_Problem, device, rows, dtype, codes, width))  # made when first wanted

    def ours(
        logits: Tensor, codebook: Tensor, temperature: float, hard: bool, noise: Tensor | None
    ) -> tuple[Tensor, ...]:
        return gumbel_lookup(logits, codebook, temperature, hard, seed=table().seed)

    yield Contender("dalle_kernels", lambda: _gumbel_trial(table(), Made(ours), hard, backward))
    for competitor in gumbel_competitors() if competitors is None else competitors:
        yield Contender(
            competitor.name, lambda competitor=competitor: _gumbel_trial(table(), competitor.make(), hard, backward)
        )


def _gumbel_trial(table: _Problem, made: Made, hard: bool, backward: bool) -> Trial:
    def answer(logits: Tensor, codebook: Tensor, noise: Tensor | None) -> tuple[Tensor, ...]:
        if not backward:
            with torch.no_grad():
                return made.function(logits, codebook, TEMPERATURE, hard, noise)
        leaves = [logits.detach().requires_grad_(), codebook.detach().requires_grad_()]
        latents, _, kl = made.function(*leaves, TEMPERATURE, hard, noise)
        return torch.autograd.grad([latents, kl], leaves, [table.grads[0], table.grads[1].to(kl.dtype)])

    def verify() -> Check:
        return _close(answer(table.logits[0], table.codebook, table.noise), *_gumbel_truth(table, hard, backward))

    return Trial([partial(answer, logits, table.codebook, None) for logits in table.logits], verify, made.notes)


def _gumbel_truth(table: _Problem, hard: bool, backward: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the lookup gives with our noise, in float64, and in the input's own precision by plain PyTorch."""

    def by_definition(dtype: torch.dtype) -> tuple[Tensor, ...]:
        logits, codebook = (x.to(dtype).requires_grad_() for x in (table.logits[0], table.codebook))
        y = ((logits + table.noise.to(dtype)) / TEMPERATURE).softmax(-1)
        indices = (table.logits[0].double() + table.noise.double()).argmax(-1)
        if hard:
            y = torch.zeros_like(y).scatter_(-1, indices[:, None], 1.0) - y.detach() + y
        latents, log_p = y @ codebook, logits.log_softmax(-1)
        kl = (log_p.exp() * log_p).sum(-1) + torch.log(torch.tensor(float(logits.shape[1])))
        if not backward:
            return latents.detach(), indices, kl.detach()
        grads = [grad.to(dtype) for grad in table.grads]
        return torch.autograd.grad([latents, kl], [logits, codebook], grads)

    return by_definition(torch.float64), by_definition(table.codebook.dtype)


def _close(got: Sequence[Tensor], truth: Sequence[Tensor], plain: Sequence[Tensor]) -> Check:
    """The worst of several tensors, as in attention: twice plain PyTorch's error and a few units of rounding.

    An index may differ where two scores lie within rounding, so up to one in a thousand may.
    """
    worst = Check(0.0, 1.0)
    for one, true, rounded in zip(got, truth, plain, strict=True):
        if true.dtype == torch.int64:
            found = Check((one != true).double().mean().item(), 1e-3)
        else:
            precision = torch.finfo(one.dtype if one.dtype != torch.float64 else torch.float32).eps
            slack = 16 * precision * true.abs().max().item()
            error = (one.double() - true).abs().max().item()
            found = Check(error, 2 * (rounded.double() - true).abs().max().item() + slack)
        if not found.error / found.allowed <= worst.error / worst.allowed:
            worst = found
    return worst


# --- vq_lookup --------------------------------------------------------------------------------------------------------


def _vq_problem(rows: int, codes: int, width: int, dtype: torch.dtype) -> tuple[dict[str, Any], Work]:
    """What a cell says of it, and the work of its product."""
    case = {"operation": "vq_lookup", "rows": rows, "codes": codes, "width": width, "dtype": dtype_name(dtype)}
    return case, Work(2.0 * rows * codes * width, (rows + codes) * width * dtype.itemsize)


def vq_cell(
    device: torch.device,
    rows: int,
    dtype: torch.dtype,
    backward: bool,
    codes: int = CODES,
    width: int = WIDTH,
    competitors: Sequence[Lookup] | None = None,
) -> Cell:
    """The nearest of the codes; `backward`: with the gradients of latents and squared distance."""
    case, work = _vq_problem(rows, codes, width, dtype)
    case["pass"] = "forward + backward" if backward else "forward"

    def contenders() -> Iterable[Contender]:
        @lru_cache(maxsize=1)
        def inputs() -> tuple[Tensor, ...]:  # features, codebook, the gradients of latents and distance
            generator = torch.Generator(device).manual_seed(0)
            shapes = ((rows, width), (codes, width), (rows, width))
            tensors = [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]
            return *tensors, torch.randn(rows, generator=generator, device=device)

        def trial(made: Made) -> Trial:
            return _vq_trial(*inputs(), backward, made)

        yield Contender("dalle_kernels", lambda: trial(Made(vq_lookup)))
        for competitor in vq_competitors() if competitors is None else competitors:
            yield Contender(competitor.name, lambda competitor=competitor: trial(competitor.make()))

    return Cell("codebook", case, dtype, lambda: work, contenders)


def _vq_trial(features: Tensor, codebook: Tensor, grad: Tensor, weight: Tensor, backward: bool, made: Made) -> Trial:
    def run() -> tuple[Tensor, ...]:
        if not backward:
            with torch.no_grad():
                return made.function(features, codebook)
        leaves = [features.detach().requires_grad_(), codebook.detach().requires_grad_()]
        latents, _, squared_distance = made.function(*leaves)
        return torch.autograd.grad([latents, squared_distance], leaves, [grad.to(latents.dtype), weight])

    def verify() -> Check:
        """Which row is nearest may differ within rounding: distances must agree, and gradients given the rows."""
        _, indices, squared_distance = made.function(features, codebook)
        wide, table = features.double(), codebook.double()
        nearest = torch.cdist(wide, table).square().amin(-1)
        chosen = (wide - table[indices]).square().sum(-1)
        scale = nearest.max().item()
        precision = torch.finfo(features.dtype).eps
        error = max((chosen - nearest).max().item(), (squared_distance.double() - chosen).abs().max().item())
        check = Check(error / scale, 8 * precision)
        if backward and check.passed:
            step = 2 * weight.double()[:, None] * (wide - table[indices])
            truth = (grad.double() + step, torch.zeros_like(table).index_add_(0, indices, -step))
            for one, true in zip(run(), truth, strict=True):
                error = (one.double() - true).abs().max().item() / true.abs().max().item()
                if not error <= check.error:
                    check = Check(error, 16 * precision)
        return check

    return Trial([run], verify, made.notes)


def vq_best_cell(
    device: torch.device,
    rows: int,
    dtype: torch.dtype,
    k: int = 1,
    temperature: float | None = None,
    codes: int = CODES,
    width: int = WIDTH,
    competitors: Sequence[Lookup] | None = None,
) -> Cell:
    """The k nearest of the codes, or k that are drawn."""
    case, work = _vq_problem(rows, codes, width, dtype)
    case |= {"mode": f"{'nearest' if temperature is None else 'drawn'} {k}", "pass": "forward"}

    def ours(features: Tensor, codebook: Tensor, k: int, temperature: float | None, noise: Tensor | None) -> Tensor:
        return vq_lookup(features, codebook, k=k, temperature=temperature, seed=SEED)[1]

    def trial(made: Made) -> Trial:
        generator = torch.Generator(device).manual_seed(0)
        features, codebook = (
            torch.randn(size, width, generator=generator, device=device).to(dtype) for size in (rows, codes)
        )

        def verify() -> Check:
            """Codes may differ within rounding: their scores must agree."""
            scores, noise = -torch.cdist(features.double(), codebook.double()).square(), None
            if temperature is not None:
                noise = gumbel_noise(torch.tensor(SEED, device=device), rows, codes, VQ_STREAM)
                scores += temperature * noise
            found = scores.gather(-1, made.function(features, codebook, k, temperature, noise))
            error = (found - scores.topk(k).values).abs().max() / scores.abs().max()
            return Check(error.item(), 8 * torch.finfo(dtype).eps)

        return Trial([partial(made.function, features, codebook, k, temperature, None)], verify, made.notes)

    def contenders() -> Iterable[Contender]:
        yield Contender("dalle_kernels", lambda: trial(Made(ours)))
        for competitor in vq_best_competitors() if competitors is None else competitors:
            yield Contender(competitor.name, lambda competitor=competitor: trial(competitor.make()))

    return Cell("codebook", case, dtype, lambda: work, contenders)


# --- logit_laplace_nll ------------------------------------------------------------------------------------------------


def laplace_cell(
    device: torch.device, elements: int, dtype: torch.dtype, competitors: Sequence[Lookup] | None = None
) -> Cell:
    """The likelihood of every channel of pictures, forward."""
    case = {"operation": "logit_laplace_nll", "elements": elements, "dtype": dtype_name(dtype), "pass": "forward"}
    work = Work(bytes=elements * (3 * dtype.itemsize + 4), ceiling="copy")

    def contenders() -> Iterable[Contender]:
        @lru_cache(maxsize=1)
        def inputs() -> list[list[Tensor]]:  # rotating (pixels, mu, log_b)
            generator = torch.Generator(device).manual_seed(0)
            found = []
            for _ in range(copies_beyond_cache(work.bytes, device)):
                pixels = torch.rand(elements, generator=generator, device=device) * 0.8 + 0.1
                mu, log_b = (torch.randn(elements, generator=generator, device=device) for _ in range(2))
                found.append([x.to(dtype) for x in (pixels, mu, log_b)])
            return found

        yield Contender("dalle_kernels", lambda: _laplace_trial(inputs(), Made(logit_laplace_nll)))
        for competitor in laplace_competitors() if competitors is None else competitors:
            yield Contender(competitor.name, lambda competitor=competitor: _laplace_trial(inputs(), competitor.make()))

    return Cell("codebook", case, dtype, lambda: work, contenders)


def _laplace_trial(inputs: Sequence[Sequence[Tensor]], made: Made) -> Trial:
    def run(tensors: Sequence[Tensor]) -> Any:
        with torch.no_grad():
            return made.function(*tensors)

    def verify() -> Check:
        x, mu, log_b = (tensor.double() for tensor in inputs[0])
        true = torch.log(2 * x * (1 - x)) + log_b + (x.logit() - mu).abs() * torch.exp(-log_b)
        got = run(inputs[0])
        scale = true.abs().max().item()
        return Check((got.double() - true).abs().max().item() / scale, 4 * torch.finfo(inputs[0][0].dtype).eps)

    runs: list[Callable[[], object]] = [partial(run, tensors) for tensors in inputs]
    return Trial(runs, verify, made.notes)
