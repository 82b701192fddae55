"""Forward of sparse attention in Triton: online softmax (Milakov and Gimelshein 2018; Dao et al. 2022) over a schedule.

One program owns a tile of queries of one head and walks the tile's list of key tiles: first those of which every pair
is visible, AT_ONCE a step, in a loop without a trace of masking, then the others, under one bit mask each. With
s = q . k and c = scale * log2 e, it keeps per row

    m = max c s,    l = sum 2^(c s - m),    acc = sum 2^(c s - m) v

(under a soft cap s = tanh(q . k scale / softcap) and c = softcap * log2 e)
and ends with out = acc / l and the natural log-sum-exp (m + log2 l) ln 2. The pattern's name is nowhere: tokens are
found through `order`, so a column of the image is as close as a row.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dalle_kernels.attention.contract import Inputs, Outputs, rows_of
from dalle_kernels.backends import launch
from dalle_kernels.backends.triton_common import ceil_div, dot, precision, steepness, tanh
from dalle_kernels.device import remembered
from dalle_kernels.patterns.patterns import Pattern
from dalle_kernels.patterns.schedule import Schedule, schedule_for

WIDEST = 128  # head dimension; wider accumulators would spill
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def tokens_of(order, tile, SIZE: tl.constexpr, LENGTH, WHOLE: tl.constexpr):
    """Tokens [SIZE] at a tile's positions, and which of them exist.

    Those past the end read as the last, whose row is of the tile: all can be loaded without a mask, which would take
    registers in every step, and nothing but what the tile has anyway is multiplied.
    """
    positions = tile * SIZE + tl.arange(0, SIZE)
    if WHOLE:
        return tl.load(order + positions), positions < LENGTH
    return tl.load(order + tl.minimum(positions, LENGTH - 1)), positions < LENGTH


@triton.jit
def tokens_of_step(entry, there, order, SIZE: tl.constexpr, LENGTH, WHOLE: tl.constexpr, AT_ONCE: tl.constexpr):
    """Tokens of the AT_ONCE tiles (two are WHOLE) of a list from `entry` on; of tile 0 where it is not `there`."""
    tile = tl.load(entry, mask=there, other=0)
    if AT_ONCE == 1:
        tokens, _ = tokens_of(order, tile, SIZE, LENGTH, WHOLE)
    else:
        # Loaded apart and joined: as one they would pass through shared memory to the threads that load their rows.
        second = tl.load(entry + 1, mask=there, other=0)
        places = order + tl.arange(0, SIZE)
        both = tl.join(tl.load(places + tile * SIZE), tl.load(places + second * SIZE))
        tokens = tl.reshape(tl.permute(both, (1, 0)), (2 * SIZE,))
    return tokens


@triton.jit
def end_of_full(start, full, AT_ONCE: tl.constexpr):
    """Where a walk over `full` full tiles from `start` on ends, AT_ONCE a step; the rest is left to the masked walk."""
    return start + (full if AT_ONCE == 1 else full // AT_ONCE * AT_ONCE)


@triton.jit
def load_rows(base, rows, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, FAR: tl.constexpr = True):
    """Rows [len(rows), BLOCK_D] of a [S, D] matrix; columns past D read as 0.

    FAR: offsets take 64 bits, which costs a loop twice the instructions for its pointers (see `far`).
    """
    columns = tl.arange(0, BLOCK_D)
    if FAR:
        rows = rows.to(tl.int64)
    pointers = base + rows[:, None] * stride + columns[None, :]
    if D == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=columns[None, :] < D, other=0.0)


@triton.jit
def store_rows(base, rows, exists, stride, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The opposite of `load_rows`; rows that do not exist, and columns past D, are not written."""
    columns = tl.arange(0, BLOCK_D)
    keep = exists[:, None] & (columns[None, :] < D)
    tl.store(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], value.to(base.dtype.element_ty), mask=keep)


