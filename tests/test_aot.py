"""Every Triton kernel of the launch table compiles for GPUs that are not here, without spills, as the table says."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import aot

ROOT = Path(__file__).resolve().parent.parent
OLDEST = "3.6.0"


@functools.cache
def oldest_triton() -> Path:
    """A folder that holds the oldest Triton that is supported, beside whichever one is installed."""
    folder = ROOT / "build" / f"triton-{OLDEST}"
    if not (folder / "triton").exists():
        unfinished = folder.with_suffix(f".{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(unfinished)]
        subprocess.run([*pip, f"triton=={OLDEST}"], check=True)
        unfinished.rename(folder)
    return folder


def survey(arch: int, *first_on_path: Path) -> dict:
    """What `python -m benchmarks.aot` says: in a process of its own, where no interpreter is set."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = [str(folder) for folder in (*first_on_path, ROOT)]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", "--json", "--arch", str(arch)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
@pytest.mark.parametrize("version", ["installed", OLDEST])
def test_machine_code(version: str, arch: int) -> None:
    report = survey(arch, *([oldest_triton()] if version == OLDEST else []))
    assert report["complaints"] == []
    (table,) = report["tables"].values()
    assert table, "no kernel was compiled"
    recorded = aot.recorded()
    if version == OLDEST:
        assert report["triton"] == OLDEST
        assert OLDEST in recorded
    # Another Triton than those recorded makes other machine code; it is then judged by the complaints alone.
    if report["triton"] in recorded:
        assert table == recorded[report["triton"]][f"sm_{arch}"], (
            "the machine code changed: if it is meant to, run `python -m benchmarks.aot --write` with this Triton"
        )


def test_complaints_name_spills_and_shared_memory() -> None:
    row = {"registers": 255, "shared": 200 * 1024, "spills": 3, "instructions": 9, "mma": 1, "wgmma": 0, "tcgen05": 0}
    assert len(aot.complaints(80, {"kernel": row})) == 2
    assert aot.complaints(90, {"kernel": {**row, "spills": 0}}) == []
