"""What else computes sparse attention, or the dense attention that a model without patterns would."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.competitors.adapter import Made, Problem, imported, needs_gpu
from benchmarks.harness import UnavailableError
from dalle_kernels import AxialRow, Causal, Column, Convolution, Pattern, Row, TokenLayout
from dalle_kernels.patterns.schedule import schedule_for


@dataclass(frozen=True)
class Attention:
    """A competitor of `sparse_attention`: `make(problem)` gives a differentiable function of (q, k, v)."""

    name: str
    make: Callable[[Problem], Made]
    dense: bool = False  # computes dense causal attention, whatever the pattern: what a model without patterns does

    def answers(self, pattern: Pattern) -> Pattern:
        """The pattern whose attention this computes when `pattern` is asked for."""
        layout = pattern.layout_or_none
        return Causal(layout or TokenLayout(0, (1, pattern.length))) if self.dense else pattern


def attention_competitors() -> list[Attention]:
    """All of them, in the order in which they are printed."""
    found = []
    for name, backend in _SDPA_BACKENDS.items():
        found.append(Attention(f"SDPA causal ({name})", partial(_sdpa_causal, backend=backend), dense=True))
        found.append(Attention(f"SDPA mask ({name})", partial(sdpa_mask, backend=backend)))
    return [
        *found,
        Attention("FlexAttention", partial(_flex, block=128, permuted=False)),
        Attention("FlexAttention, 64 blocks", partial(_flex, block=64, permuted=False)),
        Attention("FlexAttention, permuted", partial(_flex, block=128, permuted=True)),
        Attention("FlexAttention, permuted, 64 blocks", partial(_flex, block=64, permuted=True)),
        Attention("FlexAttention on FlashAttention 4", partial(_flex, block=128, permuted=False, kernel="FLASH")),
        Attention(
            "FlexAttention on FlashAttention 4, permuted", partial(_flex, block=128, permuted=True, kernel="FLASH")
        ),
        Attention("dense text + dense local part, merged", _merged),
        Attention("FlashAttention 2 causal", partial(_flash, module="flash_attn"), dense=True),
        Attention("FlashAttention 3 causal", partial(_flash, module="flash_attn_interface"), dense=True),
        Attention("FlashAttention 4 causal", partial(_flash, module="flash_attn.cute"), dense=True),
        Attention("NATTEN", _natten),
        Attention("DALLE-pytorch", _dalle_pytorch),
    ]


# SDPA

_SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def _sdpa_check(problem: Problem, backend: SDPBackend, mask: bool) -> None:
    if problem.device.type == "cpu" and backend not in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        raise UnavailableError("this SDPA backend has no CPU kernel")
    if problem.device.type == "cuda" and backend == SDPBackend.FLASH_ATTENTION and mask:
        raise UnavailableError("on a GPU SDPA's flash backend takes no mask")


def _within(backend: SDPBackend, attend: Callable[..., Tensor]) -> Made:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([backend]):
            return attend(q, k, v)

    return Made(function)


def _sdpa_causal(problem: Problem, backend: SDPBackend) -> Made:
    _sdpa_check(problem, backend, mask=False)
    return _within(backend, partial(F.scaled_dot_product_attention, is_causal=True))


def sdpa_mask(problem: Problem, backend: SDPBackend | None) -> Made:
    """SDPA with the pattern's mask, by the backend that is named, or by the one that it chooses."""
    mask = problem.pattern.mask().to(problem.device)
    if backend is None:
        return Made(partial(F.scaled_dot_product_attention, attn_mask=mask))
    _sdpa_check(problem, backend, mask=True)
    return _within(backend, partial(F.scaled_dot_product_attention, attn_mask=mask))


