"""Microseconds of host time that a call costs on the CPU, on the smallest problem there is, beside PyTorch's attention.

    python -m benchmarks host

Every row is the fastest of many short runs: what the code itself takes, whatever else the machine does. With a
gradient, the forward builds the graph that a backward would use; the backward's row has the autograd engine in it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from dalle_kernels import (
    KVCache,
    Row,
    TokenLayout,
    code_statistics,
    decode_attention,
    gumbel_lookup,
    gumbel_projection_lookup,
    logit_laplace_nll,
    sample_tokens,
    sparse_attention,
    vq_lookup,
)

PATTERN = Row(TokenLayout(4, (4, 4)))


def microseconds(call: Callable[[], object], calls: int = 10, runs: int = 600) -> float:
    """The least mean over `runs` runs of `calls` calls, after a warm-up."""
    best = float("inf")
    for run in range(runs + 1):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if run:
            best = min(best, (time.perf_counter() - start) / calls)
    return best * 1e6


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of every row."""
    q, k, v = torch.randn(3, 1, 1, PATTERN.length, 16)
    trained = q.clone().requires_grad_()
    out = sparse_attention(trained, k, v, PATTERN)
    theirs = scaled_dot_product_attention(trained, k, v, is_causal=True)
    ones = torch.ones_like(q)
    logits, codebook, seed = torch.randn(1, 8), torch.randn(8, 8), torch.tensor(1)
    temperature, x = torch.tensor(0.9), torch.full((8,), 0.5)
    indices = torch.zeros(1, dtype=torch.int64)
    cache = KVCache(PATTERN, 1, 1, 16)
    token = q[:, :, :1]

    def step() -> torch.Tensor:
        cache.lengths.zero_()
        return decode_attention(token, token, token, cache, 0)

    yield "torch attention", lambda: scaled_dot_product_attention(q, k, v, is_causal=True)
    yield "torch attention, with a gradient", lambda: scaled_dot_product_attention(trained, k, v, is_causal=True)
    yield "torch attention, backward", lambda: torch.autograd.grad(theirs, trained, ones, retain_graph=True)
    yield "sparse_attention", lambda: sparse_attention(q, k, v, PATTERN)
    yield "sparse_attention, with a gradient", lambda: sparse_attention(trained, k, v, PATTERN)
    yield "sparse_attention, backward", lambda: torch.autograd.grad(out, trained, ones, retain_graph=True)
    yield "decode_attention", step
    yield "gumbel_lookup", lambda: gumbel_lookup(logits, codebook, temperature, seed=seed)
    yield (
        "gumbel_projection_lookup",
        lambda: gumbel_projection_lookup(logits, codebook, None, codebook, temperature, seed=seed),
    )
    yield "vq_lookup", lambda: vq_lookup(logits, codebook)
    yield "code_statistics", lambda: code_statistics(logits, indices, 8)
    yield "sample_tokens", lambda: sample_tokens(logits, seed=seed)
    yield "logit_laplace_nll", lambda: logit_laplace_nll(x, x, x)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    argparse.ArgumentParser(prog="python -m benchmarks host", description=__doc__.split("\n", 1)[0]).parse_args(
        arguments
    )
    torch.set_num_threads(1)
    for name, call in calls():
        print(f"{name:36} {microseconds(call):6.1f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
