"""`sample_tokens` against eager and compiled samplers that sort the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from benchmarks.competitors.adapter import Lookup, Made
from benchmarks.competitors.sampling import sampling_competitors
from benchmarks.harness import Cell, Check, Contender, Trial, Work, copies_beyond_cache, dtype_name
from benchmarks.suites.choice import Choice
from dalle_kernels import sample_tokens
from dalle_kernels.noise import SAMPLING_STREAM, gumbel_noise

SEED = 99
SETTINGS = {
    "temperature": (None, None, False),
    "top-k 256": (256, None, False),
    "top-p 0.9": (None, 0.9, False),
    "guidance, top-k 256, top-p 0.9": (256, 0.9, True),
}


def cells(choice: Choice) -> list[Cell]:
    """The paper's 8192 image tokens, and the ways of cutting the tail off."""
    dtypes = choice.dtypes or (torch.float32,)
    batches = (8,) if choice.quick else (64, 512, 8) if choice.gpu else (8, 64)
    settings = list(SETTINGS)[-1:] if choice.quick else list(SETTINGS)
    return [cell(choice.device, batch, dtype, setting) for batch in batches for dtype in dtypes for setting in settings]


def cell(
    device: torch.device,
    batch: int,
    dtype: torch.dtype,
    setting: str,
    vocabulary: int = 8192,
    competitors: Sequence[Lookup] | None = None,
) -> Cell:
    """One draw a row."""
    top_k, top_p, guided = SETTINGS[setting]
    case = {"setting": setting, "batch": batch, "vocabulary": vocabulary, "dtype": dtype_name(dtype)}
    work = Work(bytes=batch * vocabulary * dtype.itemsize * (1 + guided), ceiling="copy")
    guidance, temperature = (3.0 if guided else 1.0), 0.9

    def contenders() -> Iterable[Contender]:
        @lru_cache(maxsize=1)
        def inputs() -> list[list[Tensor]]:  # rotating (logits, unconditional), made when first wanted
            generator = torch.Generator(device).manual_seed(0)
            shape = (batch, vocabulary)
            return [
                [(3 * torch.randn(shape, generator=generator, device=device)).to(dtype) for _ in range(2)]
                for _ in range(copies_beyond_cache(work.bytes, device))
            ]

        seed = torch.tensor(SEED, device=device)

        def ours(
            logits: Tensor,
            unconditional: Tensor | None,
            guidance: float,
            temperature: float,
            top_k: int | None,
            top_p: float | None,
            noise: Tensor | None = None,
        ) -> Tensor:
            return sample_tokens(logits, temperature, top_k, top_p, seed, unconditional, guidance)

        def trial(made: Made) -> Trial:
            def run(pair: Sequence[Tensor], noise: Tensor | None = None) -> Tensor:
                logits, unconditional = pair
                return made.function(
                    logits, unconditional if guided else None, guidance, temperature, top_k, top_p, noise
                )

            def verify() -> Check:
                noise = gumbel_noise(seed, batch, vocabulary, SAMPLING_STREAM)
                true = _truth(inputs()[0], noise, guidance if guided else None, temperature, top_k, top_p)
                wrong = (run(inputs()[0], noise) != true).double().mean().item()
                return Check(wrong, 1e-2)  # two scores may lie within rounding

            return Trial([partial(run, pair) for pair in inputs()], verify, made.notes)

        yield Contender("dalle_kernels", lambda: trial(Made(ours)))
        for competitor in sampling_competitors() if competitors is None else competitors:
            yield Contender(competitor.name, lambda competitor=competitor: trial(competitor.make()))

    return Cell("sampling", case, dtype, lambda: work, contenders)


def _truth(
    pair: Sequence[Tensor],
    noise: Tensor,
    guidance: float | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Tensor:
    """By the definition, in float64, a row at a time."""
    logits, unconditional = (tensor.double() for tensor in pair)
    if guidance is not None:
        logits = unconditional + guidance * (logits - unconditional)
    drawn = []
    for row, g in zip(logits / temperature, noise.double(), strict=True):
        kept = row
        if top_k is not None:
            kept = row.masked_fill(row < row.sort(descending=True).values[top_k - 1], -torch.inf)
        if top_p is not None:
            p = kept.softmax(-1)
            order = p.argsort(descending=True)
            likelier = torch.zeros_like(p).scatter_(0, order, p[order].cumsum(0) - p[order])
            kept = kept.masked_fill(likelier >= top_p, -torch.inf)
        drawn.append((kept + g).argmax())
    return torch.stack(drawn)
