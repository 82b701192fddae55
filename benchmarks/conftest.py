"""`pytest benchmarks/` measures; elsewhere in this repository pytest-benchmark is switched off."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    asked = config.invocation_params.args
    if "--benchmark-disable" not in asked and any("benchmarks" in str(word) for word in asked):
        config.option.benchmark_disable = False
