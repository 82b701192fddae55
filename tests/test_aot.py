"""Every Triton kernel compiles for GPUs that are not here, without spills, as the table says.

This compiles the cases `aot.COMMON`; all of them, every row of the launch table among them, are compiled by
`python -m benchmarks aot`, whose outcome the table records.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from benchmarks.kernels import aot
from dalle_kernels.backends import launch

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


def said(module: str, *arguments: str, first_on_path: tuple[Path, ...] = ()) -> dict:
    """The last line that `module` says, JSON: in a process of its own, where no interpreter is set."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = [str(folder) for folder in (*first_on_path, ROOT)]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("version", "arch"),
    # sm_86, 89 and 120 are sm_80 with less shared memory: under one Triton that is told apart well enough.
    [*(("installed", arch) for arch in aot.ARCHITECTURES), *((OLDEST, arch) for arch in (80, 90, 100))],
)
def test_machine_code(version: str, arch: int) -> None:
    first_on_path = (oldest_triton(),) if version == OLDEST else ()
    report = said("benchmarks.kernels.aot", "--json", "--common", "--arch", str(arch), first_on_path=first_on_path)
    assert report["complaints"] == []
    (table,) = report["tables"].values()
    assert table, "no kernel was compiled"
    recorded = aot.recorded()
    if version == OLDEST:
        assert report["triton"] == OLDEST
        assert OLDEST in recorded
    # Another Triton than those recorded makes other machine code; it is then judged by the complaints alone.
    if report["triton"] in recorded:
        rows = recorded[report["triton"]][f"sm_{arch}"]
        wanted = {name: row for name, row in rows.items() if name.rpartition("/")[0] in aot.COMMON}
        assert table == wanted, (
            "the machine code changed: if it is meant to, run `python -m benchmarks aot --write` with this Triton"
        )


@pytest.mark.parametrize("version", ["installed", OLDEST])
def test_compiles_where_every_number_is_one(version: str) -> None:
    compiled = said("tests.aot_ones", first_on_path=(oldest_triton(),) if version == OLDEST else ())
    assert "gumbel_forward_kernel" in compiled["gumbel"]
    assert {"gumbel_backward_kernel", "sum_parts_kernel"} <= set(compiled["gumbel_backward"])
    assert "projection_mean_kernel" in compiled["projection"]
    assert "projection_pull_kernel" in compiled["projection_backward"]
    assert "decode_combine" in compiled["decode_splits"]
    assert compiled["sum_parts"] == ["sum_parts_kernel"], "one variant serves every number of parts"


@pytest.mark.parametrize("version", ["installed", OLDEST])
def test_what_nan_becomes_on_a_gpu(version: str) -> None:
    """tl.maximum and tl.max drop NaN there, unless told otherwise, and so does the interpreter from Triton 3.8 on; that
    of 3.6 and 3.7 keeps it in tl.maximum. Kernels that must do one or the other there say it in other words."""
    compiled = said("tests.aot_nan", first_on_path=(oldest_triton(),) if version == OLDEST else ())
    assert compiled.keys() == {f"sm_{arch}" for arch in aot.ARCHITECTURES}
    for made in compiled.values():
        assert made == {
            "maximum": ["max.f32"],
            "maximum_all": ["max.NaN.f32"],
            "largest": ["max.f32"],
            "without_nan": ["setp.num.f32"],
        }


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_table_holds_every_row_of_the_launch_table_and_no_spill(arch: int) -> None:
    """Under every Triton recorded, the oldest that is supported among them."""
    recorded = aot.recorded()
    oldest, *newer = sorted(recorded, key=lambda version: [int(part) for part in version.split(".")])
    assert oldest == OLDEST
    assert newer, "no newer Triton is recorded"
    for version, architectures in recorded.items():
        table = architectures[f"sm_{arch}"]
        assert aot.complaints(arch, table) == [], version
        assert table.keys() == recorded[oldest][f"sm_{aot.ARCHITECTURES[0]}"].keys(), version
        assert {name.rpartition("/")[0] for name in table} == {name for name, _ in aot.all_cases(arch)}, version
        for kernel in {row["kernel"] for row in launch.rows()}:
            for bits, width in launch.served(kernel):
                assert any(is_row(name, kernel, bits, width) for name in table), (version, kernel, bits, width)


def is_row(name: str, kernel: str, bits: int, width: int) -> bool:
    """Whether "case/kernel" is that row's: "gumbel_tails/16-bit/256/gumbel_forward_kernel" is gumbel_forward_tails'."""
    case, _, function = name.rpartition("/")
    tails = "_tails" if case.partition("/")[0].endswith("_tails") else ""
    return function.partition("#")[0].removesuffix("_kernel") + tails == kernel and f"/{bits}-bit/{width}" in case


def test_a_kernel_without_room_in_tensor_memory_is_refused() -> None:
    kernel = SimpleNamespace(metadata=SimpleNamespace(name="kernel", tmem_size=544), asm={})
    with pytest.raises(RuntimeError, match="544 columns of tensor memory"):
        aot.describe(kernel)


def test_a_case_compiled_again_leaves_no_rows_of_kernels_that_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aot, "RESULTS", tmp_path / "aot.json")
    aot.record({"sm_90": {"a/gone": {"registers": 1}, "b/kept": {"registers": 2}}})
    aot.record({"sm_90": {"a/new": {"registers": 3}}})
    (table,) = aot.recorded().values()
    assert table == {"sm_90": {"a/new": {"registers": 3}, "b/kept": {"registers": 2}}}


def test_complaints_name_spills_and_shared_memory() -> None:
    row = {"registers": 255, "shared": 200 * 1024, "spills": 3, "instructions": 9, "mma": 1, "wgmma": 0, "tcgen05": 0}
    assert len(aot.complaints(80, {"kernel": row})) == 2
    assert aot.complaints(90, {"kernel": {**row, "spills": 0}}) == []
