"""The child of the self-check in its tests: a machine without a GPU, with kernels that are right or made wrong.

python tests/self_check_child.py KIND SUBJECT DEVICE
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["TRITON_INTERPRET"] = "1"

import torch

from dalle_kernels.backends import cuda_library, self_check
from dalle_kernels.likelihood import triton as likelihood
from dalle_kernels.likelihood.contract import Inputs, Outputs

_RIGHT = likelihood.forward


def _forward(kind: str, inputs: Inputs) -> Outputs:
    if kind == "raises":
        raise RuntimeError("no such image\nmore")
    if kind == "faults":
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    if kind == "lacks-memory":
        raise torch.OutOfMemoryError("CUDA out of memory")
    if kind == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "hangs":
        time.sleep(60)
    nll = _RIGHT(inputs).nll
    return Outputs(nll * 1.001 if kind == "wrong" else nll)


def emulation(kind: str) -> contextlib.ExitStack:
    """The CUDA kernels' sources by tests/emulation, their sampling wrong where `kind` says so."""
    from tests.emulation.build import build

    torch.ops.load_library(str(build().operations))
    operations = torch.ops.dalle_kernels_emulated

    class Wrong:
        def __getattr__(self, name: str) -> object:
            return getattr(operations, name)

        def sample_tokens(self, *arguments: object) -> None:
            operations.sample_tokens(*arguments)
            tokens = arguments[-1]
            assert isinstance(tokens, torch.Tensor)
            tokens[-1] += 1

    stack = contextlib.ExitStack()
    library = Wrong() if kind.endswith("wrong") else operations
    stack.enter_context(mock.patch.object(cuda_library, "operations", return_value=library))
    stack.enter_context(mock.patch.object(cuda_library, "_refuse_device", return_value=None))
    return stack


def main(kind: str, subject: str, device: str) -> None:
    log = os.environ.get("SELF_CHECK_LOG")
    if log:
        with open(log, "a") as file:
            file.write(f"{subject}\n")
    if kind == "no-device":
        raise SystemExit("all devices are in use")
    if kind.startswith("cuda"):
        with emulation(kind):
            self_check.answer(json.loads(subject), device)
        return
    with mock.patch.object(likelihood, "forward", lambda inputs: _forward(kind, inputs)):
        self_check.answer(json.loads(subject), device)


if __name__ == "__main__":
    main(*sys.argv[1:])
