"""What else computes the same: one adapter per competitor, each at its best setting.

An adapter's `make` prepares everything that a user would prepare once (masks, compiled functions, modules) and returns
a plain function of the input. It raises `UnavailableError`, with the reason, where the competitor cannot run. Adapters
that need a GPU are written against the documented interface of their project and marked "GPU:"; no machine that this
was written on could run them.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.harness import UnavailableError
from dalle_kernels import AxialRow, Causal, Column, Convolution, Pattern, Row, TokenLayout
from dalle_kernels.patterns.schedule import schedule_for

# Adapters compile one function body for many masks: each is a graph of its own, not a recompilation to warn of.
torch._dynamo.config.recompile_limit = 64
torch._dynamo.config.accumulated_recompile_limit = 1024


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"{name} cannot be imported: {str(error).splitlines()[0]}") from error


def _needs_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise UnavailableError("it needs a CUDA device")


# --- Attention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One attention: a pattern, and tensors [batch, heads, pattern.length, width] of a dtype on a device."""

    pattern: Pattern
    batch: int
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device
    backward: bool = False

    @property
    def layout(self) -> TokenLayout:
        """The text and grid of the pattern; UnavailableError for a pattern over a plain sequence."""
        layout = self.pattern.layout_or_none
        if layout is None:
            raise UnavailableError("it is written for text and an image grid")
        return layout


@dataclass
class Made:
    """A prepared competitor: a function of its input, and figures for the row."""

    function: Callable[..., Any]
    notes: dict[str, Any] = field(default_factory=dict)


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
        found.append(Attention(f"SDPA mask ({name})", partial(_sdpa_mask, backend=backend)))
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


def _sdpa_mask(problem: Problem, backend: SDPBackend) -> Made:
    _sdpa_check(problem, backend, mask=True)
    mask = problem.pattern.mask().to(problem.device)
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
        _needs_gpu(device)
        _imported("flash_attn.cute")
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
    _needs_gpu(problem.device)
    if problem.dtype == torch.float32:
        raise UnavailableError("FlashAttention takes fp16 and bf16")
    attend = _imported(module).flash_attn_func

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return Made(function)


def _natten(problem: Problem) -> Made:
    """NATTEN's causal neighbourhoods with the text as additional keys; rows and columns are 1-D ones."""
    natten = _imported("natten.functional")
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
        _imported(needed)
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


# --- Decoding ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decode:
    """A competitor of `decode_attention` at one position: `make(problem, position)` gives a function of
    (q, k, v [B, H, 1, D], keys, values [B, H, S, D] of the whole sequence) that writes the new key and attends."""

    name: str
    make: Callable[[Problem, int], Made]
    dense: bool = False


def decode_competitors() -> list[Decode]:
    return [
        Decode("SDPA over a full cache, masked", _decode_masked),
        Decode("SDPA over gathered keys", _decode_gathered),
        Decode("SDPA over a full cache, dense", _decode_dense, dense=True),
        Decode("FlexAttention over a full cache", _decode_flex),
    ]


def _write(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: int) -> None:
    keys[:, :, position : position + 1] = k
    values[:, :, position : position + 1] = v


def _decode_masked(problem: Problem, position: int) -> Made:
    seen = problem.pattern.mask()[position].to(problem.device)[None, None, None]

    def function(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        _write(k, v, keys, values, position)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)

    return Made(function)