@triton.jit
def visible(masks, mask_id, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile's bit mask, unpacked to bool [ROWS, COLUMNS].

    A row's words are loaded as vectors over the rows and picked by column, which costs two instructions an element and
    no shared memory; loading the words as a [ROWS, COLUMNS] matrix would move it between register layouts.
    """
    WORDS: tl.constexpr = COLUMNS // 32
    words = masks + (mask_id * ROWS + tl.arange(0, ROWS)) * WORDS
    column = tl.arange(0, COLUMNS)[None, :]
    word = tl.load(words)[:, None]
    for index in tl.static_range(1, WORDS):
        word = tl.where(column < 32 * index, word, tl.load(words + index)[:, None])
    # In two steps: a lane's columns differ in the bits of 6 by lane alone, so its other shifts are constants.
    return ((word >> (column & 6) >> (column & 25)) & 1) != 0


@triton.jit
def head_and_item(heads_in_all, items, GROUP: tl.constexpr):
    """Which head (of the whole batch) and which of its `items` this program owns.

    Programs start in the order of their number, so a group of GROUP heads is worked on at a time: few enough that what
    one program read is still in L2 when its siblings want it. Within a group the first item of every head comes first.
    """
    program = tl.program_id(0)
    first = program // (GROUP * items) * GROUP
    members = tl.minimum(heads_in_all - first, GROUP)
    within = program - first * items
    return first + within % members, within // members


@triton.jit
def _accumulate(
    q, maximum, total, accumulator, K, V, padding, order, key_tiles, mask_ids, masks, start, stop, LENGTH,
    stride_k, stride_v, stride_p, exponent_scale, rise,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, PADDED: tl.constexpr, WHOLE: tl.constexpr, FAR: tl.constexpr, CAPPED: tl.constexpr,
    AT_ONCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The key tiles start .. stop - 1 of the list, AT_ONCE a step, added to the running maximum, sum and output."""
    # Where the next tile's rows lie is found a step ahead, so that its loads wait for no other and can be pipelined.
    rows = tokens_of_step(key_tiles + start, start < stop, order, KEYS, LENGTH, WHOLE, AT_ONCE)
    for entry in range(start, stop, AT_ONCE):
        next_entry, is_there = key_tiles + entry + AT_ONCE, entry + AT_ONCE < stop
        next_rows = tokens_of_step(next_entry, is_there, order, KEYS, LENGTH, WHOLE, AT_ONCE)
        k = load_rows(K, rows, stride_k, D, BLOCK_D, FAR)
        score = dot(q, tl.trans(k), tl.zeros([QUERIES, AT_ONCE * KEYS], tl.float32), PRECISION)
        if CAPPED:
            score = tanh(score * rise)
        if MASKED:
            score = tl.where(visible(masks, tl.load(mask_ids + entry), QUERIES, KEYS), score, float("-inf"))
        if PADDED:
            ignored = tl.load(padding + rows.to(tl.int64) * stride_p)
            score = tl.where((ignored == 0)[None, :], score, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(score, 1) * exponent_scale)
        # Where a row has seen no key yet its maximum is -inf, and any finite number in its place gives 2^-inf = 0.
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum) if MASKED or PADDED else new_maximum
        weight = tl.exp2(score * exponent_scale - shift[:, None])
        decay = tl.exp2(maximum - shift)
        v = load_rows(V, rows, stride_v, D, BLOCK_D, FAR)
        total = total * decay + tl.sum(weight, 1)
        accumulator = dot(weight.to(v.dtype), v, accumulator * decay[:, None], PRECISION)
        maximum = new_maximum
        rows = next_rows
    return maximum, total, accumulator


