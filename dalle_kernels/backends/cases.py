"""Small problems with known answers, for whoever asks whether kernels are right on a machine.

`dalle_kernels.doctor` puts all of them to every backend; the self-check those of one operation to the backend that is
about to serve it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch

from dalle_kernels import (
    Convolution,
    KVCache,
    Packed,
    Pattern,
    Row,
    TokenLayout,
    code_statistics,
    decode_attention,
    gumbel_lookup,
    gumbel_projection_lookup,
    logit_laplace_nll,
    sample_tokens,
    sparse_attention,
    vq_lookup,
)

Tensors: TypeAlias = tuple[torch.Tensor, ...]

# How far the worst element may lie from float64's, as a share of the largest: a few roundings of sums this short.
ALLOWED = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Case:
    """One operation on one small problem.

    Attributes:
        name: what tables call it.
        function: the public operation.
        width: that of the doctor's problem, as the operation counts it (`Call.width`).
        inputs: makes the floating-point tensors of a width, in float64, from a seeded generator.
        run: computes everything that the operation gives, gradients included, by a backend.
        arguments: `inputs` as the arguments of `function`.
        exact: indices and tokens, which must be the reference's to the last one, given the same inputs.
        extras: `Call.extras` of its calls.
        named: keyword arguments of `function` besides.
    """

    name: str
    function: Callable[..., object]
    width: int
    inputs: Callable[[int], Tensors]
    run: Callable[[Tensors, str], Tensors]
    arguments: Callable[[Tensors], tuple[object, ...]]
    exact: bool = False
    extras: tuple[str, ...] = ()
    named: Mapping[str, object] = field(default_factory=dict)


class Verdict(NamedTuple):
    """What came of a case: whether the answer is right, and the error beside what is allowed."""

    right: bool
    detail: str


_ROW = Row(TokenLayout(text_length=20, grid=(6, 10)))
_WHOLE = Row(TokenLayout(text_length=64, grid=(8, 8)))
_PACKED = Packed([Row(TokenLayout(text_length=9, grid=(3, 7))), Row(TokenLayout(text_length=40, grid=(5, 4)))])
_CONVOLUTION = Convolution(TokenLayout(text_length=5, grid=(9, 9)), kernel_size=5)
_MANY_HEADS = 192  # as many as the largest GPU has multiprocessors, or more: kernels that own a whole head then serve


def _normal(*shapes: tuple[int | None, ...]) -> Callable[[int], Tensors]:
    """Of these shapes, with the width where None stands."""

    def make(width: int) -> Tensors:
        generator = torch.Generator().manual_seed(0)
        filled = [[width if size is None else size for size in shape] for shape in shapes]
        return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in filled)

    return make


def _with_gradients(inputs: Tensors, outputs: Callable[[Tensors], Tensors]) -> Tensors:
    """What `outputs` gives, and the gradient of a fixed mixture of it with respect to each input."""
    leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    results = outputs(leaves)
    differentiable = [result for result in results if result.requires_grad]
    weights = [torch.linspace(-1, 1, result.numel()).view(result.shape).to(result) for result in differentiable]
    gradients = torch.autograd.grad(differentiable, leaves, weights)
    return *(result.detach() for result in results), *gradients


_SOFTCAP = 2.0  # scores are about 1


def _asked(q: torch.Tensor, extras: tuple[str, ...]) -> torch.Tensor:
    return q[:, :, 5:-4] if "queries for a part of the tokens" in extras else q


def _named(extras: tuple[str, ...]) -> dict[str, object]:
    """The keyword arguments of attention, or of a decoding step, with these extras."""
    wanted = {"logit soft cap": ("softcap", _SOFTCAP), "queries for a part of the tokens": ("query_start", 5)}
    return dict(wanted[extra] for extra in extras if extra in wanted)


def _attention(pattern: Pattern, padded: bool, extras: tuple[str, ...]) -> Callable[[Tensors, str], Tensors]:
    named: dict[str, Any] = _named(extras)

    def run(inputs: Tensors, backend: str) -> Tensors:
        padding = None
        if padded:
            padding = torch.zeros(inputs[0].shape[0], inputs[0].shape[2], dtype=torch.bool, device=inputs[0].device)
            padding[0, :3] = True

        def outputs(leaves: Tensors) -> Tensors:
            q, k, v = leaves
            asked = _asked(q, extras), k, v, pattern
            return sparse_attention(*asked, None, padding, return_lse=True, backend=backend, **named)

        return _with_gradients(inputs, outputs)

    return run


def _new_cache(q: torch.Tensor, extras: tuple[str, ...]) -> KVCache:
    """For queries [B, H, n, D]; with grouped heads all of them see one head of keys."""
    batch, heads, _, width = q.shape
    copies = 2 if "shared prompts" in extras else 1
    heads = 1 if "grouped heads" in extras else heads
    dtype = torch.int8 if "eight-bit caches" in extras else q.dtype
    return KVCache(_ROW, batch // copies, heads, width, dtype, q.device, copies)


def _decoding(extras: tuple[str, ...]) -> Callable[[Tensors, str], Tensors]:
    named: dict[str, Any] = _named(extras)
    prompt = 7 if extras else 0

    def run(inputs: Tensors, backend: str) -> Tensors:
        q, k, v = inputs
        batch, _, length, _ = q.shape
        cache = _new_cache(q, extras)
        copies, heads = cache.copies, cache.keys.shape[1]
        k, v = k[:, :heads], v[:, :heads]
        steps = []
        with torch.no_grad():
            if prompt:
                padding = None
                if "padding" in extras:
                    padding = torch.zeros(batch // copies, prompt, dtype=torch.bool, device=q.device)
                    padding[0, 1:3] = True
                cache.prefill(k[::copies, :, :prompt], v[::copies, :, :prompt], padding)
            for step in range(prompt, length):
                here = slice(step, step + 1)
                position: int | torch.Tensor = step
                if "positions that differ by row" in extras:
                    position = torch.full((batch,), step, device=q.device)
                    if step == length - 1:  # the last row takes the step before once more
                        position[-1] -= 1
                        cache.truncate(position)
                token = q[:, :, here], k[:, :, here], v[:, :, here]
                steps.append(decode_attention(*token, cache, position, backend=backend, **named))
        return (torch.cat(steps, 2),)

    return run


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


def _index_backpropagation(inputs: Tensors, backend: str) -> Tensors:
    def outputs(leaves: Tensors) -> Tensors:
        features, codebook = leaves
        latents, _, kl, distribution = gumbel_projection_lookup(
            features, codebook, None, codebook, 1.0, hard=True, noise=False, backend=backend, distribution=True
        )
        return latents, kl, distribution

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


def _several(inputs: Tensors, backend: str) -> Tensors:
    def outputs(leaves: Tensors) -> Tensors:
        features, codebook = leaves
        latents, _, squared_distance = vq_lookup(features, codebook, backend, k=3)
        return latents, squared_distance

    return _with_gradients(inputs, outputs)


def _drawn(inputs: Tensors, backend: str) -> Tensors:
    features, codebook = inputs
    return (vq_lookup(features, codebook, backend, temperature=0.9, seed=1)[1],)


def _codes(inputs: Tensors) -> torch.Tensor:
    rows = len(inputs[0])
    return torch.arange(rows, device=inputs[0].device) * 7 % 11 - 1


def _statistics(inputs: Tensors, backend: str) -> Tensors:
    return code_statistics(inputs[0], _codes(inputs), 13, backend=backend)


def _likelihood(inputs: Tensors, backend: str) -> Tensors:
    pixels = torch.linspace(0.1, 0.9, inputs[0].numel()).view(inputs[0].shape).to(inputs[0])

    def outputs(leaves: Tensors) -> Tensors:
        mu, log_b = leaves
        return (logit_laplace_nll(pixels, mu, log_b, backend=backend),)

    return _with_gradients(inputs, outputs)


def _tokens(inputs: Tensors, backend: str) -> Tensors:
    return (sample_tokens(inputs[0], 0.8, top_k=50, top_p=0.9, seed=1, backend=backend),)


def decoding(extras: tuple[str, ...] = ()) -> Case:
    """The case of decoding with some of what not every backend has: one or more of `Call.extras`."""
    return Case(
        "decoding, row" + "".join(f", {extra}" for extra in extras),
        decode_attention,
        32,
        _normal(*[(4, 3, 40, None)] * 3),
        _decoding(extras),
        lambda x: (
            x[0][:, :, :1],
            x[1][:, :, :1],
            x[2][:, :, :1],
            _new_cache(x[0], extras),
            0,
        ),
        extras=extras,
    )


def attention(extras: tuple[str, ...] = ()) -> list[Case]:
    """The cases of attention with some of what not every backend has."""

    def case(
        name: str,
        pattern: Pattern,
        width: int,
        batch: int,
        heads: int,
        padded: bool = False,
        groups: int | None = None,
        values: int | None = None,
    ) -> Case:
        """`groups` heads of keys and values, as many as of queries where None; values of the width where None."""
        rows = batch, heads if groups is None else groups, pattern.length
        return Case(
            f"attention, {name}" + "".join(f", {extra}" for extra in extras),
            sparse_attention,
            width,
            _normal((batch, heads, pattern.length, None), (*rows, None), (*rows, values)),
            _attention(pattern, padded, extras),
            lambda x: (_asked(x[0], extras), x[1], x[2], pattern),
            extras=extras,
            named=_named(extras),
        )

    return [
        case("row", _ROW, 32, 2, 3, padded=True),
        case("convolution", _CONVOLUTION, 64, 1, 2, padded=True),
        case("whole tiles", _WHOLE, 64, 1, 2),
        case("many heads", _WHOLE, 64, 1, _MANY_HEADS),
        case("grouped heads, narrower values", _ROW, 32, 2, 6, padded=True, groups=2, values=5),
        case("packed", _PACKED, 32, 1, 2),
    ]


def all_cases() -> list[Case]:
    """Every operation, forward and backward, on problems that no tile divides; kernels that are compiled anew for
    shapes which tiles divide have one of those too."""

    table, whole = _normal((37, 300), (300, None)), _normal((128, 512), (512, None))
    codes = _normal((37, None), (300, None))
    return [
        *attention(),
        attention(("logit soft cap",))[0],
        attention(("queries for a part of the tokens",))[0],
        decoding(),
        decoding(("eight-bit caches", "grouped heads")),
        Case("Gumbel lookup, soft", gumbel_lookup, 40, table, _gumbel(hard=False), lambda x: (*x, 0.9)),
        Case("Gumbel lookup, hard", gumbel_lookup, 40, table, _gumbel(hard=True), lambda x: (*x, 0.9)),
        Case("Gumbel lookup, indices", gumbel_lookup, 40, table, _indices, lambda x: (*x, 0.9), exact=True),
        Case("Gumbel lookup, whole tiles", gumbel_lookup, 64, whole, _gumbel(hard=False), lambda x: (*x, 0.9)),
        Case(
            "Gumbel lookup from features",
            gumbel_projection_lookup,
            40,
            _normal((37, 24), (300, 24), (300, None)),
            _projection,
            lambda x: (x[0], x[1], None, x[2], 0.9),
        ),
        Case(
            "Gumbel lookup from features, whole tiles",
            gumbel_projection_lookup,
            64,
            _normal((128, 64), (512, 64), (512, None)),
            _projection,
            lambda x: (x[0], x[1], None, x[2], 0.9),
        ),
        Case(
            "index backpropagation",
            gumbel_projection_lookup,
            40,
            _normal((37, None), (300, None)),
            _index_backpropagation,
            lambda x: (x[0], x[1], None, x[1], 1.0),
            named={"distribution": True},
        ),
        Case("nearest code", vq_lookup, 40, codes, _nearest, lambda x: x),
        Case(
            "nearest codes",
            vq_lookup,
            40,
            codes,
            _several,
            lambda x: x,
            extras=("several nearest rows",),
            named={"k": 3},
        ),
        Case(
            "drawn code",
            vq_lookup,
            40,
            codes,
            _drawn,
            lambda x: x,
            exact=True,
            extras=("a temperature",),
            named={"temperature": 0.9},
        ),
        Case(
            "statistics of codes",
            code_statistics,
            40,
            _normal((37, None)),
            _statistics,
            lambda x: (x[0], _codes(x), 13),
        ),
        Case(
            "likelihood", logit_laplace_nll, 50, _normal((3, 50), (3, 50)), _likelihood, lambda x: (x[0].sigmoid(), *x)
        ),
        Case("sampling", sample_tokens, 700, _normal((5, None)), _tokens, lambda x: x, exact=True),
    ]


def cases_for(operation: str, extras: Sequence[str] = ()) -> list[Case]:
    """Those of the operation with this name, whose calls have no other extras than these."""
    if operation == "sparse_attention":
        return attention(tuple(extras))
    if operation == "decode_attention":
        return [decoding(tuple(extras))]
    return [case for case in all_cases() if case.function.__name__ == operation and set(case.extras) <= set(extras)]


def judge(case: Case, width: int, device: torch.device, dtype: torch.dtype, backend: str) -> Verdict:
    """A backend's answer to `case`, against float64 on the CPU (an exact one: against the reference)."""
    inputs = tuple(tensor.to(device, dtype) for tensor in case.inputs(width))
    results = case.run(inputs, backend)
    if case.exact:
        truth = case.run(inputs, "reference")
        differ = sum(int((result != true).sum()) for result, true in zip(results, truth, strict=True))
        return Verdict(differ == 0, f"{differ} differ")
    truth = case.run(tuple(tensor.double().cpu() for tensor in inputs), "reference")
    error = _error(results, truth)
    return Verdict(error <= ALLOWED[dtype], f"{error:.1e} of {ALLOWED[dtype]:.0e}")


def _error(results: Tensors, truth: Tensors) -> float:
    """The worst element's distance from the truth, as a share of its tensor's largest; NaN where one is NaN."""
    worst = 0.0
    for result, true in zip(results, truth, strict=True):
        got, wanted = result.double().cpu(), true.double().cpu()
        # Equal infinities are no distance.
        distance = torch.where(got == wanted, 0.0, (got - wanted).abs()).max().item()
        share = distance / max(wanted[wanted.isfinite()].abs().max().item(), 1e-30)
        worst = share if math.isnan(share) else max(worst, share)
        if math.isnan(worst):
            break
    return worst
