"""The entropies of soft choices from a codebook, a tile of rows and codes at a time.

With l_nk the score of code k for row n, p_n = softmax(l_n) and p = mean_n p_n, the two entropies are mean_n H(p_n)
and H(p). On the CPU they are those of a lookup from features (codebook/projection), whose kernels take a strip of rows
and all codes at a time. Elsewhere, and in float64, the table is streamed here. A first walk over the codes keeps, of
each row, the largest score m, s = sum exp(l - m) and t = sum exp(l - m) (l - m), from which log-sum-exp m + log s and
H = log s - t / s follow; a second walk adds up p. The backward walks twice more: with G the derivative by p,
dl_nk = p_nk (G_k - sum_j p_nj G_j - g (log p_nk + H_n)) / N, where g is the derivative by the rows' mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

from dalle_kernels.backends import native
from dalle_kernels.checks import autocast, check_alike, check_temperature, check_tensor, outside_autocast
from dalle_kernels.codebook.checks import check_row_mask
from dalle_kernels.codebook.projection.op import gumbel_projection_lookup

Metric: TypeAlias = Literal["dot", "euclidean"]
_ROWS, _CODES = 512, 1024  # of a tile, which stays within a core's caches


class CodebookEntropy(NamedTuple):
    """How sure the rows are of their codes, and how evenly they use them; all in nats, all differentiable.

    Attributes:
        rows: 0-dim, the mean over the rows of each row's entropy.
        mean: 0-dim, the entropy of the rows' mean distribution; log K where all codes are used alike.
        distribution: [K], that mean distribution.
    """

    rows: torch.Tensor
    mean: torch.Tensor
    distribution: torch.Tensor


def codebook_entropy(
    features: torch.Tensor,
    codebook: torch.Tensor,
    temperature: float = 1.0,
    metric: Metric = "dot",
    row_mask: torch.Tensor | None = None,
) -> CodebookEntropy:
    """The entropies of softmax(scores / temperature) over a codebook; the N x K table is never made.

    Memory is that of the features, the codebook and their gradients. Differentiable to features and codebook.

    Sources: Jansen et al. 2020 and Yu et al. 2024 (the two entropies as a loss), Shi et al. 2024 (IBQ: all codes scored
    by their product with the features).

    Args:
        features: [..., D], float16, bfloat16, float32 or float64; computed in float32 (or float64) inside.
        codebook: [K, D], dtype and device of `features` (under autocast both are cast).
        temperature: what the scores are divided by, above 0.
        metric: the scores are z . c for "dot", -|z - c|^2 for "euclidean".
        row_mask: bool [...], False at rows that do not count; all count where None.

    Raises:
        TypeError, ValueError: for wrong shapes, dtypes, devices, a temperature that is not above 0, no row, or, on the
            CPU and below float64, NaN among the rows that count.

    Example:
        >>> rows, mean, distribution = codebook_entropy(torch.randn(64, 8), torch.randn(300, 8))
        >>> distribution.shape, bool(mean >= rows)
        (torch.Size([300]), True)
    """
    check_tensor("features", features)
    check_tensor("codebook", codebook, rank=2)
    if features.dim() < 1 or 0 in codebook.shape or features.shape[-1] != codebook.shape[1]:
        shapes = f"{tuple(features.shape)}, {tuple(codebook.shape)}"
        raise ValueError(f"features, codebook: got shapes {shapes}, wanted [..., D] and [K, D], K and D at least 1")
    if metric not in ("dot", "euclidean"):
        raise ValueError(f"metric: got {metric!r}, wanted 'dot' or 'euclidean'")
    temperature = check_temperature(temperature)
    features, codebook = autocast(features, codebook)
    check_alike("codebook", codebook, "features", features)
    rows = masked_rows(features, row_mask)
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    rows, codebook, euclidean = rows.to(wide), codebook.to(wide), metric == "euclidean"
    made_by = _looked_up if _has_kernels(rows.device, wide) else _Streamed.apply
    row_entropy, distribution, *_ = outside_autocast(rows.device.type, made_by, rows, codebook, temperature, euclidean)
    return CodebookEntropy(row_entropy, entropy(distribution), distribution)


@torch.compiler.assume_constant_result  # asks the library, which torch.compile cannot trace
def _has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    return native.refuse_cpu(device, dtype) is None


def masked_rows(features: torch.Tensor, row_mask: torch.Tensor | None) -> torch.Tensor:
    """[N, D], the rows that count: at least one."""
    rows = features.reshape(-1, features.shape[-1])
    if (counted := check_row_mask(row_mask, features)) is not None:
        rows = rows[counted.reshape(-1)]
    if not rows.shape[0]:
        raise ValueError("features: got no row that counts, wanted at least one")
    return rows


def entropy(distribution: torch.Tensor) -> torch.Tensor:
    """-sum p log p in nats; a probability that underflowed to 0 has a finite gradient."""
    least = torch.finfo(distribution.dtype).tiny
    return -(distribution * distribution.clamp_min(least).log()).sum()


def _looked_up(
    rows: torch.Tensor, codebook: torch.Tensor, temperature: float, euclidean: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `_Streamed` gives, by the lookup's kernels; the latents are not looked at."""
    # |z|^2 is the same for all codes of a row: softmax does not see it.
    bias = codebook.square().sum(-1) / -temperature if euclidean else None
    scaled = rows * ((2 if euclidean else 1) / temperature)
    *_, kl, distribution = gumbel_projection_lookup(
        scaled, codebook, bias, codebook.detach(), 1.0, hard=True, noise=False, distribution=True
    )
    return math.log(len(codebook)) - kl.mean(), distribution


