"""The CUDA library on CUDA tensors: each operation against the reference, and captured in a CUDA graph.

Small enough for compute-sanitizer, which benchmarks/gpu.sh runs over this file.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dalle_kernels import KVCache, Row, TokenLayout, decode_attention, sample_tokens, sparse_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PATTERN = Row(TokenLayout(70, (9, 11)))
BACKENDS = ("cuda", "reference")


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda()


@pytest.mark.parametrize("heads", [2, 400])  # in parts, and whole: as many fill any GPU
def test_attention(heads: int) -> None:
    q, k, v, grad = (_normal(1, heads, PATTERN.length, 32, seed=seed) for seed in range(4))
    results = []
    for backend in BACKENDS:
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        out = sparse_attention(*leaves, PATTERN, backend=backend)
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.03, rtol=0.03)


def test_decoding() -> None:
    q, k, v = (_normal(2, 3, PATTERN.length, 32, seed=seed) for seed in range(3))
    steps = []
    for backend in BACKENDS:
        cache = KVCache(PATTERN, 2, 3, 32, dtype=q.dtype, device="cuda")
        cache.prefill(k[:, :, :-3], v[:, :, :-3])
        steps.append(
            torch.cat(
                [
                    decode_attention(*(tensor[:, :, i : i + 1] for tensor in (q, k, v)), cache, i, backend=backend)
                    for i in range(PATTERN.length - 3, PATTERN.length)
                ],
                dim=2,
            )
        )
    torch.testing.assert_close(*steps, atol=0.02, rtol=0.02)


def test_sampling() -> None:
    logits = _normal(20, 1000)
    drawn = [sample_tokens(logits, top_k=50, top_p=0.9, seed=5, backend=backend) for backend in BACKENDS]
    assert drawn[0].equal(drawn[1])


def test_every_call_can_be_captured() -> None:
    q = _normal(1, 2, PATTERN.length, 32)
    token, logits = q[:, :, :1].contiguous(), _normal(150, 256)
    cache = KVCache(PATTERN, 1, 2, 32, dtype=q.dtype, device="cuda")
    cache.prefill(q[:, :, :4], q[:, :, :4])
    position = torch.tensor(4, device="cuda")
    seed = torch.tensor(1, device="cuda")

    def step() -> tuple[Any, ...]:
        return (
            decode_attention(token, token, token, cache, position, backend="cuda"),
            sparse_attention(q, q, q, PATTERN, backend="cuda"),
            sample_tokens(logits, top_k=50, seed=seed, backend="cuda"),
        )

    with torch.no_grad():
        step()  # makes plans and tables
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for place, number in ((4, 1), (5, 2)):
            position.fill_(place)
            seed.fill_(number)
            graph.replay()
            got = [tensor.clone() for tensor in captured]
            for ours, theirs in zip(got, step(), strict=True):
                assert ours.equal(theirs)
