"""Nearest codebook rows in Triton, and their gradient without atomics.

Forward: argmin over k of |f - c_k|^2 is argmax of f . c_k - |c_k|^2 / 2, a matrix product with the argmax in its
epilogue; the distance itself is then computed from the difference, which cancels nothing. Of dot products nothing is
taken away, and for cosines a code's product is divided by its norm. Heads come one after another.

Several rows, and drawn ones, have a kernel of their own. It keeps the best scores of each row in a list without order,
and while a tile of scores has one for the list of any row, the worst of that list makes room. Far into a codebook few
tiles have, and a tile is then looked through once, as for one row. A tile takes its codes from each quarter of the
codebook, which one Philox counter serves (see triton_noise), and the temperature is brought to the scores' scale.

Backward: dfeatures_n = 2 h_n (f_n - c_k(n)) with h the distance's gradient, and dcodebook_k = -sum over the rows n of
code k; statistics sum the rows themselves. Rows are sorted by code, so a code's rows are one run. A program takes a
chunk of the sorted rows and sums the runs in it by a product with the 0/1 matrix "same code". A run that began in an
earlier chunk leaves its sum in `heads`, one per chunk; a second kernel adds those, in order, to the run's beginning.
Nothing is added twice to one place, and a code that owns all rows is as well spread as any other.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from dalle_kernels.backends import launch
from dalle_kernels.backends.contract import Call
from dalle_kernels.backends.triton_common import ceil_div, dot, obstacle, precision
from dalle_kernels.backends.triton_noise import LN_2, gumbel2, philox
from dalle_kernels.codebook.triton_tiles import LOWEST, apart, codes_of, together
from dalle_kernels.codebook.vq.contract import Grads, Inputs, Kept, Needs, Outputs
from dalle_kernels.noise import HEAD_STEP, VQ_STREAM, on_device

WIDEST = 256
CHUNK = 32  # sorted rows a program
HEADS = 16  # heads added at once
METRICS = {"euclidean": 0, "dot": 1, "cosine": 2, "distance": 3}


@triton.jit
def norm_kernel(codebook, norms, K, D, COSINE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """norms[k] = |c_k|^2 / 2, or 1 / |c_k| (0 for a zero code)."""
    code = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    feature = tl.arange(0, BLOCK_D)[None, :]
    kept = (code < K)[:, None] & (feature < D)
    row = tl.load(codebook + code.to(tl.int64)[:, None] * D + feature, mask=kept, other=0.0).to(tl.float32)
    total = tl.sum(row * row, 1)
    if COSINE:
        total = tl.where(total > 0, tl.rsqrt(tl.where(total > 0, total, 1.0)), 0.0)
    else:
        total *= 0.5
    tl.store(norms + code, total, mask=code < K)


@triton.jit
def load_features(base, rows, stride, first, D, BLOCK: tl.constexpr):
    """The features first .. first + BLOCK - 1 of rows [n], as [n, BLOCK]; zero from D on."""
    feature = first + tl.arange(0, BLOCK)[None, :]
    return tl.load(base + rows[:, None] * stride + feature, mask=feature < D, other=0.0)


@triton.jit
def products(
    f, features, row, codebook, place, D, stride, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Those of rows [n] with the codes at `place` [m]; f: the rows, where they are held whole."""
    score = tl.zeros([row.shape[0], place.shape[0]], tl.float32)
    if BLOCK_C == BLOCK_D:
        score = dot(f, tl.trans(load_features(codebook, place, D, 0, D, BLOCK_D)), score, PRECISION)
    else:  # fp32 rows, each held as three sums, would fill the registers
        for first in range(0, D, BLOCK_C):
            part = load_features(features, row, stride, first, D, BLOCK_C)
            codes = load_features(codebook, place, D, first, D, BLOCK_C)
            score = dot(part, tl.trans(codes), score, PRECISION)
    return score