# FlexAttention

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def mask_mod(pattern: Pattern, device: torch.device, order: Tensor | None = None) -> MaskMod:
    """`pattern` as FlexAttention wants it: arithmetic on indices where that is short, else a look-up in the dense mask.

    `order` [S] says which token stands at each position, where the caller permutes; only column order has arithmetic.
    """
    layout = pattern.layout_or_none
    if layout is not None and (order is None or isinstance(pattern, Column)):
        text, (rows, columns) = layout.text_length, layout.grid
        image = _image_rule(pattern, rows, columns, permuted=order is not None)
        if image is not None:

            def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return ((j < text) | ((i >= text) & image(i - text, j - text))) & (j <= i)

            return rule
    mask = pattern.mask()
    if order is not None:
        mask = mask[order.cpu()][:, order.cpu()]
    mask = mask.to(device)

    def look_up(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return mask[i, j]

    return look_up


def _image_rule(pattern: Pattern, rows: int, columns: int, permuted: bool) -> Callable[[Tensor, Tensor], Tensor] | None:
    """sees(query cell, key cell) for key <= query in the order of the positions; None where it would be long."""
    match pattern:
        case Causal():
            return lambda p, s: p >= s
        case Row():
            return lambda p, s: p - s <= columns
        case Column() if permuted:
            return lambda p, s: p // rows == s // rows
        case Column():
            return lambda p, s: p % columns == s % columns
        case AxialRow():
            return lambda p, s: p // columns == s // columns
        case Convolution(kernel_size=size, boundary="raster"):
            half = size // 2

            def raster(p: Tensor, s: Tensor) -> Tensor:
                # d = columns a + b with 0 <= a <= half and |b| <= half: b is the remainder nearest to zero
                # where rows are longer than the window, and every distance is near one where they are not.
                d = p - s
                a = (d + half) // columns
                return (d - columns * a <= half) & (a <= half)

            return raster if columns > 2 * half else None
        case Convolution(kernel_size=size, boundary="clamp"):
            half = size // 2
            return lambda p, s: (p // columns - s // columns <= half) & ((p % columns - s % columns).abs() <= half)
    return None


def _flex(problem: Problem, block: int, permuted: bool, kernel: str | None = None) -> Made:
    pattern, device = problem.pattern, problem.device
    if problem.backward and device.type == "cpu":
        raise UnavailableError("FlexAttention has no backward on the CPU")
    if kernel == "FLASH":
        # GPU: the FLASH kernel of FlexAttention is FlashAttention 4 with the mask_mod and the block-sparse tensors.
        needs_gpu(device)
        imported("flash_attn.cute")
    order = None
    if permuted:
        order = schedule_for(pattern, (64, 64)).order.to(device).long()
        if torch.equal(order, torch.arange(len(order), device=device)):
            raise UnavailableError("no order of the tokens gives fewer tiles than raster order")
    options: dict[str, Any] = {} if kernel is None else {"BACKEND": kernel}
    if block == 64 and device.type == "cuda":
        options |= {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 64, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 64}
    start = time.perf_counter()
    blocks: BlockMask = create_block_mask(
        mask_mod(pattern, device, order),
        None,
        None,
        pattern.length,
        pattern.length,
        device=device.type,
        BLOCK_SIZE=block,
    )
    if device.type == "cuda":
        torch.cuda.synchronize()
    notes = {"block_mask_ms": (time.perf_counter() - start) * 1e3, "block_sparsity_percent": float(blocks.sparsity())}

    if order is None:

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flex_attention(q, k, v, block_mask=blocks, kernel_options=options or None)

    else:
        inverse = order.argsort()

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (tensor[:, :, order] for tensor in (q, k, v))
            return flex_attention(q, k, v, block_mask=blocks, kernel_options=options or None)[:, :, inverse]

    return Made(torch.compile(attend, dynamic=False, fullgraph=True), notes)


# Dense parts, merged by their log-sum-exps: what a careful user builds from dense kernels by hand.


class _CpuParts:
    """Dense attention with its log-sum-exp, forward and backward, on the CPU."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias)

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias
        )


class _GpuParts:
    """GPU: the same by SDPA's memory-efficient kernels, which take a bias and pad the log-sum-exp to 32 rows."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
        if bias is not None:
            bias = bias.expand(q.shape[0], q.shape[1], -1, -1)
        out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal)
        return out, lse[..., : q.shape[2]]

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if bias is not None:
            bias = bias.expand(q.shape[0], q.shape[1], -1, -1)
        lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
        none = torch.empty((), dtype=torch.int64, device="cpu")
        dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, bias, out, lse, none, none, 0.0, [True, True, True, False], causal
        )
        return dq, dk, dv


