"""Whether this installation is well: `python -m dalle_kernels.doctor`.

Says what is installed and what was built, which backend serves which operation here and why not the others, how far
each kernel's answer on this very machine lies from the reference in float64, and how its speed compares. The table is
made to be pasted into an issue. The exit status is 1 where an answer is wrong or a kernel that should serve fails.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F

import dalle_kernels
from dalle_kernels import (
    Convolution,
    KVCache,
    Row,
    TokenLayout,
    decode_attention,
    explain,
    gumbel_lookup,
    gumbel_projection_lookup,
    logit_laplace_nll,
    sample_tokens,
    sparse_attention,
    vq_lookup,
)
from dalle_kernels.backends import native
from dalle_kernels.backends.choice import BACKENDS

Tensors: TypeAlias = tuple[torch.Tensor, ...]

# How far the worst element may lie from float64's, as a share of the largest: a few roundings of sums this short.
ALLOWED = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Probe:
    """One operation on one small problem.

    Attributes:
        name: what the table calls it.
        function: the public operation, for `explain`.
        inputs: makes the floating-point tensors, in float64, from a seeded generator.
        run: computes everything that the operation gives, gradients included, by a backend.
        exact: indices and tokens, which must be the reference's to the last one: float32 only, so that no rounding of
            the inputs can tip a draw.
        arguments: `inputs` as the arguments of `function`.
    """

    name: str
    function: Callable[..., object]
    inputs: Callable[[], Tensors]
    run: Callable[[Tensors, str], Tensors]
    arguments: Callable[[Tensors], tuple[object, ...]]
    exact: bool = False


class Finding(NamedTuple):
    """What one backend made of one probe."""

    probe: str
    device: str
    dtype: str
    backend: str
    chosen: bool  # "auto" takes it
    status: str  # "right", "wrong", "failed" or "refused"
    detail: str  # the error and what was allowed, or the reason
    speed: float | None = None  # times as fast as the reference backend

    @property
    def bad(self) -> bool:
        return self.status in ("wrong", "failed")


# --- Probes -----------------------------------------------------------------------------------------------------------

_ROW = Row(TokenLayout(text_length=20, grid=(6, 10)))
_CONVOLUTION = Convolution(TokenLayout(text_length=5, grid=(9, 9)), kernel_size=5)


def _normal(*shapes: tuple[int, ...]) -> Callable[[], Tensors]:
    def make() -> Tensors:
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)

    return make


def _with_gradients(inputs: Tensors, outputs: Callable[[Tensors], Tensors]) -> Tensors:
    """What `outputs` gives, and the gradient of a fixed mixture of it with respect to each input."""
    leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    results = outputs(leaves)
    differentiable = [result for result in results if result.requires_grad]
    weights = [torch.linspace(-1, 1, result.numel()).view(result.shape).to(result) for result in differentiable]
    gradients = torch.autograd.grad(differentiable, leaves, weights)
    return *(result.detach() for result in results), *gradients


def _attention(pattern: dalle_kernels.Pattern) -> Callable[[Tensors, str], Tensors]:
    def run(inputs: Tensors, backend: str) -> Tensors:
        padding = torch.zeros(inputs[0].shape[0], inputs[0].shape[2], dtype=torch.bool, device=inputs[0].device)
        padding[0, :3] = True

        def outputs(leaves: Tensors) -> Tensors:
            q, k, v = leaves
            return sparse_attention(q, k, v, pattern, key_padding_mask=padding, return_lse=True, backend=backend)

        return _with_gradients(inputs, outputs)

    return run


def _decoding(inputs: Tensors, backend: str) -> Tensors:
    q, k, v = inputs
    batch, heads, length, width = q.shape
    cache = KVCache(_ROW, batch, heads, width, dtype=q.dtype, device=q.device)
    steps = []
    with torch.no_grad():
        for position in range(length):
            here = slice(position, position + 1)
            steps.append(
                decode_attention(q[:, :, here], k[:, :, here], v[:, :, here], cache, position, backend=backend)
            )
    return (torch.cat(steps, 2),)


def _gumbel(hard: bool) -> Callable[[Tensors, str], Tensors]:
    def run(inputs: Tensors, backend: str) -> Tensors:
        def outputs(leaves: Tensors) -> Tensors:
            logits, codebook = leaves
            latents, _, kl = gumbel_lookup(logits, codebook, temperature=0.9, hard=hard, seed=1, backend=backend)
            return latents, kl

        return _with_gradients(inputs, outputs)

    return run


def _projection(inputs: Tensors, backend: str) -> Tensors:
    def outputs(leaves: Tensors) -> Tensors:
        features, weight, codebook = leaves
        latents, _, kl = gumbel_projection_lookup(
            features, weight, None, codebook, temperature=0.9, seed=1, backend=backend
        )
        return latents, kl

    return _with_gradients(inputs, outputs)


def _indices(inputs: Tensors, backend: str) -> Tensors:
    logits, codebook = inputs
    return (gumbel_lookup(logits, codebook, temperature=0.9, seed=1, backend=backend)[1],)


def _nearest(inputs: Tensors, backend: str) -> Tensors:
    def outputs(leaves: Tensors) -> Tensors:
        features, codebook = leaves
        latents, _, squared_distance = vq_lookup(features, codebook, backend=backend)
        return latents, squared_distance

    return _with_gradients(inputs, outputs)


def _likelihood(inputs: Tensors, backend: str) -> Tensors:
    pixels = torch.linspace(0.1, 0.9, inputs[0].numel()).view(inputs[0].shape).to(inputs[0])

    def outputs(leaves: Tensors) -> Tensors:
        mu, log_b = leaves
        return (logit_laplace_nll(pixels, mu, log_b, backend=backend),)

    return _with_gradients(inputs, outputs)


def _tokens(inputs: Tensors, backend: str) -> Tensors:
    return (sample_tokens(inputs[0], 0.8, top_k=50, top_p=0.9, seed=1, backend=backend),)


def probes() -> list[Probe]:
    """Every operation, forward and backward, on problems that no tile divides."""
    attention = _normal(*[(2, 3, _ROW.length, 32)] * 3)
    corner = _normal(*[(1, 2, _CONVOLUTION.length, 64)] * 3)
    table = _normal((37, 300), (300, 40))
    return [
        Probe("attention, row", sparse_attention, attention, _attention(_ROW), lambda x: (*x, _ROW)),
        Probe(
            "attention, convolution", sparse_attention, corner, _attention(_CONVOLUTION), lambda x: (*x, _CONVOLUTION)
        ),
        Probe(
            "decoding, row",
            decode_attention,
            _normal(*[(2, 3, 40, 32)] * 3),
            _decoding,
            lambda x: (
                x[0][:, :, :1],
                x[1][:, :, :1],
                x[2][:, :, :1],
                KVCache(_ROW, 2, 3, 32, x[0].dtype, x[0].device),
                0,
            ),
        ),
        Probe("Gumbel lookup, soft", gumbel_lookup, table, _gumbel(hard=False), lambda x: (*x, 0.9)),
        Probe("Gumbel lookup, hard", gumbel_lookup, table, _gumbel(hard=True), lambda x: (*x, 0.9)),
        Probe("Gumbel lookup, indices", gumbel_lookup, table, _indices, lambda x: (*x, 0.9), exact=True),
        Probe(
            "Gumbel lookup from features",
            gumbel_projection_lookup,
            _normal((37, 24), (300, 24), (300, 40)),
            _projection,
            lambda x: (x[0], x[1], None, x[2], 0.9),
        ),
        Probe("nearest code", vq_lookup, _normal((37, 40), (300, 40)), _nearest, lambda x: x),
        Probe("likelihood", logit_laplace_nll, _normal((3, 50), (3, 50)), _likelihood, lambda x: (x[0].sigmoid(), *x)),
        Probe("sampling", sample_tokens, _normal((5, 700)), _tokens, lambda x: x, exact=True),
    ]


# --- Judging ----------------------------------------------------------------------------------------------------------


def _error(results: Tensors, truth: Tensors) -> float:
    """The worst element's distance from the truth, as a share of its tensor's largest; NaN where one is NaN."""
    worst = 0.0
    for result, true in zip(results, truth, strict=True):
        got, wanted = result.double().cpu(), true.double().cpu()
        distance = (
            torch.where(got == wanted, 0.0, (got - wanted).abs()).max().item()
        )  # equal infinities are no distance
        share = distance / max(wanted[wanted.isfinite()].abs().max().item(), 1e-30)
        worst = share if math.isnan(share) else max(worst, share)
        if math.isnan(worst):
            break
    return worst


def _judge(probe: Probe, device: torch.device, dtype: torch.dtype, backend: str) -> tuple[str, str]:
    """("right" or "wrong", the error beside what is allowed)."""
    inputs = tuple(tensor.to(device, dtype) for tensor in probe.inputs())
    results = probe.run(inputs, backend)
    if probe.exact:
        truth = probe.run(inputs, "reference")
        differ = sum(int((result != true).sum()) for result, true in zip(results, truth, strict=True))
        return ("right" if differ == 0 else "wrong"), f"{differ} differ"
    truth = probe.run(tuple(tensor.double().cpu() for tensor in inputs), "reference")
    error = _error(results, truth)
    return ("right" if error <= ALLOWED[dtype] else "wrong"), f"{error:.1e} of {ALLOWED[dtype]:.0e}"


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    begun = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begun) * 1e3


def ratio(ours: Callable[[], object], other: Callable[[], object], device: torch.device, rounds: int = 9) -> float:
    """How many times as long `other` takes: medians of calls in turn, after one of each."""
    samples: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for run, taken in zip((ours, other), samples, strict=True):
            spent = _milliseconds(run, device)
            if number:
                taken.append(spent)
    return median(samples[1]) / median(samples[0])


def examine(device: torch.device, dtypes: Sequence[torch.dtype], speed: bool = True) -> Iterator[Finding]:
    """Every backend's answer to every probe on `device`, as it comes."""
    for probe in probes():
        for dtype in dtypes[:1] if probe.exact else dtypes:
            inputs = tuple(tensor.to(device, dtype) for tensor in probe.inputs())
            told = explain(probe.function, *probe.arguments(inputs))
            for backend in BACKENDS:
                reason = told.refusals.get(backend)
                serves = backend == told.backend or (reason is not None and reason.startswith("could serve"))
                name = str(dtype).removeprefix("torch.")
                seen = Finding(probe.name, str(device), name, backend, backend == told.backend, "refused", reason or "")
                if serves:
                    try:
                        status, detail = _judge(probe, device, dtype, backend)
                        seen = seen._replace(status=status, detail=detail)
                    except Exception as error:  # whatever a kernel throws is the finding
                        lines = str(error).splitlines() or [""]
                        seen = seen._replace(status="failed", detail=f"{type(error).__name__}: {lines[0]}")
                if seen.status == "right" and speed and backend != "reference":
                    seen = seen._replace(
                        speed=ratio(
                            partial(probe.run, inputs, backend),
                            partial(probe.run, inputs, "reference"),
                            device,
                            rounds=3,
                        )
                    )
                yield seen


