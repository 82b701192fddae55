"""The patterns, written down a second time and the slow way: pair by pair, straight from their definitions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dalle_kernels import (
    AxialRow,
    Causal,
    Column,
    Convolution,
    Fixed,
    MaskPattern,
    Pattern,
    Row,
    Strided,
    TokenLayout,
)


def _image_rule(pattern: Pattern, height: int, width: int) -> Callable[[int, int, int, int], bool]:
    """sees(query row, query column, key row, key column) between image tokens."""

    def circular(difference: int, side: int) -> int:
        return min(difference % side, -difference % side)

    def rule(r: int, c: int, r2: int, c2: int) -> bool:
        d = (r * width + c) - (r2 * width + c2)
        if d < 0:
            return False
        match pattern:
            case Causal():
                return True
            case Row():
                return d <= width
            case Column():
                return c == c2
            case AxialRow():
                return r == r2
            case Convolution(kernel_size=k, boundary="raster"):
                h = k // 2
                return any(d == width * a + b for a in range(h + 1) for b in range(-h, h + 1))
            case Convolution(kernel_size=k, boundary="clamp"):
                return abs(r - r2) <= k // 2 and abs(c - c2) <= k // 2
            case Convolution(kernel_size=k, boundary="torus"):
                return circular(r - r2, height) <= k // 2 and circular(c - c2, width) <= k // 2
            case Convolution(kernel_size=k, boundary="corner", dilation=step):
                spread = [step * n for n in range(k)]
                return r - r2 in spread and c - c2 in spread
        raise AssertionError(pattern)

    return rule


def mask_of(pattern: Pattern) -> torch.Tensor:
    """torch.bool [S, S] of any pattern but MaskPattern."""
    mask = torch.zeros(pattern.length, pattern.length, dtype=torch.bool)
    if isinstance(pattern, Strided | Fixed):
        stride = pattern.stride
        for i in range(pattern.length):
            for j in range(i + 1):
                if isinstance(pattern, Strided):
                    mask[i, j] = i - j < stride or (i - j) % stride == 0
                else:
                    mask[i, j] = i // stride == j // stride or j % stride >= stride - pattern.summary
        return mask
    layout = pattern.layout  # type: ignore[attr-defined]
    text, (height, width) = layout.text_length, layout.grid
    sees = _image_rule(pattern, height, width)
    for i in range(layout.length):
        for j in range(layout.length):
            if i < text:
                mask[i, j] = j <= i
            elif j < text:
                mask[i, j] = True
            else:
                mask[i, j] = sees(*divmod(i - text, width), *divmod(j - text, width))
    return mask


def every_pattern(layout: TokenLayout, kernel_size: int = 3) -> list[Pattern]:
    """One of each kind over `layout`, or over as many tokens."""
    torch.manual_seed(layout.length)
    random = torch.rand(layout.length, layout.length) < 0.3
    return [
        Causal(layout),
        Row(layout),
        Column(layout),
        AxialRow(layout),
        Convolution(layout, kernel_size, "raster"),
        Convolution(layout, kernel_size, "clamp"),
        Convolution(layout, kernel_size, "torus"),
        Convolution(layout, kernel_size, "corner"),
        Convolution(layout, kernel_size + 1, "corner", dilation=2),
        Strided(layout.length, 7),
        Fixed(layout.length, 6, 2),
        MaskPattern(random),
    ]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float | None = None,
    key_padding_mask: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) over a dense mask [S, S] in the inputs' own precision; zeros and -inf for a query that sees no key."""
    visible = mask.to(q.device).expand(q.shape[0], 1, -1, -1)
    if key_padding_mask is not None:
        visible = visible & ~key_padding_mask[:, None, None, :]
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    blind = ~visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible & ~blind, -torch.inf)
    out = (scores.softmax(-1) @ v).masked_fill(blind, 0)
    return out, scores.logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)
