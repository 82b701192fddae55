"""NATTEN's functions and modules on our kernels: `from dalle_kernels.integrations.natten import na2d`.

`na1d`, `na2d` and `na3d` take NATTEN's arguments ([batch, *spatial, heads, head_dim], heads last) and give its answers;
`NeighborhoodAttention1D`, `2D` and `3D` have its parameters and `state_dict`. They run, forward and backward, wherever
`sparse_attention` does, CPUs among them, which NATTEN left with 0.20. What belongs to NATTEN's own kernels (backends,
tile shapes, schedules) is refused by name.

Source: Hassani et al. 2023 and 2025; the rule of the windows is `Neighborhood`'s.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import nn

from dalle_kernels.attention.op import sparse_attention
from dalle_kernels.checks import autocast, check_alike, check_tensor
from dalle_kernels.patterns.neighborhood import Neighborhood

Sizes: TypeAlias = int | Sequence[int]
Flags: TypeAlias = bool | Sequence[bool]


_PATTERNS: dict[tuple[object, ...], Neighborhood] = {}


@torch.compiler.assume_constant_result  # run once, before what is traced looks its pattern up
def _made(*arguments: object) -> bool:
    if arguments not in _PATTERNS:
        _PATTERNS[arguments] = Neighborhood(*arguments)  # type: ignore[arg-type]
    return True


def _hashable(name: str, value: Sizes | Flags | None, usual: int | bool | None) -> int | tuple[int, ...]:
    if value is None and usual is not None:
        return usual
    if isinstance(value, (int, bool)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    try:
        return tuple(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name}: got {value!r}, wanted one value, or one for each axis") from None


def _attend(
    axes: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: Sizes,
    stride: Sizes | None,
    dilation: Sizes | None,
    is_causal: Flags | None,
    scale: float | None,
    additional_keys: torch.Tensor | None,
    additional_values: torch.Tensor | None,
    return_lse: bool,
    unserved: dict[str, object],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    for name in unserved:
        raise TypeError(f"{name}: it steers NATTEN's own kernels, wanted na{axes}d without it")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != axes + 3:
            came = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{name}: got {came}, wanted [batch, {axes} spatial, heads, head_dim]")
        if tensor.shape[: axes + 1] != query.shape[: axes + 1]:
            wanted = tuple(query.shape[: axes + 1])
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted batch and tokens {wanted} as query has")
    shape = tuple(query.shape[1 : axes + 1])
    masks = (
        shape,
        _hashable("kernel_size", kernel_size, None),
        _hashable("stride", stride, 1),
        _hashable("dilation", dilation, 1),
        _hashable("is_causal", is_causal, False),
    )
    assert _made(*masks)
    pattern = _PATTERNS[masks]
    q, k, v = (tensor.flatten(1, axes).transpose(1, 2) for tensor in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = sparse_attention(q, k, v, pattern, scale, return_lse=True)
    if (additional_keys is None) != (additional_values is None):
        raise ValueError("additional_keys, additional_values: got one of them, wanted both or neither")
    if additional_keys is not None and additional_values is not None:
        out, lse = _merge(q, out, lse, additional_keys, additional_values, scale)
    result = out.transpose(1, 2).unflatten(1, shape)
    return (result, lse.transpose(1, 2).unflatten(1, shape)) if return_lse else result


def _merge(
    q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the neighbourhood and over tokens that every query sees, joined by their log-sum-exps."""
    batch, heads, _, width = q.shape
    for name, tensor in (("additional_keys", keys), ("additional_values", values)):
        check_tensor(name, tensor)
        check_alike(name, autocast(tensor)[0], "query", autocast(q)[0])
        good = tensor.dim() == 4 and tensor.shape[0] == batch and tensor.shape[1] == keys.shape[1]
        if not good or not tensor.shape[2] or heads % tensor.shape[2]:
            wanted = f"[{batch}, tokens, heads that divide {heads}, head_dim]"
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted {wanted}")
    if keys.shape[-1] != width:
        raise ValueError(f"additional_keys: got head_dim {keys.shape[-1]}, wanted {width} as query has")
    if values.shape[-1] != out.shape[-1]:
        raise ValueError(f"additional_values: got head_dim {values.shape[-1]}, wanted {out.shape[-1]} as value has")
    k, v = (tensor.transpose(1, 2).repeat_interleave(heads // tensor.shape[2], 1) for tensor in (keys, values))
    scores = (q * scale @ k.mT).to(lse.dtype)
    others = scores.logsumexp(-1)
    both = torch.logaddexp(lse, others)
    weights = (scores - both[..., None]).exp().to(v.dtype)
    return out * (lse - both).exp()[..., None].to(out.dtype) + weights @ v, both


def na1d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = 1,
    dilation: Sizes | None = 1,
    is_causal: Flags | None = False,
    scale: float | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    return_lse: bool = False,
    **unserved: object,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Neighbourhood attention along one axis; differentiable.

    Args:
        query, key: [B, X, heads, D]; value: [B, X, heads, Dv]. Any dtype that `sparse_attention` takes; key and value
            may have fewer heads, if their number divides query's.
        kernel_size, stride, dilation, is_causal: one value, or one an axis; see `Neighborhood`.
        scale: what the scores are multiplied by; D ** -0.5 where None.
        additional_keys, additional_values: [B, L, heads, D or Dv], tokens that every query sees besides.
        return_lse: also return the log-sum-exp of the scores.
        unserved: NATTEN's further arguments, each refused by its name.

    Returns:
        [B, X, heads, Dv]; with `return_lse` also [B, X, heads].

    Raises:
        TypeError, ValueError: for wrong shapes or dtypes, windows that do not fit, or arguments of NATTEN's kernels.

    Example:
        >>> q = k = v = torch.randn(1, 20, 2, 16)
        >>> na1d(q, k, v, kernel_size=5).shape
        torch.Size([1, 20, 2, 16])
    """
    masks = kernel_size, stride, dilation, is_causal
    return _attend(1, query, key, value, *masks, scale, additional_keys, additional_values, return_lse, unserved)


def na2d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = 1,
    dilation: Sizes | None = 1,
    is_causal: Flags | None = False,
    scale: float | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    return_lse: bool = False,
    **unserved: object,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Neighbourhood attention on a grid, [B, X, Y, heads, D]; otherwise as `na1d`.

    Example:
        >>> q = k = v = torch.randn(1, 8, 9, 2, 16)
        >>> na2d(q, k, v, kernel_size=(3, 5), is_causal=(True, False)).shape
        torch.Size([1, 8, 9, 2, 16])
    """
    masks = kernel_size, stride, dilation, is_causal
    return _attend(2, query, key, value, *masks, scale, additional_keys, additional_values, return_lse, unserved)


def na3d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = 1,
    dilation: Sizes | None = 1,
    is_causal: Flags | None = False,
    scale: float | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    return_lse: bool = False,
    **unserved: object,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Neighbourhood attention in a volume, [B, X, Y, Z, heads, D]; otherwise as `na1d`.

    Example:
        >>> q = k = v = torch.randn(1, 4, 5, 6, 2, 16)
        >>> na3d(q, k, v, kernel_size=3).shape
        torch.Size([1, 4, 5, 6, 2, 16])
    """
    masks = kernel_size, stride, dilation, is_causal
    return _attend(3, query, key, value, *masks, scale, additional_keys, additional_values, return_lse, unserved)


class _NeighborhoodAttention(nn.Module):
    """Projections around neighbourhood attention: the parameters of NATTEN's module of the same name.

    Args:
        embed_dim: channels, a multiple of num_heads.
        kernel_size, stride, dilation, is_causal: see `Neighborhood`.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        qk_scale: what the scores are multiplied by; head_dim ** -0.5 where None.
        proj_drop: dropout after the last projection.

    Raises:
        ValueError: if num_heads does not divide embed_dim.
    """

    axes: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        dilation: Sizes = 1,
        is_causal: Flags = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, wanted a divisor of embed_dim, {embed_dim}")
        self.num_heads, self.qk_scale = num_heads, qk_scale
        self.kernel_size, self.stride, self.dilation, self.is_causal = kernel_size, stride, dilation, is_causal
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, *spatial, embed_dim] -> the same shape."""
        if x.dim() != self.axes + 2 or x.shape[-1] != self.proj.in_features:
            wanted = f"[batch, {self.axes} spatial, {self.proj.in_features}]"
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted {wanted}")
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        masks = self.kernel_size, self.stride, self.dilation, self.is_causal
        attended = _attend(self.axes, query, key, value, *masks, self.qk_scale, None, None, False, {})
        assert isinstance(attended, torch.Tensor)
        return self.proj_drop(self.proj(attended.flatten(-2)))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"dilation={self.dilation}, is_causal={self.is_causal}"
        )


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """Self-attention over neighbourhoods of a line, [batch, X, embed_dim].

    Example:
        >>> NeighborhoodAttention1D(embed_dim=32, num_heads=2, kernel_size=5)(torch.randn(1, 20, 32)).shape
        torch.Size([1, 20, 32])
    """

    axes = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """Self-attention over neighbourhoods of a grid, [batch, X, Y, embed_dim].

    Example:
        >>> NeighborhoodAttention2D(embed_dim=32, num_heads=2, kernel_size=3)(torch.randn(1, 8, 9, 32)).shape
        torch.Size([1, 8, 9, 32])
    """

    axes = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    """Self-attention over neighbourhoods of a volume, [batch, X, Y, Z, embed_dim].

    Example:
        >>> NeighborhoodAttention3D(embed_dim=32, num_heads=2, kernel_size=3)(torch.randn(1, 4, 5, 6, 32)).shape
        torch.Size([1, 4, 5, 6, 32])
    """

    axes = 3
