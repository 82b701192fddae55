"""What every room's tests share.

Where there is no GPU, Triton kernels run in Triton's interpreter; it must be chosen before they are imported.
"""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# torch finds a compiled graph on disk by the operations' names, and hands out one whose backward calls an older schema.
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")
# Tests put their own questions to kernels.
os.environ["DALLE_KERNELS_SELF_CHECK"] = "off"
# pytest-xdist's processes share the cores; threads of all of them on each core would wait for one another.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # for the processes that tests start

from dalle_kernels.backends import native


@pytest.fixture(params=native.NATIVE.supported_isas() if native.NATIVE else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once for every instruction set that this processor has, with the CPU kernels set to it."""
    assert native.NATIVE is not None
    before = native.NATIVE.isa()
    native.NATIVE.set_isa(request.param)
    yield request.param
    native.NATIVE.set_isa(before)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every fresh float holds NaN, every fresh integer its largest value: what a kernel forgets to write shows."""
    limit = native.NATIVE.kept_limit() if native.NATIVE else 0
    if native.NATIVE:
        native.NATIVE.set_kept_limit(0)  # kept memory holds what was there before
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    if native.NATIVE:
        native.NATIVE.set_kept_limit(limit)


# Files that take a minute or more: they come first, so that no process has one left when all others are done.
LONG = ("test_aot", "test_compilers", "test_parallel", "test_sanitizers", "test_wheel", "test_sharding", "test_demo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton's tests run on the CUDA device where there is one, so there `-m gpu` takes them too."""
    items.sort(key=lambda item: item.path.stem not in LONG)
    if torch.cuda.is_available():
        for item in items:
            if item.path.name.startswith("test_triton"):
                item.add_marker(pytest.mark.gpu)
