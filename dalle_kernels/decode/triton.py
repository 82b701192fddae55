"""One decoding step in Triton: writes the new key and value into the rolling cache, then attends to the visible slots.

The slots that position i sees, prefix[i] leading ones and then its list, are numbered 0 .. n - 1 and shared out among
`splits` programs a head. Position, and with it n, is read from memory, so that one CUDA graph serves every step. No
program waits for the write: each takes the new row from k and v themselves wherever it meets the slot they belong in.
Where a prompt is shared, its visible slots are numbered before the row's own, and read for each row anew. Query heads
that see one head of keys write its slot alike, each its own program. Eight-bit keys and values are multiplied by their
scales once a key: the score by one, the weight by the other.
With one split a program ends with the output; with more, each leaves its maximum, sum and weighted values, and
`decode_combine` adds them in ascending order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dalle_kernels.backends import launch
from dalle_kernels.backends.contract import Call
from dalle_kernels.backends.triton_common import ceil_div, obstacle, steepness, tanh
from dalle_kernels.decode import eight_bit
from dalle_kernels.decode.contract import Inputs, Outputs, one_by_one
from dalle_kernels.device import remembered
from dalle_kernels.patterns.decode_table import DecodeTable, decode_table_for
from dalle_kernels.patterns.patterns import Pattern

WIDEST = 256  # head dimension
NOTHING = tl.constexpr(-1e30)  # the largest exponent where all is padding
MOST = tl.constexpr(eight_bit.MOST)
LEAST_SCALE = tl.constexpr(eight_bit.LEAST_SCALE)
ROUNDING = tl.constexpr(1.5 * 2**23)  # added and taken away, it leaves whole numbers, to nearest even


def refuse(call: Call) -> str | None:
    if call.width > WIDEST:
        return f"head dimension {call.width} is more than {WIDEST}"
    return obstacle(call.device, call.dtype)


@triton.jit
def quantized(row):
    """`eight_bit.quantize` of a float32 row: whole numbers in float32, and their scale [1]."""
    strange = tl.max((row != row).to(tl.int32), 0) > 0  # maxima drop NaN
    scale = tl.div_rn(tl.max(tl.abs(row), 0), MOST * 1.0)
    scale = tl.where(scale < LEAST_SCALE, 0.0, scale)
    scale = tl.where(strange | (scale == float("inf")), float("nan"), scale)
    steps = tl.div_rn(row, tl.where(scale > 0.0, scale, 1.0))
    return tl.where(scale > 0.0, (steps + ROUNDING) - ROUNDING, 0.0), scale


@triton.jit
def decode_forward(
    Q, K, V, Keys, Values, Out, Partial, position, slot_of, prefix, offsets, slots,
    SharedKeys, SharedValues, shared_prefix, shared_offsets, shared_slots, Hidden, SharedHidden, Scales, SharedScales,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_ob, stride_oh,
    stride_keys_b, stride_keys_h, stride_keys_s, stride_values_b, stride_values_h, stride_values_s,
    HEADS, GROUP, LENGTH, COPIES, SHARED_LENGTH, exponent_scale, steepness,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, BY_ROW: tl.constexpr,
    SHARED: tl.constexpr, PADDED: tl.constexpr, CAPPED: tl.constexpr, EIGHT_BIT: tl.constexpr,
):  # fmt: skip
    """Q, Out [B, H, 1, D]; K, V [B, H / GROUP, 1, D]; Keys, Values [B, H / GROUP, L, D]; Partial fp32
    [B H, SPLITS, BLOCK_D + 2].

    With SHARED, SharedKeys and SharedValues [B / COPIES, H / GROUP, M, D], contiguous; with PADDED, Hidden int8 [B, L]
    and, with both, SharedHidden [B / COPIES, M]. With EIGHT_BIT keys and values are int8, and Scales fp32
    [B, H / GROUP, L, 2], SharedScales [B / COPIES, H / GROUP, M, 2] theirs. L is LENGTH, M SHARED_LENGTH. `position` is
    one number, with BY_ROW [B].

    Grid: (B H, SPLITS). A row of Partial: the values' weighted sum, then the sum of weights and their largest exponent.
    """
    head = tl.program_id(0)
    split = tl.program_id(1)
    batch = (head // HEADS).to(tl.int64)
    head_in_batch = (head % HEADS).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    q = tl.load(Q + batch * stride_qb + head_in_batch * stride_qh + column, mask=inside, other=0.0).to(tl.float32)
    own_head = head_in_batch // GROUP
    new_key = tl.load(K + batch * stride_kb + own_head * stride_kh + column, mask=inside, other=0.0).to(tl.float32)
    new_value = tl.load(V + batch * stride_vb + own_head * stride_vh + column, mask=inside, other=0.0).to(tl.float32)
    Keys += batch * stride_keys_b + own_head * stride_keys_h
    Values += batch * stride_values_b + own_head * stride_values_h
    if EIGHT_BIT:
        new_key, new_key_scale = quantized(new_key)
        new_value, new_value_scale = quantized(new_value)
        Scales += (batch * (HEADS // GROUP) + own_head) * LENGTH * 2

    if BY_ROW:
        position += batch
    here = tl.load(position)
    own_slot = tl.load(slot_of + here).to(tl.int64)
    if split == 0:
        tl.store(Keys + own_slot * stride_keys_s + column, new_key.to(Keys.dtype.element_ty), mask=inside)
        tl.store(Values + own_slot * stride_values_s + column, new_value.to(Values.dtype.element_ty), mask=inside)
        if EIGHT_BIT:
            tl.store(Scales + own_slot * 2, new_key_scale)
            tl.store(Scales + own_slot * 2 + 1, new_value_scale)
        if PADDED:  # what is new is not padding; nobody else looks at its slot
            tl.store(Hidden + batch * LENGTH + own_slot, tl.zeros([], tl.int8), mask=head_in_batch == 0)

    leading = tl.load(prefix + here)
    listed_from = tl.load(offsets + here)
    count = leading + (tl.load(offsets + here + 1) - listed_from).to(tl.int32)
    before = 0
    if SHARED:
        prompt = batch // COPIES
        shared_leading = tl.load(shared_prefix + here)
        shared_from = tl.load(shared_offsets + here)
        before = shared_leading + (tl.load(shared_offsets + here + 1) - shared_from).to(tl.int32)
        count += before
        prompt_head = prompt * (HEADS // GROUP) + own_head
        SharedKeys += prompt_head * SHARED_LENGTH * D
        SharedValues += prompt_head * SHARED_LENGTH * D
        if EIGHT_BIT:
            SharedScales += prompt_head * SHARED_LENGTH * 2
    share = tl.cdiv(tl.cdiv(count, SPLITS), KEYS) * KEYS
    start = split * share
    stop = tl.minimum(start + share, count)

    maximum = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    accumulator = tl.zeros([BLOCK_D], tl.float32)
    for first in range(start, stop, KEYS):
        number = first + tl.arange(0, KEYS)
        exists = number < stop
        mine = exists
        if SHARED:
            mine = exists & (number >= before)
            shared = exists & (number < before)
            shared_listed = tl.load(
                shared_slots + shared_from + number - shared_leading, mask=shared & (number >= shared_leading), other=0
            )
            shared_slot = tl.where(number < shared_leading, number, shared_listed).to(tl.int64)
            number -= before
        listed = tl.load(slots + listed_from + number - leading, mask=mine & (number >= leading), other=0)
        slot = tl.where(number < leading, number, listed).to(tl.int64)
        own = slot == own_slot
        keep = mine[:, None] & inside[None, :]
        k = tl.load(Keys + slot[:, None] * stride_keys_s + column[None, :], mask=keep, other=0.0)
        v = tl.load(Values + slot[:, None] * stride_values_s + column[None, :], mask=keep, other=0.0)
        k = tl.where(own[:, None], new_key[None, :], k.to(tl.float32))
        v = tl.where((own & mine)[:, None], new_value[None, :], v.to(tl.float32))
        if EIGHT_BIT:
            key_scale = tl.where(own, new_key_scale, tl.load(Scales + slot * 2, mask=mine, other=0.0))
            value_scale = tl.load(Scales + slot * 2 + 1, mask=mine, other=0.0)
            value_scale = tl.where(own & mine, new_value_scale, value_scale)
        seen = exists
        if PADDED:
            hidden = tl.load(Hidden + batch * LENGTH + slot, mask=mine & (slot != own_slot), other=0) != 0
            seen = exists & ~hidden
        if SHARED:
            keep = shared[:, None] & inside[None, :]
            row = shared_slot[:, None] * D + column[None, :]
            shared_k = tl.load(SharedKeys + row, mask=keep, other=0.0).to(tl.float32)
            shared_v = tl.load(SharedValues + row, mask=keep, other=0.0).to(tl.float32)
            k = tl.where(shared[:, None], shared_k, k)
            v = tl.where(shared[:, None], shared_v, v)
            if EIGHT_BIT:
                scale = SharedScales + shared_slot * 2
                key_scale = tl.where(shared, tl.load(scale, mask=shared, other=0.0), key_scale)
                value_scale = tl.where(shared, tl.load(scale + 1, mask=shared, other=0.0), value_scale)
            if PADDED:
                hidden = tl.load(SharedHidden + prompt * SHARED_LENGTH + shared_slot, mask=shared, other=0) != 0
                seen = seen & ~hidden
        score = tl.sum(k * q[None, :], 1)
        if EIGHT_BIT:
            score *= key_scale
        if CAPPED:
            score = tanh(score * steepness)
        score = tl.where(seen, score * exponent_scale, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(score, 0))
        if PADDED:
            v = tl.where(seen[:, None], v, 0.0)
            new_maximum = tl.maximum(new_maximum, NOTHING)
        weight = tl.exp2(score - new_maximum)
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(weight, 0)
        if EIGHT_BIT:
            weight *= tl.where(seen, value_scale, 0.0)  # that of padding may be NaN
        accumulator = accumulator * decay + tl.sum(weight[:, None] * v, 0)
        maximum = new_maximum

    # A query that sees no key gets zeros: 0 / 1 here, and in `decode_combine` nothing but finite exponents.
    if PADDED:
        maximum = tl.maximum(maximum, NOTHING)
    else:
        total = tl.where(count == 0, 1.0, total)
        maximum = tl.where(count == 0, 0.0, maximum)
    if SPLITS == 1:
        if PADDED:
            total = tl.where(total == 0.0, 1.0, total)
        out = (accumulator / total).to(Out.dtype.element_ty)
        tl.store(Out + batch * stride_ob + head_in_batch * stride_oh + column, out, mask=inside)
    else:
        Partial += (head.to(tl.int64) * SPLITS + split) * (BLOCK_D + 2)
        tl.store(Partial + column, accumulator)
        tl.store(Partial + BLOCK_D + tl.arange(0, 1), total)
        tl.store(Partial + BLOCK_D + 1 + tl.arange(0, 1), maximum)


@triton.jit
def decode_combine(
    Partial, Out, stride_ob, stride_oh, HEADS,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Adds a head's splits in ascending order; grid (B H,). The largest exponent is -inf only in a later, empty one."""
    head = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    Partial += head.to(tl.int64) * SPLITS * (BLOCK_D + 2)
    accumulator = tl.load(Partial + column)
    total = tl.load(Partial + BLOCK_D)
    maximum = tl.load(Partial + BLOCK_D + 1)
    for split in tl.static_range(1, SPLITS):
        row = Partial + split * (BLOCK_D + 2)
        its_maximum = tl.load(row + BLOCK_D + 1)
        new_maximum = tl.maximum(maximum, its_maximum)
        decay = tl.exp2(maximum - new_maximum)
        its_decay = tl.exp2(its_maximum - new_maximum)
        accumulator = accumulator * decay + tl.load(row + column) * its_decay
        total = total * decay + tl.load(row + BLOCK_D) * its_decay
        maximum = new_maximum
    if PADDED:
        total = tl.where(total == 0.0, 1.0, total)
    Out += (head // HEADS).to(tl.int64) * stride_ob + (head % HEADS).to(tl.int64) * stride_oh
    tl.store(Out + column, (accumulator / total).to(Out.dtype.element_ty), mask=column < D)


class Launch(NamedTuple):
    """What a step needs besides its tensors: found once per pattern, device, dtype of the cache, width and heads."""

    table: DecodeTable
    splits: int
    block: int
    constants: dict[str, object]


@remembered(maxsize=256)
def launch_for(
    pattern: Pattern,
    device: torch.device | str,
    dtype: torch.dtype,
    width: int,
    heads: int,
    prompt: int = 0,
    rewind: int = 0,
) -> Launch:
    settings = dict(launch.settings_for("decode_forward", launch.architecture(device), 8 * dtype.itemsize, width))
    table = decode_table_for(pattern, device, prompt, rewind)
    # Read off the table on the CPU: for the device's, the host would have to wait.
    here = decode_table_for(pattern, "cpu", prompt, rewind)
    longest = sum(int(part.prefix.max()) + part.max_list for part in (here, here.shared) if part is not None)
    # Enough programs to fill the GPU, each with at least one tile of keys at the last, longest step.
    wanted = ceil_div(settings.pop("programs"), heads)
    splits = max(1, min(wanted, ceil_div(longest, settings["KEYS"])))
    block = max(16, triton.next_power_of_2(width))
    return Launch(table, splits, block, {"D": width, "BLOCK_D": block, "SPLITS": splits, **settings})


def forward(inputs: Inputs) -> Outputs:
    """A launch a token. A position tensor is read on the device, and not checked."""
    return one_by_one(_step, inputs)


def _step(inputs: Inputs) -> torch.Tensor:
    q, k, v, keys, values, position, pattern, _, softcap = inputs[:9]
    position = torch.as_tensor(position, dtype=torch.int64, device=q.device)
    batch, heads, _, width = q.shape
    its = launch_for(pattern, q.device, keys.dtype, width, batch * heads, inputs.prompt, inputs.rewind)
    out = torch.empty_like(q)
    # With one split no partial result is written, and any tensor stands for them.
    partial = out
    if its.splits > 1:
        partial = torch.empty((batch * heads, its.splits, its.block + 2), dtype=torch.float32, device=q.device)
    table, hidden, shared_hidden = its.table, inputs.hidden, inputs.shared_hidden
    lists: tuple[torch.Tensor | None, ...] = (None, None, None)
    copies, shared_length = inputs.copies, 0
    if table.shared is not None:
        lists = table.shared.prefix, table.shared.offsets, table.shared.slots
        shared_length = table.shared.cache_length
    padded = hidden is not None or shared_hidden is not None
    if padded and hidden is None:
        hidden = torch.zeros(keys.shape[::2], dtype=torch.bool, device=q.device)
    if padded and shared_length and shared_hidden is None:
        shared_hidden = torch.zeros((batch // copies, shared_length), dtype=torch.bool, device=q.device)
    scale = inputs.factor
    height = scale if softcap is None else softcap
    decode_forward[(batch * heads, its.splits)](
        q, k, v, keys, values, out, partial, position, table.slot, table.prefix, table.offsets, table.slots,
        inputs.shared_keys, inputs.shared_values, *lists,
        *(None if mask is None else mask.view(torch.int8) for mask in (hidden, shared_hidden)),
        inputs.scales, inputs.shared_scales,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], *keys.stride()[:3], *values.stride()[:3],
        heads, heads // keys.shape[1], keys.shape[2], copies, shared_length,
        height * math.log2(math.e), steepness(scale, softcap),
        BY_ROW=position.dim() > 0, SHARED=shared_length > 0, PADDED=padded, CAPPED=softcap is not None,
        EIGHT_BIT=inputs.scales is not None, enable_fp_fusion=True, **its.constants,
    )  # fmt: skip
    if its.splits > 1:
        decode_combine[(batch * heads,)](
            partial, out, *out.stride()[:2], heads,
            D=width, BLOCK_D=its.block, SPLITS=its.splits, PADDED=padded, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return out