@triton.jit
def vq_forward_kernel(
    features, codebook, norms, indices, distances, N, K, D, stride,
    METRIC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < N
    row = tl.minimum(row, N - 1)
    f = load_features(features, row, stride, 0, D, BLOCK_D) if BLOCK_C == BLOCK_D else None
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    index = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, K, BLOCK_K):
        code = start + tl.arange(0, BLOCK_K)
        if METRIC == 0:
            # A code past the end reads as code 0, but is infinitely long, hence never the nearest.
            norm = tl.load(norms + code, mask=code < K, other=float("inf"))
        if METRIC == 2:
            norm = tl.load(norms + code, mask=code < K, other=0.0)
        place = tl.where(code < K, code, 0).to(tl.int64)
        score = products(f, features, row, codebook, place, D, stride, PRECISION, BLOCK_C, BLOCK_D)
        if METRIC == 0:
            score -= norm[None, :]
        else:
            if METRIC == 2:
                score *= norm[None, :]
            score = tl.where((code < K)[None, :], score, float("-inf"))
        largest = tl.max(score, 1)
        first = tl.min(tl.where(score == largest[:, None], code[None, :], K - 1), 1)
        index = tl.where(largest > best, first, index)
        best = tl.maximum(best, largest)
    nearest = load_features(codebook, index.to(tl.int64), D, 0, D, BLOCK_D).to(tl.float32)
    difference = load_features(features, row, stride, 0, D, BLOCK_D).to(tl.float32) - nearest
    tl.store(indices + row, index.to(tl.int64), mask=inside)
    tl.store(distances + row, tl.sum(difference * difference, 1), mask=inside)


@triton.jit
def take_best(score, code, best, index, K):
    """Where the best of a tile of scores [n, m] is better than the worst of `best` [n, TOP], it leaves the one for the
    other, its code for `index`. Returns all three, and which rows [n] had one.

    Equal scores are the better the smaller their code. What is not there or was taken has the score -inf, no other has.
    """
    largest = tl.max(score, 1)
    first = tl.min(tl.where(score == largest[:, None], code[None, :], K), 1)
    worst = tl.min(best, 1)
    last = tl.max(tl.where(best == worst[:, None], index, -1), 1)
    better = (largest > float("-inf")) & ((largest > worst) | ((largest == worst) & (first < last)))
    room = better[:, None] & (index == last[:, None])
    best = tl.where(room, largest[:, None], best)
    index = tl.where(room, first[:, None], index)
    score = tl.where(better[:, None] & (code[None, :] == first[:, None]), float("-inf"), score)
    return score, best, index, better


