"""Modules that take the place of those in `dalle_pytorch.attention`."""

from __future__ import annotations

import random
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from dalle_kernels.attention.op import sparse_attention
from dalle_kernels.decode.cache import KVCache
from dalle_kernels.decode.op import decode_attention
from dalle_kernels.patterns import AxialRow, Causal, Column, Convolution, MaskPattern, Pattern, TokenLayout
from dalle_kernels.precision import widen

Cache = dict[Any, Any]


class AnyAttention(nn.Module):
    """What all of them share: the projections, the rotary embedding, the cache.

    An instance may have been one of theirs whose class was exchanged, so that nothing here relies on our constructor
    but `pattern` and `backend`, which `accelerate` sets.
    """

    pattern: Pattern
    backend: str
    heads: int
    seq_len: int
    scale: float
    to_out: nn.Sequential

    def __init__(self, dim: int, seq_len: int, heads: int, dim_head: int, dropout: float, stable: bool) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.seq_len = seq_len
        self.scale = dim_head**-0.5
        self.stable = stable  # their guard against overflow in half precision; our softmax is kept in float32
        self.backend = "auto"
        self.to_qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(dropout))

    def derive_pattern(self) -> Pattern:
        """The pattern that the attributes stand for."""
        raise NotImplementedError

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q, k, v [B, H, n, D] -> [B, H, n, D]; `mask` bool [B, n], True at keys to keep."""
        raise NotImplementedError

    def _padded(self, n: int) -> int:
        """How many tokens theirs pads `n` to before it projects the output."""
        return n

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        cache: Cache | None = None,
        cache_key: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: [B, n, dim]: the whole sequence so far, or with a filled cache the one token at `cache["offset"]`.
            mask: bool [B, n], True at keys to keep; not with a cache.
            rotary_pos_emb: [1, S, R], S >= n, R <= dim_head: angles, equal in pairs; applied to q, k and v.
            cache: shared by the layers of a model, which says under "offset" how many tokens have been, and under
                "copies" how many continuations of each row of the first call will come; None to train.
            cache_key: this layer's key in `cache`.

        Returns:
            [B, n, dim].
        """
        if cache is not None and mask is not None:
            raise ValueError("mask: got one beside a cache, wanted None: a cache keeps every key")
        n = x.shape[1]
        offset = 0 if cache is None else cache.get("offset", 0)
        qkv = self.to_qkv(x).unflatten(-1, (3, self.heads, -1))
        if rotary_pos_emb is None:
            q, k, v = _heads(qkv)
        else:
            if type(self.to_qkv) is not nn.Linear or self.to_qkv._forward_hooks:
                qkv = qkv.clone()  # somebody else may hold it
            q, k, v = _rotated(qkv, _turns(rotary_pos_emb, qkv.shape[-1])[offset : offset + n])
        if offset:
            assert cache is not None
            out = decode_attention(q, k, v, cache[cache_key], offset, self.scale, self.backend)
        else:
            out = self._attend(q, k, v, mask)
            if cache is not None:
                cache[cache_key] = self._new_cache(k, cache.get("copies", 1))
                cache[cache_key].prefill(k, v)
        joined = out.transpose(1, 2).flatten(2)
        if self.training and self._drops() and (padding := self._padded(n) - n):
            return self.to_out(F.pad(joined, (0, 0, 0, padding)))[:, :n]
        return self.to_out(joined)

    def _drops(self) -> bool:
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.to_out.modules())

    def _new_cache(self, k: Tensor, copies: int) -> KVCache:
        """An empty cache for keys like k [B, H, n, D]."""
        batch, heads, _, width = k.shape
        return KVCache(self.pattern, batch, heads, width, k.dtype, k.device, copies)

    def extra_repr(self) -> str:
        return f"{self.pattern}, heads={self.heads}, backend={self.backend!r}"