def _decode_gathered(problem: Problem, position: int) -> Made:
    visible = problem.pattern.mask()[position].nonzero()[:, 0].to(problem.device)

    def function(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        _write(k, v, keys, values, position)
        return F.scaled_dot_product_attention(q, keys.index_select(2, visible), values.index_select(2, visible))

    return Made(function)


def _decode_dense(problem: Problem, position: int) -> Made:
    def function(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        _write(k, v, keys, values, position)
        return F.scaled_dot_product_attention(q, keys[:, :, : position + 1], values[:, :, : position + 1])

    return Made(function)


def _decode_flex(problem: Problem, position: int) -> Made:
    length, device = problem.pattern.length, problem.device
    rule = mask_mod(problem.pattern, device)

    def here(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return rule(b, h, i + position, j)

    start = time.perf_counter()
    blocks = create_block_mask(here, None, None, 1, length, device=device.type)
    notes = {"block_mask_ms": (time.perf_counter() - start) * 1e3}

    def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return flex_attention(q, keys, values, block_mask=blocks)

    compiled = torch.compile(attend, dynamic=False, fullgraph=True)

    def function(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        _write(k, v, keys, values, position)
        return compiled(q, keys, values)

    return Made(function, notes)


# --- Codebook ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lookup:
    """A competitor of a codebook operation: a function of the operation's tensors."""

    name: str
    make: Callable[[], Made]


def gumbel_competitors() -> list[Lookup]:
    """Functions (logits [N, K], codebook, temperature, hard, noise [N, K] or None) -> latents, indices, kl.

    With None they draw the noise themselves, as torch.nn.functional.gumbel_softmax does; the tests and the check before
    the timing hand them ours.
    """
    return [
        Lookup("eager", lambda: Made(_gumbel)),
        Lookup("compiled", lambda: Made(torch.compile(_gumbel, dynamic=False))),
        Lookup("compiled, uniform noise", lambda: Made(torch.compile(_gumbel_uniform, dynamic=False))),
    ]


def _gumbel(
    logits: Tensor, codebook: Tensor, temperature: float, hard: bool, noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    if noise is None:
        noise = -torch.empty_like(logits).exponential_().log()
    return _mixed(logits, codebook, temperature, hard, noise)


def _gumbel_uniform(
    logits: Tensor, codebook: Tensor, temperature: float, hard: bool, noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with noise that a compiler can fuse: exponential_ is a call of its own, rand is not."""
    if noise is None:
        noise = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-9, 1 - 6e-8)))
    return _mixed(logits, codebook, temperature, hard, noise)


def _mixed(
    logits: Tensor, codebook: Tensor, temperature: float, hard: bool, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    y = ((logits + noise) / temperature).softmax(-1)
    indices = y.argmax(-1)
    if hard:
        y = torch.zeros_like(y).scatter_(-1, indices[:, None], 1.0) - y.detach() + y
    log_p = logits.float().log_softmax(-1)
    kl = (log_p.exp() * (log_p + torch.log(torch.tensor(float(logits.shape[-1]))))).sum(-1)
    return y @ codebook, indices, kl


def vq_competitors() -> list[Lookup]:
    """Functions (features [N, D], codebook [K, D]) -> latents, indices, squared distance."""
    return [
        Lookup("eager, expanded squares", lambda: Made(_vq)),
        Lookup("compiled, expanded squares", lambda: Made(torch.compile(_vq, dynamic=False))),
        Lookup("eager, cdist", lambda: Made(_vq_cdist)),
    ]


def _vq(features: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        indices = (codebook.square().sum(-1) - 2 * features @ codebook.mT).argmin(-1)
    return _straight_through(features, codebook, indices)


def _vq_cdist(features: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if features.dtype != torch.float32:
        features, codebook = features.float(), codebook.float()
    with torch.no_grad():
        indices = torch.cdist(features, codebook).argmin(-1)
    return _straight_through(features, codebook, indices)


def _straight_through(features: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    nearest = F.embedding(indices, codebook)
    squared_distance = (features - nearest).float().square().sum(-1)
    return features + (nearest - features).detach(), indices, squared_distance


def laplace_competitors() -> list[Lookup]:
    """Functions (pixels, mu, log_b) -> the logit-Laplace negative log-likelihood."""
    return [
        Lookup("eager", lambda: Made(_laplace)),
        Lookup("compiled", lambda: Made(torch.compile(_laplace, dynamic=False))),
    ]


def _laplace(pixels: Tensor, mu: Tensor, log_b: Tensor) -> Tensor:
    logit = torch.logit(pixels)
    return torch.log(2 * pixels * (1 - pixels)) + log_b + (logit - mu).abs() * torch.exp(-log_b)


# --- Sampling ---------------------------------------------------------------------------------------------------------


def sampling_competitors() -> list[Lookup]:
    """Functions (logits [B, V], unconditional or None, guidance, temperature, top_k or None, top_p or None, noise
    [B, V] or None) -> int64 [B]. With None they draw by multinomial, as samplers do; with ours, by Gumbel-argmax."""
    return [
        Lookup("eager, full sort", lambda: Made(_sample)),
        Lookup("compiled, full sort", lambda: Made(torch.compile(_sample, dynamic=False))),
    ]


def _sample(
    logits: Tensor,
    unconditional: Tensor | None,
    guidance: float,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    noise: Tensor | None = None,
) -> Tensor:
    logits = logits.float()
    if unconditional is not None:
        logits = unconditional.float() + guidance * (logits - unconditional.float())
    logits = logits / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None:
        descending, index = logits.sort(descending=True)
        p = descending.softmax(-1)
        drop = (p.cumsum(-1) - p) >= top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter_(-1, index, drop), -torch.inf)
    if noise is not None:
        return (logits + noise).argmax(-1)
    return logits.softmax(-1).multinomial(1)[:, 0]


# --- The loss of a whole model ----------------------------------------------------------------------------------------


def linear_cross_entropies() -> list[Lookup]:
    """Functions (hidden [N, E], weight [V, E], bias [V], targets [N]) -> mean cross-entropy.

    No operation of ours competes with them: they are what the loss of a model can be computed with around ours.
    """
    return [
        Lookup("cut-cross-entropy", _cut_cross_entropy),
        Lookup("Liger fused linear cross-entropy", _liger),
    ]


def _cut_cross_entropy() -> Made:
    """GPU: Apple's kernel; it takes no bias, which rides along as one more feature."""
    _needs_gpu(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    loss = _imported("cut_cross_entropy").linear_cross_entropy

    def function(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        ones = hidden.new_ones(hidden.shape[0], 1)
        return loss(torch.cat([hidden, ones], 1), torch.cat([weight, bias[:, None]], 1), targets)

    return Made(function)


def _liger() -> Made:
    """GPU: Liger's loss module, called (weight, input, targets, bias)."""
    _needs_gpu(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    loss = _imported("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()

    def function(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        return loss(weight, hidden, targets, bias)

    return Made(function)
