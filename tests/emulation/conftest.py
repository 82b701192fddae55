from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from tests.emulation.build import build


@pytest.fixture(scope="session")
def machine() -> ModuleType:
    """The test kernels of machine_tests.cpp."""
    spec = importlib.util.spec_from_file_location("emulation_machine", build().machine)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