class _Scores:
    """The tiles of scores, as they come."""

    def __init__(self, rows: torch.Tensor, codebook: torch.Tensor, temperature: float, euclidean: bool) -> None:
        self.rows, self.codebook, self.euclidean = rows, codebook, euclidean
        self.factor = (2 if euclidean else 1) / temperature
        # |z|^2 is the same for all codes of a row: softmax does not see it.
        self.offset = codebook.square().sum(-1) / -temperature if euclidean else None

    def row_slices(self) -> Iterator[slice]:
        return (slice(first, first + _ROWS) for first in range(0, len(self.rows), _ROWS))

    def code_slices(self) -> Iterator[slice]:
        return (slice(first, first + _CODES) for first in range(0, len(self.codebook), _CODES))

    def tile(self, rows: slice, codes: slice) -> torch.Tensor:
        if self.offset is None:
            return (self.rows[rows] @ self.codebook[codes].T).mul_(self.factor)
        return torch.addmm(self.offset[codes], self.rows[rows], self.codebook[codes].T, alpha=self.factor)


class _Streamed(torch.autograd.Function):
    """(rows [N, D], codebook [K, D]) -> the mean of the rows' entropies, the mean distribution [K].

    And, for the backward, each row's log-sum-exp and entropy [N].
    """

    @staticmethod
    def forward(  # type: ignore[override]
        rows: torch.Tensor, codebook: torch.Tensor, temperature: float, euclidean: bool
    ) -> tuple[torch.Tensor, ...]:
        scores = _Scores(rows, codebook, temperature, euclidean)
        lse, row_entropy = rows.new_empty(len(rows)), rows.new_empty(len(rows))
        distribution = rows.new_zeros(len(codebook))
        for part in scores.row_slices():
            largest = rows.new_full((len(rows[part]),), -torch.inf)
            total, weighted = torch.zeros_like(largest), torch.zeros_like(largest)
            for codes in scores.code_slices():
                tile = scores.tile(part, codes)
                above = torch.maximum(largest, tile.amax(1))
                # What was summed about the old maximum is summed about the new one; the first time there is nothing.
                fall = torch.where(largest.isinf(), 0.0, largest - above)
                shrink = fall.exp()
                tile -= above[:, None]
                share = tile.exp()
                weighted = (weighted + total * fall) * shrink + (share * tile).sum(1)
                total = total * shrink + share.sum(1)
                largest = above
            lse[part] = largest + total.log()
            row_entropy[part] = total.log() - weighted / total
            for codes in scores.code_slices():
                distribution[codes] += scores.tile(part, codes).sub_(lse[part, None]).exp_().sum(0)
        return row_entropy.mean(), distribution.div_(len(rows)), lse, row_entropy

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        rows, codebook, ctx.temperature, ctx.euclidean = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)  # zeros in place of a DTensor's gradient would be no DTensor
        ctx.save_for_backward(rows, codebook, *output[2:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_rows: torch.Tensor | None, grad_distribution: torch.Tensor | None, *_: Any
    ) -> tuple[Any, ...]:
        rows, codebook, lse, row_entropy = ctx.saved_tensors
        pull_rows = 0.0 if grad_rows is None else grad_rows
        if grad_distribution is None:
            grad_distribution = torch.zeros_like(codebook[:, 0])
        scores = _Scores(rows, codebook, ctx.temperature, ctx.euclidean)
        drows, dcodebook = torch.zeros_like(rows), torch.zeros_like(codebook)
        pull = torch.zeros_like(codebook[:, 0])  # sum over rows of the scores' derivatives: what the offset receives
        for part in scores.row_slices():
            mixed = torch.zeros_like(lse[part])
            for codes in scores.code_slices():
                mixed += scores.tile(part, codes).sub_(lse[part, None]).exp_() @ grad_distribution[codes]
            for codes in scores.code_slices():
                log_p = scores.tile(part, codes).sub_(lse[part, None])
                p = log_p.exp()
                log_p += row_entropy[part, None]
                log_p *= -pull_rows
                log_p += grad_distribution[codes]
                log_p -= mixed[:, None]
                dscores = log_p.mul_(p)
                drows[part].addmm_(dscores, codebook[codes])
                dcodebook[codes].addmm_(dscores.T, rows[part])
                pull[codes] += dscores.sum(0)
        share = 1 / len(rows)
        drows *= scores.factor * share
        dcodebook *= scores.factor * share
        if ctx.euclidean:
            dcodebook.addcmul_(codebook, pull[:, None], value=-2 * share / ctx.temperature)
        return drows, dcodebook, None, None