@triton.jit
def vq_best_kernel(
    features, codebook, norms, temperature, seed, indices, N, K, quarter, D, stride, k, stream,
    METRIC: tl.constexpr, DRAWN: tl.constexpr, TOP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """indices [N, k], best first; TOP is k or more. DRAWN: by noise of this `stream`."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < N
    row = tl.minimum(row, N - 1)
    f = load_features(features, row, stride, 0, D, BLOCK_D) if BLOCK_C == BLOCK_D else None
    squares = tl.zeros([BLOCK_N], tl.float32)
    heat = tl.zeros([BLOCK_N], tl.float32)  # what noise is multiplied by beside a row's scores
    if DRAWN:
        key, first_row = tl.load(seed), tl.load(seed + 1)
        heat += tl.load(temperature) * LN_2
        if METRIC == 0:
            heat *= 0.5  # |f - c|^2 = |f|^2 - 2 (f . c - |c|^2 / 2)
        if METRIC >= 2:
            for first in range(0, D, BLOCK_C):
                part = load_features(features, row, stride, first, D, BLOCK_C).to(tl.float32)
                squares += tl.sum(part * part, 1)
        if METRIC == 2:
            heat *= tl.where(squares > 0, tl.sqrt(squares), 1.0)
    best = tl.full([BLOCK_N, TOP], float("-inf"), tl.float32)
    index = tl.zeros([BLOCK_N, TOP], tl.int32) + (K + tl.arange(0, TOP))[None, :]  # of no code yet
    for start in range(0, quarter, BLOCK_Q):
        code, valid = codes_of(start, K, quarter, BLOCK_Q)
        score = products(f, features, row, codebook, code.to(tl.int64), D, stride, PRECISION, BLOCK_C, BLOCK_D)
        if METRIC == 2:
            score *= tl.load(norms + code)[None, :]
        elif METRIC != 1:
            score -= tl.load(norms + code)[None, :]
        if DRAWN:
            if METRIC == 3:
                score = -tl.sqrt(tl.maximum(squares[:, None] - 2.0 * score, 0.0))
            s_0, s_1, s_2, s_3 = apart(score)
            # Nothing is below -inf: the term only ties the noise to the tile's layout (see `philox`).
            noise_row = (row + first_row + (tl.max(s_0, 1) < float("-inf")))[:, None]
            column = (start + tl.arange(0, BLOCK_Q)).to(tl.uint32)[None, :]
            word_0, word_1, word_2, word_3 = philox(column, noise_row, key, stream)
            s_0 += gumbel2(word_0) * heat[:, None]
            s_1 += gumbel2(word_1) * heat[:, None]
            s_2 += gumbel2(word_2) * heat[:, None]
            s_3 += gumbel2(word_3) * heat[:, None]
            score = together(s_0, s_1, s_2, s_3)
        # A score of NaN counts as the lowest, so that every list ends full of codes.
        score = tl.where(valid[None, :], tl.where(score > LOWEST, score, LOWEST), float("-inf"))
        if TOP == 1:
            score, best, index, better = take_best(score, code, best, index, K)
        else:
            going = 1
            while going > 0:
                score, best, index, better = take_best(score, code, best, index, K)
                going = tl.max(better.to(tl.int32), 0)
    mine, its = best[:, :, None], index[:, :, None]
    theirs, others = best[:, None, :], index[:, None, :]
    place = tl.sum(((theirs > mine) | ((theirs == mine) & (others < its))).to(tl.int32), 2)
    tl.store(indices + row[:, None] * k + place, index.to(tl.int64), mask=inside[:, None] & (place < k))


@triton.jit
def vq_backward_kernel(
    grads, features, nearest, sorted_codes, order, dfeatures, dcodebook, heads, N, D, stride,
    SUMS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """SUMS: dcodebook[k] is the sum of the rows of code k; there are no grads, nearest and dfeatures."""
    first = tl.program_id(0) * CHUNK
    place = first + tl.arange(0, CHUNK)
    inside = place < N
    code = tl.load(sorted_codes + place, mask=inside, other=-1)
    row = tl.load(order + place, mask=inside, other=0)
    feature = tl.arange(0, BLOCK_D)[None, :]
    kept = inside[:, None] & (feature < D)
    f = tl.load(features + row[:, None] * stride + feature, mask=kept, other=0.0).to(tl.float32)
    if SUMS:
        share = f
    else:
        c = tl.load(nearest + row[:, None] * D + feature, mask=kept, other=0.0).to(tl.float32)
        share = 2.0 * tl.load(grads + row, mask=inside, other=0.0)[:, None] * (c - f)
        tl.store(dfeatures + row[:, None] * D + feature, (-share).to(dfeatures.dtype.element_ty), mask=kept)

    # The codes once more as a row. Runs past the end share code -1 and are stored nowhere.
    other = tl.load(sorted_codes + first + tl.arange(0, CHUNK), mask=first + tl.arange(0, CHUNK) < N, other=-1)
    same = tl.where(code[:, None] == other[None, :], 1.0, 0.0)
    total = dot(same, share, tl.zeros([CHUNK, BLOCK_D], tl.float32), "tf32x3")
    following = tl.load(sorted_codes + place + 1, mask=(place + 1 < N) & (place + 1 < first + CHUNK), other=-1)
    last = (inside & (code != following))[:, None] & (feature < D)
    before = tl.load(sorted_codes + first - 1, mask=first > 0, other=-1)
    begun = (code == before)[:, None]
    tl.store(dcodebook + code[:, None] * D + feature, total, mask=last & (begun == 0))
    head = heads + tl.program_id(0).to(tl.int64) * D + feature + tl.zeros([CHUNK, 1], tl.int32)
    tl.store(head, total, mask=last & begun)


@triton.jit
def vq_heads_kernel(
    sorted_codes, heads, dcodebook, N, D, CHUNK: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Adds to the run that begins in this chunk and goes on what it left in the chunks after."""
    first = tl.program_id(0) * CHUNK
    stop = first + CHUNK
    code = tl.load(sorted_codes + stop - 1, mask=stop <= N, other=-1)
    before = tl.load(sorted_codes + first - 1, mask=first > 0, other=-1)
    following = tl.load(sorted_codes + stop, mask=stop < N, other=-2)
    if (code != before) & (code == following):
        feature = tl.arange(0, BLOCK_D)
        chunk = tl.program_id(0).to(tl.int64) + 1 + tl.arange(0, HEADS)
        target = dcodebook + code * D + feature
        total = tl.load(target, mask=feature < D, other=0.0)
        going = 1
        while going > 0:
            theirs = tl.load(sorted_codes + chunk * CHUNK, mask=chunk * CHUNK < N, other=-1) == code
            mask = theirs[:, None] & (feature < D)[None, :]
            total += tl.sum(tl.load(heads + chunk[:, None] * D + feature[None, :], mask=mask, other=0.0), 0)
            going = tl.min(theirs.to(tl.int32), 0)
            chunk += HEADS
        tl.store(target, total, mask=feature < D)


@functools.lru_cache(maxsize=256)
def _constants(kernel: str, device: torch.device, dtype: torch.dtype, width: int) -> dict[str, Any]:
    settings = dict(launch.settings_for(kernel, launch.architecture(device), 8 * dtype.itemsize, width))
    block = _block(width)
    settings["BLOCK_C"] = min(settings["BLOCK_C"], block)
    return {**settings, "BLOCK_D": block, "PRECISION": precision(dtype), "enable_fp_fusion": True}


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def refuse(call: Call) -> str | None:
    if call.width > WIDEST:
        return f"the codebook is {call.width} wide, the kernels hold rows of at most {WIDEST}"
    return obstacle(call.device, call.dtype)


def forward(inputs: Inputs) -> Outputs:
    features, codebook, codes, metric, k, temperature, seed, row_offset = inputs
    heads, rows, width = features.shape
    indices = features.new_zeros(heads, rows, k, dtype=torch.int64)  # in range where nothing runs, but compiles
    distances = features.new_empty(heads, rows, k, dtype=torch.float32)
    drawn, key = temperature is not None, None
    if temperature is not None:
        assert seed is not None
        assert row_offset is not None
        temperature, key = on_device(temperature, seed, row_offset, features.device)
    if metric == "distance" and not drawn:
        metric = "euclidean"  # as good as its root
    listed = drawn or k > 1
    if rows:
        constants = _constants("vq_best" if listed else "vq_forward", features.device, features.dtype, width)
        norms = features.new_empty(codes, dtype=torch.float32)
        for head in range(heads):
            if metric != "dot":
                norm_kernel[(ceil_div(codes, 32),)](
                    codebook[head], norms, codes, width, COSINE=metric == "cosine", BLOCK_K=32,
                    BLOCK_D=constants["BLOCK_D"], num_warps=4, enable_fp_fusion=True,
                )  # fmt: skip
            if listed:
                vq_best_kernel[(ceil_div(rows, constants["BLOCK_N"]),)](
                    features[head], codebook[head], norms, temperature, key, indices[head],
                    rows, codes, ceil_div(codes, 4), width, features.stride(1), k, VQ_STREAM + head * HEAD_STEP,
                    METRIC=METRICS[metric], DRAWN=drawn, TOP=triton.next_power_of_2(k), **constants,
                )  # fmt: skip
            else:
                vq_forward_kernel[(ceil_div(rows, constants["BLOCK_N"]),)](
                    features[head], codebook[head], norms, indices[head], distances[head],
                    rows, codes, width, features.stride(1), METRIC=METRICS[metric], **constants,
                )  # fmt: skip
    # In the kernel, the store of these rows would make it spill.
    first = torch.arange(0, heads * codes, codes, device=indices.device)[:, None, None]
    nearest = torch.nn.functional.embedding(indices + first, codebook.view(-1, width))
    if listed:
        distances = (features[:, :, None].float() - nearest.float()).square().sum(-1)
    return Outputs(nearest, distances, indices)


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    """See the top of the file."""
    features, nearest, indices, codes = kept
    assert grads.squared_distance is not None
    heads, rows, width = features.shape
    k = indices.shape[2]
    if k > 1 or not needs.codebook:
        share = 2 * grads.squared_distance[..., None] * (features[:, :, None].float() - nearest.float())
        dfeatures, dcodebook = share.sum(2).to(features.dtype), None
        if needs.codebook:
            places = zip(-share.view(heads, -1, width), indices.view(heads, -1), strict=True)
            dcodebook = torch.stack([sum_rows(*head, codes)[1] for head in places]).to(features.dtype)
        return dfeatures, dcodebook
    dfeatures = features.new_empty(heads, rows, width)
    dcodebook = features.new_zeros(heads, codes, width, dtype=torch.float32)
    for head in range(heads):
        sorted_codes, order = torch.sort(indices[head, :, 0], stable=True)
        _add_runs(
            grads.squared_distance[head], features[head], nearest[head], sorted_codes, order, dfeatures[head],
            dcodebook[head], False,
        )  # fmt: skip
    return dfeatures, dcodebook.to(features.dtype)


def sum_rows(features: torch.Tensor, indices: torch.Tensor, codes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of features [N, D] chose each code, and their sums, float32 [K], [K, D]; indices [N], -1 for none."""
    # Rows that do not count are sorted behind the others, as a code that is cut off.
    sorted_codes, order = torch.sort(torch.where(indices < 0, codes, indices), stable=True)
    starts = torch.searchsorted(sorted_codes, torch.arange(codes + 1, device=indices.device))
    sums = features.new_zeros(codes + 1, features.shape[1], dtype=torch.float32)
    _add_runs(sums, features, features, sorted_codes, order, features, sums, True)
    return starts.diff().float(), sums[:-1]


def _add_runs(
    grads: torch.Tensor,
    features: torch.Tensor,
    nearest: torch.Tensor,
    sorted_codes: torch.Tensor,
    order: torch.Tensor,
    dfeatures: torch.Tensor,
    dcodebook: torch.Tensor,
    sums: bool,
) -> None:
    rows, width = features.shape
    if not rows:
        return
    chunks, block = ceil_div(rows, CHUNK), _block(width)
    heads = features.new_empty(chunks, width, dtype=torch.float32)
    vq_backward_kernel[(chunks,)](
        grads, features, nearest, sorted_codes, order, dfeatures, dcodebook, heads, rows, width, features.stride(0),
        SUMS=sums, CHUNK=CHUNK, BLOCK_D=block, num_warps=max(8 if sums else 4, block // 32), enable_fp_fusion=True,
    )  # fmt: skip
    vq_heads_kernel[(chunks,)](
        sorted_codes, heads, dcodebook, rows, width, CHUNK=CHUNK, HEADS=HEADS, BLOCK_D=block, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
