"""Backward of sparse attention in Triton: two passes without atomics, so that gradients are the same bits every time.

With p = 2^(c s - lse log2 e) computed again from s = q . k, c = scale * log2 e, and

    delta = rowsum(dO O) - dLSE,    dp = dO v^T,    ds = p (dp - delta):
    dv = p^T dO,    dk = scale ds^T q,    dq = scale ds k.

Under a soft cap s = tanh(q . k scale / softcap), c = softcap * log2 e, and ds is also multiplied by 1 - s^2.

One pass owns tiles of keys and walks the transposed lists for dk and dv; the other owns tiles of queries and walks the
forward lists for dq. Each computes p and dp for itself: two products more than one pass with atomics would need. A pass
of whose gradients none is asked for is not made, and the pass over keys leaves out what only a gradient that is not
asked for needs: dp and ds are dk's alone.

Every image query visits the text's key tiles, whose lists are many times longer than the others. Where that would leave
a few programs running alone at the end, `Work` cuts long lists into pieces; the pieces of a tile leave partial sums in
fp32, and a third kernel adds them in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import triton
import triton.language as tl

from dalle_kernels.attention.contract import Grads, Kept, Needs, rows_of
from dalle_kernels.attention.triton_forward import (
    end_of_full,
    exponent_scale,
    far,
    head_and_item,
    launch_for,
    load_rows,
    padding_bytes,
    store_rows,
    tokens_of,
    tokens_of_step,
    visible,
)
from dalle_kernels.backends import launch
from dalle_kernels.backends.triton_common import ceil_div, dot, tanh
from dalle_kernels.device import OnDevice, remembered
from dalle_kernels.patterns.patterns import Pattern
from dalle_kernels.patterns.schedule import Schedule, schedule_for

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def load_existing_rows(base, rows, exists, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`load_rows` with zeros for those that do not exist."""
    columns = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if D == BLOCK_D:
        return tl.load(pointers, mask=exists[:, None], other=0.0)
    return tl.load(pointers, mask=exists[:, None] & (columns[None, :] < D), other=0.0)


@triton.jit
def made(product, WGMMA: tl.constexpr):
    """`product`, which under WGMMA the step that makes it waits for.

    A sum that only the next step's product takes is left under way, as Triton sees that wgmma allows it; where the loop
    may have no step at all ptxas then makes every wgmma wait for the one before (its remark C7515). This selection
    looks like a use, and costs nothing: LLVM knows that no column lies below 0. Triton's passes for tcgen05 fail on it.
    """
    if WGMMA:
        return tl.where(tl.arange(0, product.shape[1])[None, :] >= 0, product, 0.0)
    return product


