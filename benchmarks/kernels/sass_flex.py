"""FlexAttention's forward kernel, compiled for a GPU that need not be there: Inductor writes it for fake CUDA tensors.

Whatever Inductor asks of the GPU is answered here; the kernel's source is taken where it would be compiled, and
compiled by Triton for the architecture. In a process of its own: Inductor remembers the device.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch._inductor import async_compile
from torch._inductor import config as inductor
from torch._inductor.runtime import triton_heuristics
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.kernels import aot

TEXT, COLUMNS, LENGTH = 256, 32, 1280


def _row(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
    """The paper's row attention."""
    return (key <= query) & ((key < TEXT) | (query - key <= COLUMNS))


@contextlib.contextmanager
def _pretended(arch: int, multiprocessors: int) -> Iterator[None]:
    """A CUDA device of `arch` for whoever only asks."""
    properties = SimpleNamespace(
        name="pretended",
        major=arch // 10,
        minor=arch % 10,
        multi_processor_count=multiprocessors,
        total_memory=80 << 30,
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        warp_size=32,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=aot.SHARED_LIMIT[arch],
        shared_memory_per_multiprocessor=aot.SHARED_LIMIT[arch] + 1024,
        L2_cache_size=50 << 20,
    )

    def gives(value: Any) -> Any:
        """A function of its own each: dynamo keeps a handler for each function that it knows."""
        return lambda *_, **__: value

    answers: dict[str, Any] = {
        "torch.cuda.is_available": gives(True),
        "torch.cuda._lazy_init": gives(None),
        "torch.cuda.device_count": gives(1),
        "torch.cuda.current_device": gives(0),
        "torch.cuda._exchange_device": gives(0),
        "torch.cuda._maybe_exchange_device": gives(0),
        "torch.cuda.set_device": gives(None),
        "torch.cuda.synchronize": gives(None),
        "torch.cuda.is_current_stream_capturing": gives(False),
        "torch.cuda.get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "torch.cuda.set_rng_state": gives(None),
        "torch.cuda._get_device_properties": gives(properties),
        "torch.cuda.get_device_properties": gives(properties),
        "torch.cuda.get_device_capability": gives((arch // 10, arch % 10)),
        "torch._dynamo.device_interface.CudaInterface.Worker.get_device_properties": staticmethod(gives(properties)),
        "torch._dynamo.device_interface.CudaInterface.get_compute_capability": staticmethod(gives(arch)),
        "torch._dynamo.device_interface.CudaInterface.current_device": staticmethod(gives(0)),
        "torch.accelerator.is_available": gives(False),
        # These run, or look for, something on the device.
        "torch._higher_order_ops.flex_attention._permute_strides": lambda out, _: out,
        "torch._inductor.fx_passes.joint_graph.lazy_init": gives(None),
        "torch._inductor.fx_passes.post_grad.lazy_init": gives(None),
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, answer, create=True))
        triton.runtime.driver.set_active(aot._Driver(arch))
        yield


class _Seen(Exception):  # noqa: N818 (no error)
    """Ends the compilation: what is wanted has been written."""


def source_of(arch: int, multiprocessors: int, block: int) -> str:
    """Inductor's Triton source of the forward in bfloat16, 62 heads of 64, for block masks of `block` tokens."""
    seen: list[str] = []

    def take(_: Any, name: str, source: str, *__: Any, **___: Any) -> None:
        seen.append(source)
        raise _Seen

    def table(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=torch.int32, device="cuda")

    settings = {"compile_threads": 1, "fx_graph_cache": False, "pattern_matcher": False}
    with (
        _pretended(arch, multiprocessors),
        mock.patch.object(async_compile.AsyncCompile, "triton", take),
        inductor.patch(settings),
        FakeTensorMode(),
    ):
        q, k, v = (torch.empty(1, 62, LENGTH, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        count = LENGTH // block
        mask = BlockMask(
            seq_lengths=(LENGTH, LENGTH),
            kv_num_blocks=table(1, 1, count),
            kv_indices=table(1, 1, count, count),
            full_kv_num_blocks=table(1, 1, count),
            full_kv_indices=table(1, 1, count, count),
            q_num_blocks=table(1, 1, count),
            q_indices=table(1, 1, count, count),
            full_q_num_blocks=table(1, 1, count),
            full_q_indices=table(1, 1, count, count),
            BLOCK_SIZE=(block, block),
            mask_mod=_row,
        )
        try:
            torch.compile(flex_attention, fullgraph=True)(q, k, v, block_mask=mask)
        except Exception:
            if not seen:
                raise
    return seen[0]


def compile_forward(arch: int, multiprocessors: int, block: int) -> tuple[Any, int]:
    """The compiled kernel, and how many pairs its block takes at a time."""
    source = source_of(arch, multiprocessors, block)
    taken: dict[str, Any] = {}

    def template(num_stages: int, num_warps: int, triton_meta: dict[str, Any], **_: Any) -> Any:
        def decorate(function: Any) -> Any:
            taken.update(function=function, stages=num_stages, warps=num_warps, meta=triton_meta)
            return function

        return decorate

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(triton_heuristics, "template", template):
        path = Path(folder, "flex_kernel.py")  # Triton reads a function's source from its file
        path.write_text(source)
        spec = importlib.util.spec_from_file_location("flex_kernel", path)
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        meta = taken["meta"]
        (attributes,) = meta["configs"]
        made = ASTSource(taken["function"], meta["signature"], meta["constants"], attributes)
        options = {"num_warps": taken["warps"], "num_stages": taken["stages"]}
        rows, columns = (int(re.findall(rf"BLOCK_{side} : tl.constexpr = (\d+)", source)[0]) for side in "MN")
        return triton.compile(made, target=GPUTarget("cuda", arch, 32), options=options), rows * columns