@triton.jit
def attention_forward(
    Q, K, V, Out, Lse, padding, order, query_order, key_offsets, key_tiles, mask_ids, full_counts, masks,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os, stride_pb, stride_ps,
    HEADS, HEADS_IN_ALL, LENGTH, QUERY_LENGTH, exponent_scale, rise,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    PADDED: tl.constexpr, WHOLE: tl.constexpr, FAR: tl.constexpr, NEGATED: tl.constexpr, CAPPED: tl.constexpr,
    SHORT: tl.constexpr, AT_ONCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Q, Out [B, H, L, D]; K, V [B, H, S, D]; Lse fp32 [B, H, L]; padding uint8 [B, S], read if PADDED.

    S is LENGTH, and L too unless SHORT. Grid: (B H query tiles,).
    """
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
    if NEGATED:
        q = (-q.to(tl.float32)).to(q.dtype)  # the interpreter has no arithmetic of bfloat16
    maximum = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    accumulator = tl.zeros([QUERIES, BLOCK_D], tl.float32)

    start = tl.load(key_offsets + tile)
    stop = tl.load(key_offsets + tile + 1)
    masked_from = end_of_full(start, tl.load(full_counts + tile), AT_ONCE)
    maximum, total, accumulator = _accumulate(
        q, maximum, total, accumulator, K, V, padding, order, key_tiles, mask_ids, masks, start, masked_from, LENGTH,
        stride_ks, stride_vs, stride_ps, exponent_scale, rise,
        D, BLOCK_D, QUERIES, KEYS, False, PADDED, True, FAR, CAPPED, AT_ONCE, PRECISION,
    )  # fmt: skip
    maximum, total, accumulator = _accumulate(
        q, maximum, total, accumulator, K, V, padding, order, key_tiles, mask_ids, masks, masked_from, stop, LENGTH,
        stride_ks, stride_vs, stride_ps, exponent_scale, rise,
        D, BLOCK_D, QUERIES, KEYS, True, PADDED, WHOLE, FAR, CAPPED, 1, PRECISION,
    )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)  # a row that sees no key: out 0, lse -inf, which its maximum is
    out = accumulator / total[:, None]
    store_rows(Out + batch * stride_ob + head_in_batch * stride_oh, rows, exists, stride_os, out, D, BLOCK_D)
    lse = (maximum + tl.log2(total)) * LN_2
    tl.store(Lse + head.to(tl.int64) * own_length + rows, lse, mask=exists)


class Launch(NamedTuple):
    """What a launch needs besides its tensors: found once per pattern, length, device, element size and width."""

    schedule: Schedule
    constants: dict[str, object]  # compile-time arguments and launch options, as the kernel's keywords


@remembered(maxsize=256)
def launch_for(
    kernel: str,
    pattern: Pattern,
    length: int,
    device: torch.device | str,
    dtype: torch.dtype,
    width: int,
    rows: tuple[int, int] | None = None,
) -> Launch:
    """The schedule and settings of `kernel` for one kind of call, remembered; `rows` as in `contract.rows_of`."""
    settings = launch.settings_for(kernel, launch.architecture(device), 8 * dtype.itemsize, width)
    tile = settings["query_tile"], settings["key_tile"]
    group, warps, stages = (settings[name] for name in ("heads_at_once", "num_warps", "num_stages"))
    queries = length if rows is None else rows[1] - rows[0]
    constants: dict[str, object] = {
        "D": width,
        "BLOCK_D": max(16, triton.next_power_of_2(width)),
        "QUERIES": tile[0],
        "KEYS": tile[1],
        "GROUP": group,
        "WHOLE": queries % tile[0] == 0 and length % tile[1] == 0,
        "SHORT": rows is not None,
        "PRECISION": settings.get("precision", precision(dtype)),
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": True,
    }
    if kernel != "attention_backward_keys":  # whose sums leave no registers for a second tile
        constants["AT_ONCE"] = settings.get("full_tiles_at_once", 1)
    if "maxnreg" in settings:  # without it ptxas may keep to fewer registers than the block has, and spill
        constants["maxnreg"] = settings["maxnreg"]
    if queries >= max(tile):
        return Launch(schedule_for(pattern, tile, length, device, rows), constants)
    # Walks over full tiles look at the tokens of tile 0 without a mask, though there be no full tile to walk over.
    schedule = schedule_for(pattern, tile, length, queries=rows)
    order, query_order = (
        torch.nn.functional.pad(tokens, (0, max(max(tile) - len(tokens), 0)))
        for tokens in (schedule.order, schedule.query_order)
    )
    return Launch(replace(schedule, order=order, query_order=query_order).to(device), constants)


def exponent_scale(scale: float, softcap: float | None) -> tuple[float, float, bool]:
    """(c, rise, negated): the kernels compute 2^(c s) for s = +-q . k, with c > 0, so that the largest c s is c max s.

    Under a soft cap s is tanh(+-rise q . k). Scale 0 becomes a c so small that 2^(c s) is 1 all the same, while c times
    -inf stays -inf.
    """
    height = abs(scale) if softcap is None else softcap
    return max(height * math.log2(math.e), 1e-30), steepness(abs(scale), softcap), scale < 0


def far(*tensors: torch.Tensor) -> bool:
    """Whether elements of one head [S, D] of one of these tensors lie 2^31 or more elements apart."""
    return any((each.shape[2] - 1) * each.stride(2) + each.shape[3] > 2**31 for each in tensors)


def forward(inputs: Inputs) -> Outputs:
    """Output [B, H, L, D] with q's dtype and strides, and natural log-sum-exp fp32 [B, H, L]."""
    q, k, v, key_padding_mask, scale, pattern, softcap, _ = inputs
    assert scale is not None
    batch, heads, queries, width = q.shape
    length = k.shape[2]
    out = torch.empty_like(q)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    its = launch_for("attention_forward", pattern, length, q.device, q.dtype, width, rows_of(inputs))
    schedule, constants = its.schedule, its.constants
    if key_padding_mask is not None and launch.architecture(q.device) // 10 == 8:
        constants = {**constants, "AT_ONCE": 1}  # Triton 3.6 spills over the padding of two tiles
    power, rise, negated = exponent_scale(scale, softcap)
    padding, padding_strides = padding_bytes(key_padding_mask, q)
    tiles = ceil_div(queries, schedule.tile[0])
    attention_forward[(batch * heads * tiles,)](
        q, k, v, out, lse, padding,
        schedule.order, schedule.query_order, schedule.key_offsets, schedule.key_tiles, schedule.mask_ids,
        schedule.full_counts, schedule.masks,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *padding_strides,
        heads, batch * heads, length, queries, power, rise,
        PADDED=key_padding_mask is not None, FAR=far(k, v), NEGATED=negated, CAPPED=softcap is not None,
        **constants,
    )  # fmt: skip
    return Outputs(out, lse)


def padding_bytes(key_padding_mask: torch.Tensor | None, q: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """The mask as bytes with its strides; where there is none, any tensor does: the kernels never read it."""
    if key_padding_mask is None:
        return q, (0, 0)
    return key_padding_mask.view(torch.uint8), (key_padding_mask.stride(0), key_padding_mask.stride(1))
