"""The door to sparse attention: checks, schema, shapes, derivative and choice of backend. The maths is elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from torch.nn.functional import pad

from dalle_kernels.attention import reference
from dalle_kernels.attention.contract import AXES, Backend, Grads, Inputs, Kept, Needs, Outputs, call_of, extras
from dalle_kernels.backends.choice import Operation, register
from dalle_kernels.backends.contract import Call
from dalle_kernels.backends.library import Derivative, Entry
from dalle_kernels.backends.sharding import divided, locally
from dalle_kernels.checks import (
    as_int,
    autocast,
    check_alike,
    check_scale,
    check_softcap,
    check_tensor,
    rows_contiguous,
)
from dalle_kernels.patterns.patterns import Pattern

if TYPE_CHECKING:
    from dalle_kernels.attention import cpu, cuda, triton

    _BACKENDS: tuple[Backend, ...] = (cpu, cuda, triton, reference)


def _describe(q: torch.Tensor, k: torch.Tensor, *_: Any, softcap: float | None = None, **__: Any) -> Call:
    check_tensor("q", q, rank=4)
    check_tensor("k", k, rank=4)
    return Call(q.device, autocast(q)[0].dtype, q.shape[-1], extras(q, k, softcap))


OPERATION: Operation[Backend] = Operation(
    "sparse_attention",
    {
        "cuda": "dalle_kernels.attention.cuda",
        "triton": "dalle_kernels.attention.triton",
        "cpu": "dalle_kernels.attention.cpu",
        "reference": "dalle_kernels.attention.reference",
    },
    _describe,
)


@overload
def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    scale: float | None = ...,
    key_padding_mask: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
    *,
    softcap: float | None = ...,
    query_start: int | None = ...,
) -> torch.Tensor: ...
@overload
def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    scale: float | None = ...,
    key_padding_mask: torch.Tensor | None = ...,
    *,
    return_lse: Literal[True],
    backend: str = ...,
    softcap: float | None = ...,
    query_start: int | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    scale: float | None = None,
    key_padding_mask: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    *,
    softcap: float | None = None,
    query_start: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T) v over the pairs that `pattern` makes visible; differentiable.

    Source: Ramesh et al. 2021, appendix B.1 (the patterns); Dao et al. 2022 (computing it without the S x S matrix).

    Args:
        q: [B, H, L, D], float16, bfloat16, float32 or float64, any strides. L is S, or less: see `query_start`. Under
            autocast q, k and v are cast as scaled_dot_product_attention's are.
        k: [B, G, S, D], v: [B, G, S, E]. S may be less than the pattern's length: a prefix. G is a divisor of H: query
            head h attends to head h // (H / G) (grouped-query attention, Ainslie et al. 2023; nothing is repeated in
            memory). E is D, or any other width.
        pattern: who sees whom.
        scale: what the scores are multiplied by; D ** -0.5 where None.
        key_padding_mask: bool [B, S], True at keys to ignore (as torch.nn.MultiheadAttention has it).
        return_lse: also return the natural log-sum-exp of the scaled (and capped) scores; it is differentiable too.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see `explain`.
        softcap: bounds the scaled scores s softly, by softcap tanh(s / softcap) (Gemma 2, Riviere et al. 2024, section
            2, with 50); a number from 1e-20 to 1e20, or None for no bound. The CUDA backend has none.
        query_start: which token is the first query, where only L of the S tokens ask, as in prefill by chunks; the last
            L do where None (the corner of a mask that torch.nn.attention.bias.causal_lower_right and FlashAttention
            align to). Work and memory are those of these rows. Not for the CUDA backend.

    Returns:
        [B, H, L, E] in q's dtype; with `return_lse` also float32 [B, H, L] (float64 for float64 inputs). A query
        that sees no key gives zeros, a log-sum-exp of -inf and no gradient.

    Raises:
        TypeError, ValueError: for wrong ranks, shapes, dtypes, devices, or a named backend that cannot serve.

    Example:
        >>> layout = TokenLayout(text_length=16, grid=(8, 8))
        >>> q = k = v = torch.randn(2, 4, layout.length, 32)
        >>> sparse_attention(q, k, v, Row(layout)).shape
        torch.Size([2, 4, 80, 32])
        >>> sparse_attention(q[:, :, 24:40], k[:, :, :40], v[:, :, :40], Row(layout)).shape  # the third 16 of a prompt
        torch.Size([2, 4, 16, 32])
    """
    check_tensor("q", q, rank=4)
    check_tensor("k", k, rank=4)
    check_tensor("v", v, rank=4)
    q, k, v = autocast(q, k, v)
    for name, tensor in (("k", k), ("v", v)):
        check_alike(name, tensor, "q", q)
    alike = k.shape == q.shape and v.shape == q.shape
    if not alike:
        _check_shapes(q, k, v)
    if not q.shape[3]:
        raise ValueError(f"q: got shape {tuple(q.shape)}, wanted a head dimension D of at least 1")
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern: got {type(pattern).__name__}, wanted a Pattern")
    queries, tokens = q.shape[2], k.shape[2]
    if not 1 <= tokens <= pattern.length:
        name = "q" if alike else "k"
        raise ValueError(f"{name}: got {tokens} tokens, wanted 1 to {pattern.length}, the length of {pattern}")
    query_start = tokens - queries if query_start is None else as_int("query_start", query_start)
    if not 0 <= query_start <= tokens - queries:
        within = f"a token from 0 to {tokens - queries}, so that {queries} queries lie within the {tokens} tokens"
        raise ValueError(f"query_start: got {query_start!r}, wanted {within}, or None")
    check_scale(scale)
    softcap = check_softcap(softcap)
    if key_padding_mask is not None:
        if not isinstance(key_padding_mask, torch.Tensor):
            raise TypeError(f"key_padding_mask: got {type(key_padding_mask).__name__}, wanted a torch.Tensor")
        wanted = (q.shape[0], tokens)
        if key_padding_mask.dtype != torch.bool or key_padding_mask.shape != wanted:
            came = f"{key_padding_mask.dtype} of shape {tuple(key_padding_mask.shape)}"
            raise ValueError(f"key_padding_mask: got {came}, wanted torch.bool of shape {wanted}")
        if key_padding_mask.device != q.device:
            raise ValueError(f"key_padding_mask: got a tensor on {key_padding_mask.device}, wanted {q.device}")
    scale = None if scale is None else float(scale)
    if alike:
        q, k, v = map(rows_contiguous, (q, k, v))
        out, lse = _ENTRY(Inputs(q, k, v, key_padding_mask, scale, pattern, softcap, query_start), backend)
    else:
        scale = q.shape[3] ** -0.5 if scale is None else scale
        out, lse = _unlike(Inputs(q, k, v, key_padding_mask, scale, pattern, softcap, query_start), backend)
    return (out, lse) if return_lse else out


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    batch, heads, queries, width = q.shape
    groups, tokens = k.shape[1:3]
    if not 1 <= queries <= tokens:
        raise ValueError(f"q: got {queries} tokens, wanted 1 to {tokens}, as many as k has or a run of them")
    if not groups or not heads or heads % groups or k.shape != (batch, groups, tokens, width):
        wanted = f"({batch}, G, {tokens}, {width}), G a divisor of {heads}"
        raise ValueError(f"k: got shape {tuple(k.shape)}, wanted {wanted}")
    if v.shape[:3] != k.shape[:3] or not v.shape[3]:
        raise ValueError(f"v: got shape {tuple(v.shape)}, wanted ({batch}, {groups}, {tokens}, at least 1)")