class Attention(AnyAttention):
    """Their `Attention`: all tokens before, or with `static_mask` some of them.

    Args:
        dim: of the tokens.
        seq_len: the most tokens that it is given.
        causal: whether later tokens are hidden.
        heads, dim_head: H and D.
        dropout: on the output.
        stable: has no effect here: no score overflows.
        static_mask: bool [seq_len, seq_len], True where query i may see key j.

    Example:
        >>> from dalle_kernels.integrations.dalle_pytorch import Attention
        >>> Attention(dim=64, seq_len=20, heads=2, dim_head=32)(torch.randn(1, 20, 64)).shape
        torch.Size([1, 20, 64])
    """

    static_mask: Tensor | None

    def __init__(
        self,
        dim: int,
        seq_len: int,
        causal: bool = True,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        stable: bool = False,
        static_mask: Tensor | None = None,
    ) -> None:
        super().__init__(dim, seq_len, heads, dim_head, dropout, stable)
        self.causal = causal
        self.register_buffer("static_mask", static_mask, persistent=False)
        self.pattern = self.derive_pattern()

    def derive_pattern(self) -> Pattern:
        if self.causal and self.static_mask is None:
            return Causal(TokenLayout(self.seq_len - 1, (1, 1)))
        mask = torch.ones(self.seq_len, self.seq_len, dtype=torch.bool, device="cpu")
        if self.static_mask is not None:
            mask = self.static_mask.cpu()
        return MaskPattern(mask.tril() if self.causal else mask)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None and not isinstance(self.pattern, MaskPattern):  # every query sees itself
            return sparse_attention(q, k, v, self.pattern, self.scale, backend=self.backend)
        hidden = None if mask is None else ~mask
        out, lse = sparse_attention(q, k, v, self.pattern, self.scale, hidden, return_lse=True, backend=self.backend)
        return torch.where(lse.isneginf()[..., None], v.mean(2, keepdim=True), out)

    def _new_cache(self, k: Tensor, copies: int) -> KVCache:
        if isinstance(self.pattern, MaskPattern) and not self.pattern.mask().any(-1).all():
            raise ValueError("static_mask: got a query that sees no key, wanted a key for each to decode with a cache")
        return super()._new_cache(k, copies)


class _GridAttention(AnyAttention):
    """Text, then a square image of `image_size` ** 2 tokens."""

    image_size: int

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(self.seq_len + 1 - self.image_size**2, (self.image_size, self.image_size))

    def _padded(self, n: int) -> int:
        return self.seq_len + 1

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        n, text = q.shape[2], self.pattern.length - self.image_size**2
        if mask is None or n <= text:
            return sparse_attention(q, k, v, self.pattern, self.scale, backend=self.backend)
        hidden = F.pad(~mask[:, :text], (0, n - text))
        image = sparse_attention(q, k, v, self.pattern, self.scale, hidden, backend=self.backend)
        q, k, v = (tensor[:, :, :text] for tensor in (q, k, v))
        return torch.cat(
            [sparse_attention(q, k, v, self.pattern, self.scale, backend=self.backend), image[:, :, text:]], 2
        )


class SparseAxialCausalAttention(_GridAttention):
    """Their `SparseAxialCausalAttention`: the text, and the image along one axis.

    Args:
        dim: of the tokens.
        seq_len: the most tokens that it is given, one less than <bos>, text and image together.
        image_size: side of the image, in tokens.
        axis: 0: the same row; 1: the same column.
        heads, dim_head: H and D.
        dropout: on the output.
        stable: has no effect here: no score overflows.

    Example:
        >>> from dalle_kernels.integrations.dalle_pytorch import SparseAxialCausalAttention
        >>> SparseAxialCausalAttention(dim=64, seq_len=24, image_size=4)(torch.randn(1, 24, 64)).shape
        torch.Size([1, 24, 64])
    """

    def __init__(
        self,
        dim: int,
        seq_len: int,
        image_size: int = 32,
        axis: int = 0,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        stable: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, seq_len, heads, dim_head, dropout, stable)
        if axis not in (0, 1):
            raise ValueError(f"axis: got {axis!r}, wanted 0 (rows) or 1 (columns)")
        self.image_size = image_size
        self.axis = axis
        self.pattern = self.derive_pattern()

    def derive_pattern(self) -> Pattern:
        return (Column if self.axis else AxialRow)(self.layout)


