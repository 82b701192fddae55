"""The likelihood of tokens, defined: plain PyTorch, in float32 or float64."""

from __future__ import annotations

import torch

from dalle_kernels.backends.contract import Call
from dalle_kernels.precision import widen
from dalle_kernels.tokens.contract import Grads, Inputs, Kept, Needs, Outputs


def refuse(call: Call) -> str | None:
    return None


def _chosen(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, tokens[:, None])[:, 0]


def forward(inputs: Inputs) -> Outputs:
    """logsumexp(logits) - logits[token]."""
    logits = widen(inputs.logits)
    lse = logits.logsumexp(1)
    return Outputs(lse - _chosen(logits, inputs.tokens), lse)


def _slopes(kept: Kept) -> torch.Tensor:
    """d/dlogits = softmax(logits) - one at the token."""
    p = (widen(kept.logits) - kept.lse[:, None]).exp()
    return p.scatter_add(1, kept.tokens[:, None], -torch.ones_like(p[:, :1]))


def backward(grads: Grads, kept: Kept, needs: Needs) -> tuple[torch.Tensor | None, ...]:
    assert grads.nll is not None
    return ((grads.nll[:, None] * _slopes(kept)).to(kept.logits.dtype) if needs.logits else None,)


def jvp(tangents: tuple[torch.Tensor | None, ...], kept: Kept) -> tuple[torch.Tensor | None, ...]:
    (tangent,) = tangents
    return (None if tangent is None else (widen(tangent) * _slopes(kept)).sum(1),)
