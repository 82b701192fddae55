"""Inductor takes graphs that hold this library's operations for a CUDA device, as far as can be told without one.

The graphs are traced and lowered with fake CUDA tensors: every operation must become a call of itself between the
kernels that Inductor makes. Writing those kernels down asks for a device, so the rest needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import FallbackKernel
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dalle_kernels import Row, TokenLayout

PATTERN = Row(TokenLayout(16, (4, 4)))
OPS = torch.ops.dalle_kernels


def attention(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    q, k, v = x.view(1, 32, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind()
    settings = None, None, PATTERN.spec, None, 0  # no padding, scale, soft cap; from the first query on
    out, lse = OPS.attention_forward(q * 2, k, v, *settings, "triton")
    dq, dk, dv = OPS.attention_backward(out, lse, q, k, v, out, lse, *settings, [True] * 3, "triton")
    return (out + dq + dk + dv).relu()


def codebook(x: torch.Tensor, temperature: torch.Tensor, seed: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    logits, table = x * 3, x + 1
    settings = logits, table, temperature, False, True, seed, row
    outputs = OPS.gumbel_forward(*settings, 0, "triton")
    dlogits, _ = OPS.gumbel_backward(outputs[0], outputs[2], *settings, *outputs, 0, [True] * 2, "triton")
    return dlogits.relu()


@pytest.mark.parametrize(("graph", "shape"), [(attention, (32, 96)), (codebook, (64, 64))])
def test_graphs_for_a_gpu_are_lowered(graph: Callable[..., torch.Tensor], shape: tuple[int, int]) -> None:
    mode = FakeTensorMode()
    with mode, V.set_fake_mode(mode):
        kinds = (torch.bfloat16, shape), (torch.float32, ()), (torch.int64, ()), (torch.int64, ())
        inputs = [torch.empty(size, device="cuda", dtype=dtype) for dtype, size in kinds]
        lowering = GraphLowering(make_fx(graph)(*inputs))
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
    calls = [str(step.op_overload) for step in lowering.operations if isinstance(step, FallbackKernel)]
    room = "attention" if graph is attention else "gumbel"
    assert calls == [f"dalle_kernels.{room}_forward.default", f"dalle_kernels.{room}_backward.default"]
    assert len(lowering.operations) > len(calls)