class _Local:
    """The image's attention to itself, as a batch of small dense attentions.

    `split` and `join` turn [B, H, S, D] of the image into [N, H', C, D] and back; keys may be windows that overlap.
    """

    causal = False
    bias: Tensor | None = None

    def split(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def windows(self, x: Tensor) -> Tensor:
        return self.split(x)

    def join(self, x: Tensor, batch: int) -> Tensor:
        raise NotImplementedError

    def join_windows(self, x: Tensor, batch: int) -> Tensor:
        return self.join(x, batch)


class _Lines(_Local):
    """Column and AxialRow: each line of the grid is a causal sequence of its own."""

    causal = True

    def __init__(self, grid: tuple[int, int], down: bool) -> None:
        self.grid, self.down = grid, down

    def split(self, x: Tensor) -> Tensor:
        lines = x.unflatten(2, self.grid)
        return (lines.transpose(2, 3) if self.down else lines).flatten(1, 2)

    def join(self, x: Tensor, batch: int) -> Tensor:
        lines = x.unflatten(1, (-1, self.grid[1] if self.down else self.grid[0]))
        return (lines.transpose(2, 3) if self.down else lines).flatten(2, 3)


class _Chunks(_Local):
    """Any pattern with a short reach: chunks of a row of queries, each against a window of the keys before it."""

    def __init__(self, pattern: Pattern, layout: TokenLayout, problem: Problem) -> None:
        text, self.chunk = layout.text_length, layout.columns
        mask = pattern.mask()[text:, text:]
        cells = mask.shape[0]
        query, key = mask.nonzero().unbind(1)
        reach = int((query - key).max())
        self.blocks = -(-reach // self.chunk)
        if (self.blocks + 1) * self.chunk > cells // 2:
            raise UnavailableError("the pattern reaches back across half of the image: there is no local part")
        self.count = cells // self.chunk
        padded = F.pad(mask, (self.blocks * self.chunk, 0))
        windows = [
            padded[n * self.chunk : (n + 1) * self.chunk, n * self.chunk : (n + 1 + self.blocks) * self.chunk]
            for n in range(self.count)
        ]
        seen = torch.stack(windows)[:, None]
        self.bias = torch.zeros(seen.shape, dtype=problem.dtype).masked_fill_(~seen, -torch.inf).to(problem.device)

    def split(self, x: Tensor) -> Tensor:  # [chunks, B H, C, D]
        return x.flatten(0, 1).unflatten(1, (self.count, self.chunk)).transpose(0, 1)

    def windows(self, x: Tensor) -> Tensor:  # a view: windows overlap
        padded = F.pad(x.flatten(0, 1), (0, 0, self.blocks * self.chunk, 0))
        return padded.unfold(1, (self.blocks + 1) * self.chunk, self.chunk).mT.transpose(0, 1)

    def join(self, x: Tensor, batch: int) -> Tensor:
        return x.transpose(0, 1).flatten(1, 2).unflatten(0, (batch, -1))

    def join_windows(self, x: Tensor, batch: int) -> Tensor:
        pieces = x.transpose(0, 1).unflatten(2, (self.blocks + 1, self.chunk))
        total = pieces.new_zeros(pieces.shape[0], self.count + self.blocks, self.chunk, pieces.shape[-1])
        for shift in range(self.blocks + 1):
            total[:, shift : shift + self.count] += pieces[:, :, shift]
        return total[:, self.blocks :].flatten(1, 2).unflatten(0, (batch, -1))


class _Merge(torch.autograd.Function):
    """Text -> text causal, image -> text dense, image -> image local, merged.

    The backward pass hands each part the merged output and log-sum-exp, which is all that a part's backward needs to
    see the whole row's softmax.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, text: int, local: _Local, parts: Any) -> Tensor:
        (q_text, q_image), (k_text, k_image), (v_text, v_image) = ((x[:, :, :text], x[:, :, text:]) for x in (q, k, v))
        batch = q.shape[0]
        near, near_lse = parts.forward(
            local.split(q_image), local.windows(k_image), local.windows(v_image), local.bias, local.causal
        )
        image, lse = local.join(near, batch), local.join(near_lse[..., None], batch)[..., 0]
        text_out = text_lse = q_text[..., 0]
        if text:
            text_out, text_lse = parts.forward(q_text, k_text, v_text, None, True)
            far, far_lse = parts.forward(q_image, k_text, v_text, None, False)
            both = torch.logaddexp(lse, far_lse)
            image = image * (lse - both).exp()[..., None] + far * (far_lse - both).exp()[..., None]
            image, lse = image.to(q.dtype), both
        ctx.save_for_backward(q, k, v, text_out, text_lse, image, lse)
        ctx.text, ctx.local, ctx.parts = text, local, parts
        return torch.cat([text_out, image], 2) if text else image

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, text_out, text_lse, image, lse = ctx.saved_tensors
        text, local, parts, batch = ctx.text, ctx.local, ctx.parts, q.shape[0]
        (q_text, q_image), (k_text, k_image), (v_text, v_image) = ((x[:, :, :text], x[:, :, text:]) for x in (q, k, v))
        grad_text, grad_image = grad[:, :, :text], grad[:, :, text:]
        near = parts.backward(
            local.split(grad_image),
            local.split(q_image),
            local.windows(k_image),
            local.windows(v_image),
            local.split(image),
            local.split(lse[..., None])[..., 0],
            local.bias,
            local.causal,
        )
        dq_image = local.join(near[0], batch)
        dk_image, dv_image = (local.join_windows(x, batch) for x in near[1:])
        if not text:
            return dq_image, dk_image, dv_image, None, None, None
        own = parts.backward(grad_text, q_text, k_text, v_text, text_out, text_lse, None, True)
        far = parts.backward(grad_image, q_image, k_text, v_text, image, lse, None, False)
        return (
            torch.cat([own[0], dq_image + far[0]], 2),
            torch.cat([own[1] + far[1], dk_image], 2),
            torch.cat([own[2] + far[2], dv_image], 2),
            None,
            None,
            None,
        )


def _merged(problem: Problem) -> Made:
    layout, pattern = problem.layout, problem.pattern
    local: _Local
    if isinstance(pattern, (Column, AxialRow)):
        local = _Lines(layout.grid, down=isinstance(pattern, Column))
    elif isinstance(pattern, Causal):
        raise UnavailableError("dense causal attention has no local part")
    else:
        local = _Chunks(pattern, layout, problem)
    parts = _CpuParts if problem.device.type == "cpu" else _GpuParts

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _Merge.apply(q, k, v, layout.text_length, local, parts)

    return Made(function)


# Other projects


def _flash(problem: Problem, module: str) -> Made:
    """GPU: FlashAttention 2 (`flash_attn`), 3 (`flash_attn_interface`) and 4 (`flash_attn.cute`), [B, S, H, D]."""
    needs_gpu(problem.device)
    if problem.dtype == torch.float32:
        raise UnavailableError("FlashAttention takes fp16 and bf16")
    attend = imported(module).flash_attn_func

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return Made(function)


def _natten(problem: Problem) -> Made:
    """NATTEN's causal neighbourhoods with the text as additional keys; rows and columns are 1-D ones."""
    natten = imported("natten.functional")
    if problem.backward and problem.device.type == "cpu":
        raise UnavailableError("NATTEN's CPU backend is FlexAttention, which has no backward on the CPU")
    layout, pattern = problem.layout, problem.pattern
    text, (rows, columns) = layout.text_length, layout.grid
    settings: dict[str, Any] = {"torch_compile": True} if problem.device.type == "cpu" else {}
    match pattern:
        case Row():
            attend = partial(natten.na1d, kernel_size=columns + 1, is_causal=True, **settings)
        case Column():
            attend = partial(natten.na1d, kernel_size=rows, dilation=columns, is_causal=True, **settings)
        case Convolution(kernel_size=size, boundary="corner", dilation=step):
            attend = partial(
                natten.na2d, kernel_size=(size, size), dilation=(step, step), is_causal=(True, True), **settings
            )
        case _:
            raise UnavailableError("NATTEN's neighbourhoods cannot express this pattern")
    planar = isinstance(pattern, Convolution)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        image = [x[:, :, text:].transpose(1, 2) for x in (q, k, v)]
        if planar:
            image = [x.unflatten(1, (rows, columns)) for x in image]
        if not text:
            out = attend(*image)
            return (out.flatten(1, 2) if planar else out).transpose(1, 2)
        q_text, k_text, v_text = (x[:, :, :text] for x in (q, k, v))
        out = attend(*image, additional_keys=k_text.transpose(1, 2), additional_values=v_text.transpose(1, 2))
        out = (out.flatten(1, 2) if planar else out).transpose(1, 2)
        return torch.cat([F.scaled_dot_product_attention(q_text, k_text, v_text, is_causal=True), out], 2)

    return Made(function)


@lru_cache(maxsize=1)
def _dalle_pytorch_attention() -> ModuleType:
    """`dalle_pytorch.attention` alone: the package around it imports tokenizers and pretrained models."""
    found = importlib.util.find_spec("dalle_pytorch")
    if found is None or not found.submodule_search_locations:
        raise UnavailableError("dalle_pytorch cannot be imported: no module of that name")
    for needed in ("einops", "rotary_embedding_torch"):
        imported(needed)
    source = f"{found.submodule_search_locations[0]}/attention.py"
    spec = importlib.util.spec_from_file_location("benchmarks._dalle_pytorch_attention", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _dalle_pytorch(problem: Problem) -> Made:
    """DALLE-pytorch's own modules, their two projections taken out: what is left is the attention itself."""
    theirs, layout, pattern = _dalle_pytorch_attention(), problem.layout, problem.pattern
    shared = {"dim": 1, "seq_len": layout.length - 1, "heads": problem.heads, "dim_head": problem.width}
    grid = {"image_size": layout.columns}
    sparse = layout.rows == layout.columns and layout.text_length > 0
    match pattern:
        case Column() if sparse:
            module = theirs.SparseAxialCausalAttention(axis=1, **grid, **shared)
        case AxialRow() if sparse:
            module = theirs.SparseAxialCausalAttention(axis=0, **grid, **shared)
        case Convolution(kernel_size=size, boundary="corner", dilation=step) if sparse and size % 2:
            module = theirs.SparseConvCausalAttention(kernel_size=size, dilation=step, **grid, **shared)
        case Causal():
            module = theirs.Attention(causal=True, **shared)
        case _:
            module = theirs.Attention(causal=True, static_mask=pattern.mask(), **shared)
    module.to_qkv = module.to_out = torch.nn.Identity()
    module.to(problem.device)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        packed = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], -1)  # as one projection leaves them
        return module(packed).unflatten(-1, (problem.heads, problem.width)).transpose(1, 2)

    return Made(function)
