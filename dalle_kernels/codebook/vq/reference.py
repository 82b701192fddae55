"""The nearest-row lookup, defined: plain PyTorch, in float32 or float64, over the whole N x K table."""

from __future__ import annotations

import torch

from dalle_kernels.backends.contract import Call
from dalle_kernels.codebook.vq.contract import Grads, Inputs, Kept, Needs, Outputs
from dalle_kernels.noise import HEAD_STEP, VQ_STREAM, gumbel_noise
from dalle_kernels.precision import widen


def refuse(call: Call) -> str | None:
    return None


def forward(inputs: Inputs) -> Outputs:
    """The squared distance is computed from the difference, not from expanded squares."""
    wide, table = widen(inputs.features), widen(inputs.codebook)
    scores = _scores(wide, table, inputs)
    if inputs.k == 1:
        indices = scores.argmax(-1, keepdim=True)
    else:
        # topk says nothing of equal scores; a stable sort puts the first of them first.
        indices = torch.sort(scores, stable=True, dim=-1, descending=True).indices[..., : inputs.k].contiguous()
    nearest = _gather(inputs.codebook, indices)
    return Outputs(nearest, (wide[:, :, None] - widen(nearest)).square().sum(-1), indices)


def _scores(wide: torch.Tensor, table: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """[H, N, K], the larger the better. What does not change their order is added where noise is."""
    products = wide @ table.mT
    if inputs.metric in ("euclidean", "distance"):
        products = products - ((table * table).sum(-1) / 2)[:, None]
    elif inputs.metric == "cosine":
        norms = table.norm(dim=-1)[:, None]
        products = torch.where(norms > 0, products / norms, 0.0)
    if inputs.temperature is None:
        return products
    squares = (wide * wide).sum(-1, keepdim=True)
    scale = 1.0
    if inputs.metric == "euclidean":
        scale = 2.0
    elif inputs.metric == "distance":
        products = -(squares - 2 * products).clamp_min(0).sqrt()
    elif inputs.metric == "cosine":
        products = torch.where(squares > 0, products / squares.sqrt(), products)
    heads, rows, codes = products.shape
    streams = range(VQ_STREAM, VQ_STREAM + heads * HEAD_STEP, HEAD_STEP)
    assert inputs.seed is not None
    assert inputs.row_offset is not None
    at = inputs.row_offset, products.device
    noise = torch.stack([gumbel_noise(inputs.seed, rows, codes, stream, *at) for stream in streams])
    return scale * products + inputs.temperature * noise.to(products.dtype)


def _gather(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows indices [H, N, k] of table [H, K, D]: [H, N, k, D]."""
    return table[torch.arange(table.shape[0], device=table.device)[:, None, None], indices]


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    assert grads.squared_distance is not None
    difference = widen(kept.features)[:, :, None] - widen(kept.nearest)
    share = 2 * grads.squared_distance[..., None] * difference
    dcodebook = None
    if needs.codebook:
        heads, _, _, width = share.shape
        place = kept.indices + kept.codes * torch.arange(heads, device=kept.indices.device)[:, None, None]
        dcodebook = share.new_zeros(heads * kept.codes, width).index_add_(0, place.flatten(), -share.reshape(-1, width))
        dcodebook = dcodebook.view(heads, kept.codes, width).to(kept.nearest.dtype)
    return share.sum(2).to(kept.features.dtype), dcodebook


def jvp(tangents: tuple[torch.Tensor | None, ...], kept: Kept) -> tuple[torch.Tensor]:
    """With r = f - c and the index held fixed: 2 r . (df - dc)."""
    dfeatures, dcodebook = (None if tangent is None else widen(tangent) for tangent in tangents)
    difference = widen(kept.features)[:, :, None] - widen(kept.nearest)
    total = torch.zeros_like(difference[..., 0])
    if dfeatures is not None:
        total = total + 2 * (difference * dfeatures[:, :, None]).sum(-1)
    if dcodebook is not None:
        total = total - 2 * (difference * _gather(dcodebook, kept.indices)).sum(-1)
    return (total,)
