"""Decoding on the CPU: hands the decode table and the tensors to the kernels of csrc/decode."""

from __future__ import annotations

import torch

from dalle_kernels.backends import native
from dalle_kernels.backends.contract import Call
from dalle_kernels.decode.contract import Inputs, Outputs

_WIDEST = 256


def refuse(call: Call) -> str | None:
    reason = native.refuse_cpu(call.device, call.dtype)
    if reason is None and call.width > _WIDEST:
        reason = f"it takes a head dimension D up to {_WIDEST}, not {call.width}"
    return reason


def describe() -> str:
    return native.instruction_set()


def forward(inputs: Inputs) -> Outputs:
    table, position = inputs.table(), inputs.position
    lists: tuple[torch.Tensor | None, ...] = (None, None, None)
    if table.shared is not None:
        lists = table.shared.prefix, table.shared.offsets, table.shared.slots
    one, by_row = (0, position) if isinstance(position, torch.Tensor) else (position, None)
    out = torch.ops.dalle_kernels_cpu.decode_forward(
        *inputs[:5],
        inputs.shared_keys,
        inputs.shared_values,
        inputs.hidden,
        inputs.shared_hidden,
        inputs.scales,
        inputs.shared_scales,
        one,
        by_row,
        inputs.factor,
        inputs.softcap,
        table.slot,
        table.prefix,
        table.offsets,
        table.slots,
        *lists,
    )
    return Outputs(out)
