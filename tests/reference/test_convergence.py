"""Training through the CPU kernels follows the loss curve of training through the reference."""

from __future__ import annotations

import pytest
import torch
from dalle_reference.transformer import DalleTransformer, TransformerConfig

from dalle_kernels import Row, explain, gumbel_lookup, sparse_attention

STEPS = 250


def losses(backend: str, dtype: torch.dtype) -> torch.Tensor:
    """The loss of every step of a small transformer that learns 24 captioned pictures by heart, and a codebook."""
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_text=40, text_length=6, grid=(6, 6), vocab_image=32, layers=3, heads=2, head_dim=16
    )
    model = DalleTransformer(config)
    for block in model.blocks:
        block.attention.backend = backend
    logits = torch.nn.Parameter(torch.randn(24, 32))
    codebook = torch.nn.Parameter(torch.randn(32, 8))
    wanted = torch.randn(24, 8)
    text, image = torch.randint(40, (24, 5)), torch.randint(32, (24, 6)).repeat_interleave(6, dim=1)
    groups = [{"params": model.parameters()}, {"params": [logits, codebook], "lr": 0.05}]
    optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.96))
    seen = []
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            total = model.loss(text, image).total
        latents, _, kl = gumbel_lookup(logits, codebook, 0.8, seed=step, backend=backend)
        lookup = (latents - wanted).square().mean() + 0.01 * kl.mean()
        optimizer.zero_grad()
        (total + lookup).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        seen.append(torch.stack([total.detach().float(), lookup.detach()]))
    return torch.stack(seen)


@pytest.mark.parametrize(("dtype", "early", "late"), [(torch.float32, 1e-4, 0.04), (torch.bfloat16, 0.02, 0.06)])
def test_the_curves_agree(dtype: torch.dtype, early: float, late: float) -> None:
    q, table = torch.zeros(1, 1, 42, 16), torch.zeros(32, 8)
    layout = TransformerConfig(text_length=6, grid=(6, 6)).layout
    assert explain(sparse_attention, q, q, q, Row(layout)).backend == "cpu"
    assert explain(gumbel_lookup, torch.zeros(24, 32), table, 0.8).backend == "cpu"
    ours, reference = losses("cpu", dtype), losses("reference", dtype)
    assert (reference[-10:].mean(0) < 0.5 * reference[:10].mean(0)).all()  # there is a curve to follow
    # Step by step at first. Later the reference itself, started from weights that differ in their last bit, strays by
    # up to 3% from its own curve, so there the means over 50 steps are compared.
    torch.testing.assert_close(ours[:50], reference[:50], rtol=early, atol=0)
    smoothed = [curve.unflatten(0, (-1, 50)).mean(1) for curve in (ours, reference)]
    torch.testing.assert_close(*smoothed, rtol=late, atol=0)
