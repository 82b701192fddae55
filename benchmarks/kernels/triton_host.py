"""Microseconds of host time that a call of a Triton backend costs, alone and through the door, without a GPU.

    python -m benchmarks triton-host
    python -m benchmarks triton-host --json host.json

The door is the public function with `backend="triton"`: its checks, torch's dispatcher and the choice of a backend come
on top, and for a gradient the autograd engine.

Kernels are compiled once and then never launched: what is timed is this library's Python (output allocation, cached
plans) and Triton's (argument binding, specialization, kernel lookup), but not the driver's launch itself. Tensors are
on the CPU, where the door also reads a position, a temperature and `sample_tokens` its logits in search of NaN; a GPU
call is spared those microseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import triton

from benchmarks.kernels.aot import recording
from dalle_kernels.attention import contract as attention_contract
from dalle_kernels.attention import triton as triton_backend
from dalle_kernels.attention.op import sparse_attention
from dalle_kernels.backends import choice as backends
from dalle_kernels.codebook.gumbel import contract as gumbel_contract
from dalle_kernels.codebook.gumbel import op as codebook_op
from dalle_kernels.codebook.gumbel import triton as triton_gumbel
from dalle_kernels.codebook.gumbel.op import gumbel_lookup
from dalle_kernels.decode import triton as triton_kernel
from dalle_kernels.decode.cache import KVCache
from dalle_kernels.decode.op import decode_attention
from dalle_kernels.patterns.layout import TokenLayout
from dalle_kernels.patterns.patterns import Row
from dalle_kernels.sampling import contract as sampling_contract
from dalle_kernels.sampling import triton as sampling
from dalle_kernels.sampling.op import sample_tokens

PATTERN = Row(TokenLayout(256, (32, 32)))
Pair = tuple[Callable[[], object], Callable[[], object]]


def microseconds(call: Callable[[], object], calls: int = 200, repeats: int = 9) -> float:
    """Median over `repeats` of the mean time of `calls` calls, after a warm-up."""
    for _ in range(20):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)


def pairs() -> dict[str, Pair]:
    """By name, the calls of a backend's function and of the public one; to be made where launches are recorded."""
    q, k, v = (torch.zeros(1, 2, PATTERN.length, 64, dtype=torch.bfloat16) for _ in range(3))
    token = torch.zeros(1, 2, 1, 64, dtype=torch.bfloat16)
    cache = KVCache(PATTERN, 1, 2, 64, dtype=torch.bfloat16)
    cache.lengths = None  # as on a GPU, where nobody looks at them
    position, seed = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    logits, codebook = torch.zeros(64, 512, dtype=torch.bfloat16), torch.zeros(512, 128, dtype=torch.bfloat16)
    temperature = torch.ones(())
    settings = logits, codebook, temperature, False, True, seed, seed
    out, lse = triton_backend.forward(attention_contract.Inputs(q, k, v, None, 0.125, PATTERN))
    outputs = triton_gumbel.forward(gumbel_contract.Inputs(*settings))
    grads = outputs[0], outputs[2]

    leaves = q.clone().requires_grad_(), k.clone().requires_grad_(), v.clone().requires_grad_()
    attended = sparse_attention(*leaves, PATTERN, backend="triton")
    looked = logits.clone().requires_grad_(), codebook.clone().requires_grad_()
    latents, _, kl = gumbel_lookup(*looked, temperature, seed=seed, backend="triton")
    return {
        "attention (1 kernel)": (
            lambda: triton_backend.forward(attention_contract.Inputs(q, k, v, None, 0.125, PATTERN)),
            lambda: sparse_attention(q, k, v, PATTERN, backend="triton"),
        ),
        "attention, backward (4 kernels)": (
            lambda: triton_backend.backward(
                attention_contract.Grads(out, None),
                attention_contract.Kept(q, k, v, out, lse, None, 0.125, PATTERN),
                attention_contract.Needs(True, True, True),
            ),
            lambda: torch.autograd.grad(attended, leaves, out, retain_graph=True),
        ),
        "decoding (2 kernels)": (
            lambda: triton_kernel.forward(cache.inputs(token, token, token, position)),
            lambda: decode_attention(token, token, token, cache, position, backend="triton"),
        ),
        "Gumbel lookup (1 kernel)": (
            lambda: triton_gumbel.forward(gumbel_contract.Inputs(*settings)),
            lambda: gumbel_lookup(logits, codebook, temperature, seed=seed, backend="triton"),
        ),
        "Gumbel lookup, backward (3 kernels)": (
            lambda: triton_gumbel.backward(
                gumbel_contract.Grads(*grads),
                gumbel_contract.Kept(*settings, *outputs),
                gumbel_contract.Needs(True, True),
            ),
            lambda: torch.autograd.grad((latents, kl), looked, grads, retain_graph=True),
        ),
        "sampling (1 kernel)": (
            lambda: sampling.forward(sampling_contract.Inputs(logits, None, 1.0, 1.0, 0, 1.0, seed, seed)).tokens,
            lambda: sample_tokens(logits, seed=seed, backend="triton"),
        ),
    }


def _look_at_nothing(*_: object) -> None:
    """A constant `return_value` would be a Mock, which takes longer than what it stands for."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args(arguments)
    figures = {}
    backends.forget_choices()
    # The door asks a backend once whether it serves such a call; of CPU tensors this one would say no. Nor may it look
    # for NaN in results that no kernel has filled.
    with (
        recording(90),
        mock.patch.object(backends.Operation, "refusal", return_value=None),
        mock.patch.object(codebook_op, "refuse_nan", _look_at_nothing),
    ):
        try:
            print(f"{'us of host time, launches left out':36s} {'backend':>8s} {'door':>8s}")
            for name, (backend, door) in pairs().items():
                figures[name] = {"backend": microseconds(backend), "door": microseconds(door)}
                print(f"{name:36s} {figures[name]['backend']:8.1f} {figures[name]['door']:8.1f}", flush=True)
        finally:
            backends.forget_choices()
    if options.json:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        options.json.write_text(json.dumps({**versions, "microseconds": figures}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
