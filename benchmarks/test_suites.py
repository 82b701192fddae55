"""The quick cells as pytest-benchmark suites: one group a cell, one benchmark a contender; wrong answers fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.__main__ import cells_of
from benchmarks.choice import Choice
from benchmarks.harness import Cell, UnavailableError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CELLS = [
    cell
    for suite in ("attention", "decode", "codebook", "sampling")
    for cell in cells_of(suite, Choice(DEVICE, quick=True))
]
PAIRS = [(cell, contender.name) for cell in CELLS for contender in cell.contenders()]


@pytest.mark.parametrize(("cell", "name"), PAIRS, ids=str)
def test_speed(cell: Cell, name: str, benchmark: Any) -> None:
    contender = next(contender for contender in cell.contenders() if contender.name == name)
    try:
        trial = contender.prepare()
    except UnavailableError as reason:
        pytest.skip(str(reason))
    check = trial.verify()
    assert check.passed, f"error {check.error:.2g}, allowed {check.allowed:.2g}"
    benchmark.group = str(cell)

    def run() -> None:
        trial.runs[0]()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
