"""What was seen, as lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.machine import ROOT, label, machine, slug

RESULTS = ROOT / "benchmarks" / "results"


def default_output(device: torch.device) -> Path:
    """One file per machine and date."""
    return RESULTS / f"{slug(label(machine(device)))}-{datetime.now(UTC):%Y-%m-%d}.jsonl"


class Recorder:
    """Appends records to a JSON lines file; each addition replaces the file as a whole, so it is never half a line."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        if self.path is None or not records:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self.path.read_text() if self.path.exists() else ""
        temporary = self.path.with_suffix(".partial")
        temporary.write_text(before + "".join(json.dumps(record) + "\n" for record in records))
        temporary.replace(self.path)


def read_records(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Every record of these files, in order."""
    return [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.strip()]