def _unlike(inputs: Inputs, backend: str) -> Outputs:
    """The same with fewer heads in k and v, or another width in v, as attention of tensors that are alike.

    The heads of a group become a batch entry's, to which its one head of k and v is shown by a stride of 0. The
    narrower of q with k and v is filled up with zeros, which change neither scores nor sums.
    """
    if divided(inputs):  # a head of k and v is not repeated, and so cannot be divided afterwards
        return locally(_unlike, AXES, inputs, backend)
    q, k, v, key_padding_mask = inputs[:4]
    batch, heads, queries, width = q.shape
    groups, wide = k.shape[1], v.shape[3]
    common = max(width, wide)
    q, k, v = (pad(tensor, (0, common - tensor.shape[3])) for tensor in (q, k, v))
    shared = heads // groups
    if shared > 1:
        q = q.reshape(batch * groups, shared, *q.shape[2:])
        k, v = (tensor.flatten(0, 1)[:, None].expand(-1, shared, -1, -1) for tensor in (k, v))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.repeat_interleave(groups, 0)
    q, k, v = map(rows_contiguous, (q, k, v))
    out, lse = _ENTRY(Inputs(q, k, v, key_padding_mask, *inputs[4:]), backend)
    return Outputs(out[..., :wide].reshape(batch, heads, queries, wide), lse.reshape(batch, heads, queries))


register(sparse_attention, OPERATION)

V = TypeVar("V", Inputs, Kept)


def _scaled(values: V) -> V:
    return values._replace(scale=values.q.shape[-1] ** -0.5) if values.scale is None else values


def _forward(backend: Backend, inputs: Inputs) -> Outputs:
    return backend.forward(_scaled(inputs))


def _forward_fake(inputs: Inputs, _: str) -> Outputs:
    q = inputs.q
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return Outputs(torch.empty_like(q), q.new_empty(q.shape[:3], dtype=wide))


def _backward(backend: Backend, grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    grad_out = torch.zeros_like(kept.out) if grads.out is None else rows_contiguous(grads.out)
    return backend.backward(Grads(grad_out, grads.lse), _scaled(kept), needs)


def _jvp(tangents: tuple[torch.Tensor | None, ...], kept: Kept) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.jvp(tangents, _scaled(kept))


_ENTRY = Entry(
    "attention_forward",
    OPERATION,
    Inputs,
    Outputs,
    call_of,
    _forward,
    _forward_fake,
    AXES,
    Derivative("attention_backward", Grads, Kept, Needs, _backward, _jvp),
)