def against_sdpa(device: torch.device, dtype: torch.dtype) -> str:
    """One line: row attention over 256 text and 16 x 16 image tokens beside torch's own attention, dense and causal."""
    pattern = Row(TokenLayout(text_length=256, grid=(16, 16)))
    q, k, v = (torch.randn(1, 8, pattern.length, 64, device=device).to(dtype) for _ in range(3))
    ours = explain(sparse_attention, q, k, v, pattern)
    with torch.no_grad():
        times = ratio(
            lambda: sparse_attention(q, k, v, pattern),
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            device,
            rounds=25,
        )
    name = str(dtype).removeprefix("torch.")
    return (
        f"row attention, 512 tokens, 8 x 64, {name}, forward: {ours.backend} {times:.2f} times as fast as SDPA causal"
    )


# --- The report -------------------------------------------------------------------------------------------------------


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def environment() -> list[str]:
    """What is installed and what was built, a line each."""
    packages = ", ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "numpy"))
    lines = [
        f"dalle_kernels {dalle_kernels.__version__} on Python {platform.python_version()}, {platform.platform()}",
        packages,
        f"processor: {native.processor()}, {torch.get_num_threads()} threads",
    ]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        lines.append(f"GPU {index}: {torch.cuda.get_device_name(index)}, capability {major}.{minor}")
    return [*lines, *native.report().splitlines()]