@triton.jit
def attention_statistics(
    Out, Grad, Lse, GradLse, Power, Delta,
    stride_ob, stride_oh, stride_os, stride_gb, stride_gh, stride_gs, stride_lb, stride_lh, stride_ls,
    HEADS, LENGTH,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """Fp32 [B, H, S]: with DELTA, Delta = rowsum(Grad Out) - GradLse; Power = Lse log2 e, or inf where a row sees no
    key, so that every weight is 0. Grid (B H, tiles of ROWS tokens)."""
    head = tl.program_id(0)
    batch = (head // HEADS).to(tl.int64)
    head_in_batch = (head % HEADS).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    exists = rows < LENGTH
    if DELTA:
        Out += batch * stride_ob + head_in_batch * stride_oh
        out = load_existing_rows(Out, rows, exists, stride_os, D, BLOCK_D)
        Grad += batch * stride_gb + head_in_batch * stride_gh
        grad = load_existing_rows(Grad, rows, exists, stride_gs, D, BLOCK_D)
        delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
        if HAS_GRAD_LSE:
            GradLse += batch * stride_lb + head_in_batch * stride_lh
            delta -= tl.load(GradLse + rows.to(tl.int64) * stride_ls, mask=exists, other=0.0)
    places = head.to(tl.int64) * LENGTH + rows
    lse = tl.load(Lse + places, mask=exists, other=0.0)
    tl.store(Power + places, tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E), mask=exists)
    if DELTA:
        tl.store(Delta + places, delta, mask=exists)


@triton.jit
def _accumulate_keys(
    k, v, dk, dv, Q, Grad, Power, Delta, order, query_tiles, mask_ids, masks, start, stop, LENGTH,
    stride_q, stride_g, exponent_scale, rise,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, WHOLE: tl.constexpr, FAR: tl.constexpr, WGMMA: tl.constexpr, CAPPED: tl.constexpr,
    FOR_K: tl.constexpr, FOR_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The query tiles start .. stop - 1 of the transposed list, added to dk (unscaled) and dv [KEYS, BLOCK_D].

    Only the masked walk hides rows past the end, so a tile that has some is left to it. v and dk are any numbers
    without FOR_K, dv without FOR_V.
    """
    rows, _ = tokens_of(order, tl.load(query_tiles + start, mask=start < stop, other=0), QUERIES, LENGTH, WHOLE)
    for entry in range(start, stop):
        next_tile = tl.load(query_tiles + entry + 1, mask=entry + 1 < stop, other=0)
        next_rows, _ = tokens_of(order, next_tile, QUERIES, LENGTH, WHOLE)
        q = load_rows(Q, rows, stride_q, D, BLOCK_D, FAR)
        grad = load_rows(Grad, rows, stride_g, D, BLOCK_D, FAR)
        power = tl.load(Power + rows)
        if FOR_K:
            delta = tl.load(Delta + rows)
        score = dot(k, tl.trans(q), tl.zeros([KEYS, QUERIES], tl.float32), PRECISION)
        if CAPPED:
            score = tanh(score * rise)
        weight = tl.exp2(score * exponent_scale - power[None, :])
        if MASKED:
            seen = visible(masks, tl.load(mask_ids + entry), KEYS, QUERIES)
            if not WHOLE:
                existing = LENGTH - tl.load(query_tiles + entry) * QUERIES
                seen &= (tl.arange(0, QUERIES) < existing)[None, :]
            weight = tl.where(seen, weight, 0.0)
        if FOR_V:
            dv = made(dot(weight.to(grad.dtype), grad, dv, PRECISION), WGMMA)
        if FOR_K:
            if CAPPED:
                weight *= 1.0 - score * score
            dweight = dot(v, tl.trans(grad), tl.zeros([KEYS, QUERIES], tl.float32), PRECISION)
            dscore = weight * (dweight - delta[None, :])
            dk = made(dot(dscore.to(q.dtype), q, dk, PRECISION), WGMMA)
        rows = next_rows
    return dk, dv


@triton.jit
def attention_backward_keys(
    Q, K, V, Grad, Power, Delta, DK, DV, Partial, padding, order, query_order, work, query_tiles, mask_ids, masks,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gs, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
    stride_pb, stride_ps,
    HEADS, HEADS_IN_ALL, LENGTH, QUERY_LENGTH, ITEMS, SLOTS, exponent_scale, rise, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    PADDED: tl.constexpr, WHOLE: tl.constexpr, FAR: tl.constexpr, WGMMA: tl.constexpr, NEGATED: tl.constexpr,
    CAPPED: tl.constexpr, SHORT: tl.constexpr, FOR_K: tl.constexpr, FOR_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DK, DV [B, H, S, D], those of them asked for, or a piece of each in Partial fp32 [B H, SLOTS, as many, KEYS,
    BLOCK_D]. Grid: (B H ITEMS,).

    work int32 [ITEMS, 5]: key tile; first, first masked and last entry + 1 of its list; slot in Partial, or -1.
    """
    if SHORT:
        own_order, own_length = query_order, QUERY_LENGTH
    else:
        own_order, own_length = order, LENGTH
    head, item = head_and_item(HEADS_IN_ALL, ITEMS, GROUP)
    batch = (head // HEADS).to(tl.int64)
    head_in_batch = (head % HEADS).to(tl.int64)
    Q += batch * stride_qb + head_in_batch * stride_qh
    Grad += batch * stride_gb + head_in_batch * stride_gh
    Power += head.to(tl.int64) * own_length
    Delta += head.to(tl.int64) * own_length
    tile = tl.load(work + item * 5)
    start = tl.load(work + item * 5 + 1)
    masked_from = tl.load(work + item * 5 + 2)
    stop = tl.load(work + item * 5 + 3)
    slot = tl.load(work + item * 5 + 4)

    rows, exists = tokens_of(order, tile, KEYS, LENGTH, WHOLE)
    k = load_rows(K + batch * stride_kb + head_in_batch * stride_kh, rows, stride_ks, D, BLOCK_D)
    v, dk, dv = 0.0, 0.0, 0.0  # never read where a flag is off; Triton 3.6 cannot return None
    if FOR_K:
        v = load_rows(V + batch * stride_vb + head_in_batch * stride_vh, rows, stride_vs, D, BLOCK_D)
        dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    if FOR_V:
        dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
    if NEGATED:
        k = (-k.to(tl.float32)).to(k.dtype)
    dk, dv = _accumulate_keys(
        k, v, dk, dv, Q, Grad, Power, Delta, own_order, query_tiles, mask_ids, masks, start, masked_from, own_length,
        stride_qs, stride_gs, exponent_scale, rise,
        D, BLOCK_D, QUERIES, KEYS, False, True, FAR, WGMMA, CAPPED, FOR_K, FOR_V, PRECISION,
    )  # fmt: skip
    dk, dv = _accumulate_keys(
        k, v, dk, dv, Q, Grad, Power, Delta, own_order, query_tiles, mask_ids, masks, masked_from, stop, own_length,
        stride_qs, stride_gs, exponent_scale, rise,
        D, BLOCK_D, QUERIES, KEYS, True, WHOLE, FAR, WGMMA, CAPPED, FOR_K, FOR_V, PRECISION,
    )  # fmt: skip

    if FOR_K:
        dk *= scale
    if PADDED:
        # An ignored key touches no row but its own, whose weights may have overflowed: no log-sum-exp counts it.
        places = padding + batch * stride_pb + rows.to(tl.int64) * stride_ps
        ignored = (tl.load(places) != 0)[:, None]
        if FOR_K:
            dk = tl.where(ignored, 0.0, dk)
        if FOR_V:
            dv = tl.where(ignored, 0.0, dv)
    if slot < 0:
        if FOR_K:
            store_rows(DK + batch * stride_dkb + head_in_batch * stride_dkh, rows, exists, stride_dks, dk, D, BLOCK_D)
        if FOR_V:
            store_rows(DV + batch * stride_dvb + head_in_batch * stride_dvh, rows, exists, stride_dvs, dv, D, BLOCK_D)
    else:
        cell = tl.arange(0, KEYS)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        piece = Partial + (head.to(tl.int64) * SLOTS + slot) * ((FOR_K + FOR_V) * KEYS * BLOCK_D)
        if FOR_K:
            tl.store(piece + cell, dk)
        if FOR_V:
            tl.store(piece + FOR_K * KEYS * BLOCK_D + cell, dv)


@triton.jit
def attention_backward_sum(
    Partial, DK, DV, order, split_tiles, split_offsets,
    stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs, HEADS, LENGTH, SLOTS,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
    FOR_K: tl.constexpr, FOR_V: tl.constexpr,
):  # fmt: skip
    """Adds the pieces split_offsets[n] .. split_offsets[n + 1] - 1 of key tile split_tiles[n], ROWS keys a program.

    Grid: (B H, split tiles, KEYS / ROWS).
    """
    head = tl.program_id(0)
    batch = (head // HEADS).to(tl.int64)
    head_in_batch = (head % HEADS).to(tl.int64)
    first_row = tl.program_id(2) * ROWS
    positions = tl.load(split_tiles + tl.program_id(1)) * KEYS + first_row + tl.arange(0, ROWS)
    exists = positions < LENGTH
    rows = tl.load(order + positions, mask=exists, other=0)
    cell = (first_row + tl.arange(0, ROWS))[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    if FOR_K:
        dk = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if FOR_V:
        dv = tl.zeros([ROWS, BLOCK_D], tl.float32)
    start = tl.load(split_offsets + tl.program_id(1))
    stop = tl.load(split_offsets + tl.program_id(1) + 1)
    for slot in range(start, stop):
        piece = Partial + (head.to(tl.int64) * SLOTS + slot) * ((FOR_K + FOR_V) * KEYS * BLOCK_D)
        if FOR_K:
            dk += tl.load(piece + cell)
        if FOR_V:
            dv += tl.load(piece + FOR_K * KEYS * BLOCK_D + cell)
    if FOR_K:
        store_rows(DK + batch * stride_dkb + head_in_batch * stride_dkh, rows, exists, stride_dks, dk, D, BLOCK_D)
    if FOR_V:
        store_rows(DV + batch * stride_dvb + head_in_batch * stride_dvh, rows, exists, stride_dvs, dv, D, BLOCK_D)


@triton.jit
def _accumulate_queries(
    q, grad, power, delta, dq, K, V, padding, order, key_tiles, mask_ids, masks, start, stop, LENGTH,
    stride_k, stride_v, stride_p, exponent_scale, rise,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, PADDED: tl.constexpr, WHOLE: tl.constexpr, FAR: tl.constexpr, WGMMA: tl.constexpr,
    CAPPED: tl.constexpr, AT_ONCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The key tiles start .. stop - 1 of the list, AT_ONCE a step, added to dq [QUERIES, BLOCK_D] (unscaled)."""
    rows = tokens_of_step(key_tiles + start, start < stop, order, KEYS, LENGTH, WHOLE, AT_ONCE)
    for entry in range(start, stop, AT_ONCE):
        next_entry, is_there = key_tiles + entry + AT_ONCE, entry + AT_ONCE < stop
        next_rows = tokens_of_step(next_entry, is_there, order, KEYS, LENGTH, WHOLE, AT_ONCE)
        k = load_rows(K, rows, stride_k, D, BLOCK_D, FAR)
        v = load_rows(V, rows, stride_v, D, BLOCK_D, FAR)
        score = dot(q, tl.trans(k), tl.zeros([QUERIES, AT_ONCE * KEYS], tl.float32), PRECISION)
        if CAPPED:
            score = tanh(score * rise)
        weight = tl.exp2(score * exponent_scale - power[:, None])
        if CAPPED:  # here, so that no register holds the score any longer
            weight *= 1.0 - score * score
        if MASKED:
            weight = tl.where(visible(masks, tl.load(mask_ids + entry), QUERIES, KEYS), weight, 0.0)
        if PADDED:
            ignored = tl.load(padding + rows.to(tl.int64) * stride_p)
            weight = tl.where((ignored == 0)[None, :], weight, 0.0)
        dweight = dot(grad, tl.trans(v), tl.zeros([QUERIES, AT_ONCE * KEYS], tl.float32), PRECISION)
        dscore = weight * (dweight - delta[:, None])
        dq = made(dot(dscore.to(k.dtype), k, dq, PRECISION), WGMMA)
        rows = next_rows
    return dq


@triton.jit
def attention_backward_queries(
    Q, K, V, Grad, Power, Delta, DQ, padding, order, query_order, key_offsets, key_tiles, mask_ids, full_counts, masks,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gs, stride_dqb, stride_dqh, stride_dqs, stride_pb, stride_ps,
    HEADS, HEADS_IN_ALL, LENGTH, QUERY_LENGTH, exponent_scale, rise, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    PADDED: tl.constexpr, WHOLE: tl.constexpr, FAR: tl.constexpr, WGMMA: tl.constexpr, NEGATED: tl.constexpr,
    CAPPED: tl.constexpr, SHORT: tl.constexpr, AT_ONCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DQ [B, H, L, D]. Grid: (B H query tiles,)."""
    if SHORT:
        own_order, own_length = query_order, QUERY_LENGTH
    else:
        own_order, own_length = order, LENGTH
    tiles = tl.cdiv(own_length, QUERIES)
    head, item = head_and_item(HEADS_IN_ALL, tiles, GROUP)
    tile = tiles - 1 - item  # the last tiles see the most keys, so they start first
    batch = (head // HEADS).to(tl.int64)
    head_in_batch = (head % HEADS).to(tl.int64)
    K += batch * stride_kb + head_in_batch * stride_kh
    V += batch * stride_vb + head_in_batch * stride_vh
    padding += batch * stride_pb

    rows, exists = tokens_of(own_order, tile, QUERIES, own_length, WHOLE)
    q = load_rows(Q + batch * stride_qb + head_in_batch * stride_qh, rows, stride_qs, D, BLOCK_D)
    grad = load_rows(Grad + batch * stride_gb + head_in_batch * stride_gh, rows, stride_gs, D, BLOCK_D)
    first = head.to(tl.int64) * own_length
    power, delta = tl.load(Power + first + rows), tl.load(Delta + first + rows)
    if NEGATED:
        q = (-q.to(tl.float32)).to(q.dtype)
    dq = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    start = tl.load(key_offsets + tile)
    stop = tl.load(key_offsets + tile + 1)
    masked_from = end_of_full(start, tl.load(full_counts + tile), AT_ONCE)
    dq = _accumulate_queries(
        q, grad, power, delta, dq, K, V, padding, order, key_tiles, mask_ids, masks, start, masked_from, LENGTH,
        stride_ks, stride_vs, stride_ps, exponent_scale, rise,
        D, BLOCK_D, QUERIES, KEYS, False, PADDED, True, FAR, WGMMA, CAPPED, AT_ONCE, PRECISION,
    )  # fmt: skip
    dq = _accumulate_queries(
        q, grad, power, delta, dq, K, V, padding, order, key_tiles, mask_ids, masks, masked_from, stop, LENGTH,
        stride_ks, stride_vs, stride_ps, exponent_scale, rise,
        D, BLOCK_D, QUERIES, KEYS, True, PADDED, WHOLE, FAR, WGMMA, CAPPED, 1, PRECISION,
    )  # fmt: skip
    DQ += batch * stride_dqb + head_in_batch * stride_dqh
    store_rows(DQ, rows, exists, stride_dqs, dq * scale, D, BLOCK_D)


@dataclass(frozen=True, eq=False)
class Work(OnDevice):
    """The transposed lists cut into pieces, all int32 on one device.

    Attributes:
        items: [pieces, 5], longest first: key tile, first entry, first of the masked walk, last entry + 1, slot or -1.
            A query tile with rows past the end is of the masked walk, whatever its mask.
        split_tiles, split_offsets: key tiles in several pieces, and which slots each has: ascending runs.
        slots: how many slots there are.
    """

    items: torch.Tensor
    split_tiles: torch.Tensor
    split_offsets: torch.Tensor
    slots: int

    @staticmethod
    def cut(schedule: Schedule, longest: int) -> Work:
        """Pieces of at most `longest` entries of a schedule on the CPU, those of one tile of nearly equal length."""
        offsets = schedule.query_offsets.numpy()
        full = schedule.query_full_counts.numpy()
        tiles, whole = schedule.query_tiles.numpy(), len(schedule.query_order) // schedule.tile[0]
        items: list[tuple[int, int, int, int, int]] = []
        split_tiles, split_offsets = [], [0]
        for tile, (first, last) in enumerate(pairwise(offsets.tolist())):
            pieces = max(1, -(-(last - first) // longest))
            masked_from = first + int(full[tile])
            if masked_from > first and tiles[masked_from - 1] == whole:  # the last of all, cut short
                masked_from -= 1
            ends = [first + (last - first) * piece // pieces for piece in range(pieces + 1)]
            slot = split_offsets[-1] if pieces > 1 else -1
            for start, stop in pairwise(ends):
                items.append((tile, start, min(max(masked_from, start), stop), stop, slot))
                slot += pieces > 1
            if pieces > 1:
                split_tiles.append(tile)
                split_offsets.append(slot)
        items.sort(key=lambda item: item[1] - item[3])
        pieces_of, in_pieces, slots = (
            torch.from_numpy(np.array(values, np.int32)) for values in (items, split_tiles, split_offsets)
        )
        return Work(pieces_of, in_pieces, slots, split_offsets[-1])


@remembered(maxsize=256)
def work_for(
    pattern: Pattern,
    length: int,
    device: torch.device | str,
    dtype: torch.dtype,
    width: int,
    heads: int,
    rows: tuple[int, int] | None = None,
) -> Work:
    """The pieces for one kind of call: lists stay whole where there are heads enough to keep the GPU busy anyway.

    Of all programs the longest start first, so they leave no tail while they take no more than half of what each
    of the `programs` that run at a time has to do in all.
    """
    settings = launch.settings_for("attention_backward_keys", launch.architecture(device), 8 * dtype.itemsize, width)
    tile = launch_for("attention_backward_keys", pattern, length, device, dtype, width, rows).schedule.tile
    # On the CPU: to read the device's, the host would have to wait.
    schedule = schedule_for(pattern, tile, length, queries=rows)
    longest = heads * schedule.query_tiles.numel() // (2 * settings["programs"])
    return Work.cut(schedule, max(longest, settings["shortest_piece"])).to(device)


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    """Gradients (dq, dk, dv) with the strides of q, k, v, given what `forward` returned for them.

    grad_out [B, H, L, D] with its last dimension contiguous; grad_lse [B, H, L] or None where it is zero.
    """
    (grad_out, grad_lse), (q, k, v, out, lse, key_padding_mask, scale, pattern, softcap, _) = grads, kept
    assert grad_out is not None
    assert scale is not None
    if not any(needs):
        return None, None, None
    batch, heads, queries, width = q.shape
    in_all, length, rows = batch * heads, k.shape[2], rows_of(kept)
    call = (pattern, length, q.device, q.dtype, width)
    exponent, rise, negated = exponent_scale(scale, softcap)
    padding, padding_strides = padding_bytes(key_padding_mask, q)
    flags = {"PADDED": key_padding_mask is not None, "NEGATED": negated, "CAPPED": softcap is not None}
    arch = launch.architecture(q.device)
    flags["WGMMA"] = arch // 10 == 9
    block = max(16, triton.next_power_of_2(width))
    dq, dk, dv = (torch.empty_like(x) if need else None for x, need in zip((q, k, v), needs, strict=True))
    power, delta = torch.empty_like(lse), torch.empty_like(lse)
    delta_rows = 2048 // block  # 16 elements a thread

    attention_statistics[(in_all, ceil_div(queries, delta_rows))](
        out, grad_out, lse, delta if grad_lse is None else grad_lse, power, delta,
        *out.stride()[:3], *grad_out.stride()[:3], *(delta if grad_lse is None else grad_lse).stride(),
        heads, queries,
        D=width, BLOCK_D=block, ROWS=delta_rows, HAS_GRAD_LSE=grad_lse is not None, DELTA=needs.q or needs.k,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    if needs.k or needs.v:
        by_key = launch_for("attention_backward_keys", *call, rows)
        work, schedule = work_for(*call, in_all, rows), by_key.schedule
        keys, asked = schedule.tile[1], {"FOR_K": needs.k, "FOR_V": needs.v}
        # Any tensor stands for a gradient that is not asked for, and for pieces where no tile is in any.
        into_k, into_v = k if dk is None else dk, v if dv is None else dv
        partial = delta
        if work.slots:
            partial = torch.empty(
                (in_all, work.slots, needs.k + needs.v, keys, block), dtype=torch.float32, device=q.device
            )
        attention_backward_keys[(in_all * work.items.shape[0],)](
            q, k, v, grad_out, power, delta, into_k, into_v, partial, padding,
            schedule.order, schedule.query_order, work.items, schedule.query_tiles, schedule.query_mask_ids,
            schedule.masks_transposed,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3],
            *into_k.stride()[:3], *into_v.stride()[:3],
            *padding_strides, heads, in_all, length, queries, work.items.shape[0], work.slots, exponent, rise, scale,
            FAR=far(q, grad_out), **asked, **flags, **by_key.constants,
        )  # fmt: skip
        if work.slots:
            attention_backward_sum[(in_all, work.split_tiles.numel(), keys // 16)](
                partial, into_k, into_v, schedule.order, work.split_tiles, work.split_offsets,
                *into_k.stride()[:3], *into_v.stride()[:3], heads, length, work.slots,
                D=width, BLOCK_D=block, KEYS=keys, ROWS=16, **asked, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    if needs.q:
        assert dq is not None
        by_query = launch_for("attention_backward_queries", *call, rows)
        schedule = by_query.schedule
        attention_backward_queries[(in_all * ceil_div(queries, schedule.tile[0]),)](
            q, k, v, grad_out, power, delta, dq, padding,
            schedule.order, schedule.query_order, schedule.key_offsets, schedule.key_tiles, schedule.mask_ids,
            schedule.full_counts, schedule.masks,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3], *dq.stride()[:3],
            *padding_strides, heads, in_all, length, queries, exponent, rise, scale,
            FAR=far(k, v), **flags, **by_query.constants,
        )  # fmt: skip
    return dq, dk, dv