class SparseConvCausalAttention(_GridAttention):
    """Their `SparseConvCausalAttention`: the text, and a square of the image up to the query, its lower right corner.

    Args:
        dim: of the tokens.
        seq_len: the most tokens that it is given, one less than <bos>, text and image together.
        image_size: side of the image, in tokens.
        kernel_size: side of the square, odd.
        dilation: distance between its cells.
        heads, dim_head: H and D.
        dropout: on the output.
        stable: has no effect here: no score overflows.

    Example:
        >>> from dalle_kernels.integrations.dalle_pytorch import SparseConvCausalAttention
        >>> SparseConvCausalAttention(dim=64, seq_len=24, image_size=4, kernel_size=3)(torch.randn(1, 24, 64)).shape
        torch.Size([1, 24, 64])
    """

    def __init__(
        self,
        dim: int,
        seq_len: int,
        image_size: int = 32,
        kernel_size: int = 5,
        dilation: int = 1,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        stable: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, seq_len, heads, dim_head, dropout, stable)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: got {kernel_size!r}, wanted an odd int")
        self.image_size = image_size
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.pattern = self.derive_pattern()

    def derive_pattern(self) -> Pattern:
        return Convolution(self.layout, self.kernel_size, "corner", self.dilation)


class SparseAttention(Attention):
    """Their `SparseAttention`, without DeepSpeed: blocks near the query, the text's, and some at random.

    Args:
        as of `Attention`, without a static mask, and
        block_size: tokens along a block's side; divides `seq_len`.
        text_seq_len: the blocks that these first tokens lie in are seen by all.
        num_random_blocks: drawn for each row of blocks by Python's `random`; a quarter of them unless told.

    The blocks are kept where DeepSpeed keeps them, so that a loaded `state_dict` brings its own: in the buffer
    `attn_fn.master_layout`, int64 [H, n, n] with n = seq_len / block_size.

    Source: DeepSpeed's `VariableSparsityConfig`, with windows of four blocks.

    Example:
        >>> from dalle_kernels.integrations.dalle_pytorch import SparseAttention
        >>> SparseAttention(64, 128, block_size=16, text_seq_len=32)(torch.randn(1, 100, 64)).shape
        torch.Size([1, 100, 64])
    """

    attn_fn: nn.Module

    def __init__(
        self,
        dim: int,
        seq_len: int,
        causal: bool = True,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        stable: bool = False,
        *,
        block_size: int = 16,
        text_seq_len: int = 256,
        num_random_blocks: int | None = None,
    ) -> None:
        if seq_len % block_size:
            raise ValueError(f"seq_len: got {seq_len}, wanted a multiple of block_size ({block_size})")
        blocks = seq_len // block_size
        chosen = blocks // 4 if num_random_blocks is None else num_random_blocks
        if not 0 <= chosen <= blocks:
            raise ValueError(f"num_random_blocks: got {chosen}, wanted 0 to {blocks}, the blocks of a row")
        AnyAttention.__init__(self, dim, seq_len, heads, dim_head, dropout, stable)
        self.causal = causal
        self.register_buffer("static_mask", None, persistent=False)
        self.block_size = block_size
        self.attn_fn = nn.Module()
        layout = _block_layout(blocks, ceil(text_seq_len / block_size), chosen, causal)
        self.attn_fn.register_buffer("master_layout", layout.expand(heads, -1, -1).clone())
        self.pattern = self.derive_pattern()
        self.register_load_state_dict_post_hook(derive_again)

    def derive_pattern(self) -> Pattern:
        layout = self.attn_fn.get_buffer("master_layout").bool().cpu()
        if not torch.equal(layout, layout[:1].expand_as(layout)):
            raise ValueError("master_layout: got blocks that differ between heads, wanted the same for all")
        mask = layout[0].repeat_interleave(self.block_size, 0).repeat_interleave(self.block_size, 1)
        return MaskPattern(mask.tril() if self.causal else mask)

    def _padded(self, n: int) -> int:
        return ceil(n / self.block_size) * self.block_size


