"""Decoding by the CUDA kernel of csrc/decode/decode.cu."""

from __future__ import annotations

import torch

from dalle_kernels.backends import cuda_library
from dalle_kernels.backends.contract import Call
from dalle_kernels.decode.store import Store
from dalle_kernels.patterns.patterns import Pattern

_KEYS_A_BLOCK = 64  # fewer are not worth another block


def refuse(call: Call) -> str | None:
    if reason := cuda_library.refuse(call.device, call.dtype, (torch.bfloat16, torch.float16, torch.float32)):
        return reason
    piece = 16 // call.dtype.itemsize
    if call.width % piece or call.width > 32 * piece:
        return f"it takes head dimensions that are multiples of {piece} up to {32 * piece}, not {call.width}"
    return f"it has no {call.extras[0]}" if call.extras else None


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    store: Store,
    position: torch.Tensor,
    scale: float,
    pattern: Pattern,
    softcap: float | None = None,
) -> torch.Tensor:
    """Output [B, H, G, D] like q, a launch a token; k and v go into `store`. `position` is a 0-dim int64 tensor."""
    if q.shape[2] > 1:
        steps = zip(q.split(1, 2), k.split(1, 2), v.split(1, 2), strict=True)
        outs = [forward(*qkv, store, position + token, scale, pattern, softcap) for token, qkv in enumerate(steps)]
        return torch.cat(outs, 2)
    table = store.table(pattern, q.device)
    for name, tensor in (("keys", store.keys), ("values", store.values)):
        if tensor.data_ptr() % 16:
            raise ValueError(f"cache.{name}: got memory at {tensor.data_ptr():#x}, wanted a multiple of 16")
    batch, heads, _, width = q.shape
    # Two blocks a multiprocessor hide each other's latency; the count may not depend on the position, which the
    # host does not look at.
    wanted = -(-2 * cuda_library.multiprocessors(q.device) // (batch * heads))
    splits = max(1, min(wanted, table.cache_length // _KEYS_A_BLOCK))
    workspace = batch * heads * splits * (width + 2) if splits > 1 else 0
    partial = torch.empty(workspace, dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    cuda_library.operations().decode_attention(
        cuda_library.aligned(q),
        cuda_library.aligned(k),
        cuda_library.aligned(v),
        store.keys,
        store.values,
        table.slot,
        table.prefix,
        table.offsets,
        table.slots,
        position,
        partial,
        out,
        scale,
        splits,
    )
    return out