def table(findings: Sequence[Finding]) -> list[str]:
    """The findings as lines of one table; what a backend refuses everywhere for one reason is one line below it."""
    rows = [("operation", "device", "dtype", "backend", "answer", "error", "speed")]
    refusals: dict[tuple[str, str, str], dict[str, None]] = {}  # in order, each once
    for seen in findings:
        if seen.status == "refused":
            refusals.setdefault((seen.backend, seen.device, seen.detail), {})[seen.probe] = None
            continue
        speed = "" if seen.speed is None else f"{seen.speed:.1f}x"
        answer = seen.status.upper() if seen.bad else seen.status
        backend = seen.backend + ("*" if seen.chosen else "")
        detail = "see below" if seen.status == "failed" else seen.detail
        rows.append((seen.probe, seen.device, seen.dtype, backend, answer, detail, speed))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append('* what "auto" takes; speed: times as fast as the reference backend on a problem this small')
    for (backend, device, reason), refused in refusals.items():
        every = len(refused) == len({seen.probe for seen in findings if seen.device == device})
        lines.append(f"{backend} on {device}: {'' if every else '; '.join(refused) + ': '}{reason}")
    failures = [seen for seen in findings if seen.status == "failed"]
    return [*lines, *(f"{seen.probe}, {seen.dtype}, {seen.backend} failed: {seen.detail}" for seen in failures)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dalle_kernels.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--no-speed", action="store_true", help="answers only")
    asked = parser.parse_args(arguments)
    print("\n".join(environment()), flush=True)
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    findings: list[Finding] = []
    for device in devices:
        dtypes = (torch.float32, torch.bfloat16) + ((torch.float16,) if device.type == "cuda" else ())
        for seen in examine(device, dtypes, speed=not asked.no_speed):
            findings.append(seen)
            if sys.stderr.isatty():
                print(f"\r\033[K{seen.probe}, {seen.dtype}, {seen.backend}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    print("\n" + "\n".join(table(findings)))
    if not asked.no_speed:
        print("\n" + "\n".join(against_sdpa(device, dtype) for device in devices for dtype in dtypes_of_speed(device)))
    bad = [seen for seen in findings if seen.bad]
    right = sum(seen.status == "right" for seen in findings)
    print(f"\n{right} answers right, {len(bad)} wrong or failed" + (": please report this table" if bad else ""))
    return 1 if bad else 0


def dtypes_of_speed(device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtypes that are worth timing on `device`."""
    return (torch.float32,) if device.type == "cpu" else (torch.bfloat16,)


if __name__ == "__main__":
    sys.exit(main())