def derive_again(module: SparseAttention, _: Any) -> None:
    """After `load_state_dict`, which may have brought other blocks."""
    module.pattern = module.derive_pattern()


def _block_layout(blocks: int, text_blocks: int, chosen: int, causal: bool) -> Tensor:
    """int64 [1, blocks, blocks], 1 where a row of blocks sees a column of them: what DeepSpeed draws from one seed."""
    layout = torch.zeros(blocks, blocks, dtype=torch.int64, device="cpu")
    for drawn in layout:
        drawn[random.sample(range(blocks), chosen)] = 1
    column = torch.arange(blocks, device="cpu")
    row = column[:, None]
    seen = (row // 4 == column // 4) | (column < text_blocks)
    return layout.masked_fill(seen & (column <= row) if causal else seen, 1)[None]


_TURNS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # angles -> (their version, width, turns)


def _turns(angles: Tensor, width: int) -> Tensor:
    """angles [1, S, R], equal in pairs -> complex [S, 1, 1, width / 2], by which pairs of features are multiplied.

    Kept for as long as the angles live and are not written to: all layers of a model share them, in every step.
    """
    if torch.compiler.is_compiling() or angles.is_inference() or angles.requires_grad:
        return _make_turns(angles, width)
    version, kept_width, turns = _TURNS.get(angles, (None, None, None))
    if (version, kept_width) != (angles._version, width):
        with torch.inference_mode(False), torch.no_grad():
            turns = _make_turns(angles, width)
        _TURNS[angles] = angles._version, width, turns
    return turns


def _make_turns(angles: Tensor, width: int) -> Tensor:
    if width % 2 or angles.shape[-1] > width:
        raise ValueError(
            f"rotary_pos_emb: got {angles.shape[-1]} angles, wanted at most dim_head ({width}), itself even"
        )
    half = F.pad(widen(angles[0, :, ::2]), (0, (width - angles.shape[-1]) // 2))
    return torch.complex(half.cos(), half.sin())[:, None, None]


def _heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, n, 3, H, D] -> q, k, v, views [B, H, n, D]."""
    q, k, v = qkv.transpose(1, 3).unbind(2)
    return q, k, v


def _pairs(tensor: Tensor) -> Tensor:
    """[..., D] -> complex [..., D / 2], a view where the tensor is float32 or float64."""
    return torch.view_as_complex(widen(tensor).unflatten(-1, (-1, 2)))


def _rotated(qkv: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The heads of qkv [B, n, 3, H, D], turned; qkv is overwritten.

    It is a projection's output, and large: fresh memory costs more than the arithmetic.
    """
    if torch.compiler.is_compiling():
        return _heads(torch.view_as_real(_pairs(qkv) * turns).flatten(-2).to(qkv.dtype))
    if torch.is_grad_enabled():
        return _Rotation.apply(qkv, turns)
    return _rotated_in_place(qkv, turns)


def _rotated_in_place(qkv: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = widen(qkv)
    _pairs(wide).mul_(turns)
    return _heads(wide.to(qkv.dtype))


class _Rotation(torch.autograd.Function):
    """As autograd would do it, but the three gradients are turned straight into that of qkv, in one pass."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(turns)
        return _rotated_in_place(qkv, turns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (turns,) = ctx.saved_tensors
        back = turns[:, 0].conj().resolve_conj()  # [n, 1, D / 2]
        batch, heads, n, width = grads[0].shape
        grad = widen(grads[0]).new_empty(batch, n, 3, heads, width)
        for one, into in zip(grads, grad.unbind(2), strict=True):
            torch.mul(_pairs(one.transpose(1, 2).contiguous()), back, out=_pairs(into))
        return grad.to(grads[0].dtype), None
