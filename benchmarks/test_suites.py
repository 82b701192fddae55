"""The quick cells as pytest-benchmark suites: one group a cell, one benchmark a contender.

    pytest benchmarks/ --benchmark-only

A wrong answer or a failure of ours fails; a competitor's is a skip that says so.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.__main__ import cells_of
from benchmarks.harness import Cell, UnavailableError
from benchmarks.suites.choice import Choice

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CELLS = [
    cell
    for suite in ("attention", "decode", "codebook", "sampling")
    for cell in cells_of(suite, Choice(DEVICE, quick=True))
]
PAIRS = [(cell, contender.name) for cell in CELLS for contender in cell.contenders()]


def short(value: Cell | str) -> str:
    """The case's values without their names: what tells it from the others on one line."""
    if isinstance(value, str):
        return value
    return " ".join([value.suite, *(str(each) for each in value.case.values())])


@pytest.mark.parametrize(("cell", "name"), PAIRS, ids=short)
def test_speed(cell: Cell, name: str, benchmark: Any) -> None:
    contender = next(contender for contender in cell.contenders() if contender.name == name)
    ours = name.partition(",")[0] == "dalle_kernels"
    try:
        trial = contender.prepare()
        trial.runs[0]()
        check = trial.verify()
    except UnavailableError as reason:
        pytest.skip(str(reason))
    except Exception as error:
        if ours:
            raise
        pytest.skip(f"{name} fails here: {str(error).splitlines()[0]}")
    if not check.passed:
        said = f"error {check.error:.2g}, allowed {check.allowed:.2g}"
        assert not ours, said
        pytest.skip(f"{name} is wrong here: {said}")
    benchmark.group = short(cell)

    def run() -> None:
        trial.runs[0]()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
