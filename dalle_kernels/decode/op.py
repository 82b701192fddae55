"""The door to decoding: checks, schema, shapes and choice of backend."""

from __future__ import annotations

from typing import Any

import torch

from dalle_kernels.backends.choice import Call, Operation, register
from dalle_kernels.backends.library import define
from dalle_kernels.checks import autocast, check_alike, check_scale, check_tensor, rows_contiguous
from dalle_kernels.decode.cache import KVCache
from dalle_kernels.patterns.patterns import Pattern


def _describe(q: torch.Tensor, *_: Any, **__: Any) -> Call:
    return Call(q.device, autocast(q)[0].dtype, q.shape[-1])


OPERATION = Operation(
    "decode_attention",
    (
        ("cuda", "dalle_kernels.decode.cuda"),
        ("triton", "dalle_kernels.decode.triton"),
        ("cpu", "dalle_kernels.decode.cpu"),
        ("reference", "dalle_kernels.decode.reference"),
    ),
    _describe,
)


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: KVCache,
    position: int | torch.Tensor,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention for one new token: writes its key and value into `cache`, then attends to what it may see.

    Called for positions 0, 1, 2, ... (or from n on, after `cache.prefill` took n tokens) it gives row by row what
    `sparse_attention` gives at once. It has no backward.

    Args:
        q, k, v: [B, H, 1, D], the new token's; dtype and device of the cache (autocast casts them first).
        cache: the layer's KVCache; it says the pattern, and is changed in place.
        position: where the token stands in the sequence, shared by the batch. A 0-dim int64 tensor on the cache's
            device lets one CUDA graph serve every position; it is not checked there.
        scale: what the scores are multiplied by; D ** -0.5 where None.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see `explain`.

    Returns:
        [B, H, 1, D] in q's dtype.

    Raises:
        TypeError, ValueError: for wrong shapes, dtypes or devices, or a position outside the pattern.
        RuntimeError: if a gradient would be needed.

    Example:
        >>> cache = KVCache(Row(TokenLayout(4, (2, 2))), batch=1, heads=2, head_dim=16)
        >>> q = k = v = torch.randn(1, 2, 1, 16)
        >>> decode_attention(q, k, v, cache, position=0).shape
        torch.Size([1, 2, 1, 16])
    """
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: got {type(cache).__name__}, wanted a KVCache")
    cache.check()
    batch, heads, _, width = cache.keys.shape
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor, rank=4)
        if tensor.shape != (batch, heads, 1, width):
            wanted = (batch, heads, 1, width)
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted {wanted} to suit the cache")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError("decode_attention has no backward: call it under torch.no_grad()")
    q, k, v = autocast(q, k, v)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_alike(name, tensor, "the cache", cache.keys)
    check_scale(scale)
    return torch.ops.dalle_kernels.decode_forward(
        rows_contiguous(q),
        rows_contiguous(k),
        rows_contiguous(v),
        cache.keys,
        cache.values,
        _position(position, cache),
        width**-0.5 if scale is None else float(scale),
        cache.pattern.spec,
        backend,
    )


register(decode_attention, OPERATION)


def _position(position: int | torch.Tensor, cache: KVCache) -> torch.Tensor:
    device, length = cache.keys.device, cache.pattern.length
    if isinstance(position, torch.Tensor):
        if position.numel() != 1 or position.dtype != torch.int64:
            came = f"{position.dtype} of shape {tuple(position.shape)}"
            raise ValueError(f"position: got {came}, wanted one int64")
        if position.device != device:
            raise ValueError(f"position: got a tensor on {position.device}, wanted {device} where the cache is")
        return position.reshape(())
    if not isinstance(position, int) or not 0 <= position < length:
        raise ValueError(f"position: got {position!r}, wanted an int from 0 to {length - 1}")
    return torch.full((), position, dtype=torch.int64, device=device)


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    scale: float,
    pattern: str,
    backend: str,
) -> torch.Tensor:
    parsed = Pattern.parse(pattern)
    # On the CPU a position tensor can be looked at without waiting for anything, so it is checked here.
    if position.device.type == "cpu" and not 0 <= int(position) < parsed.length:
        raise ValueError(f"position: got {int(position)}, wanted 0 to {parsed.length - 1}")
    module = OPERATION.choose(backend, Call(q.device, q.dtype, q.shape[-1]))
    return module.forward(q, k, v, keys, values, position, scale, parsed)


def _forward_fake(q: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(q)


define(
    "decode_forward(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor position, float scale,"
    " str pattern, str backend) -> Tensor",
    _forward,
    _forward_fake,
)
