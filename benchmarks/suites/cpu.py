"""`python -m benchmarks run cpu`: what the CPU kernels are meant to reach, and what they reach here.

Every figure stands beside its target. Two opponents of the attention rows need a word:

- "Best dense" is the faster of SDPA causal and SDPA with the mask. On processors that are not Intel's, MKL, which
  SDPA's CPU kernel calls for its products, takes a path without AVX-512. The ratio in brackets is against the same
  SDPA with MKL's AVX-512 path forced: a process of its own, in which a preloaded library answers yes when MKL asks
  whether this is an Intel processor.
- FlexAttention stands at its best setting: 128 and 64 blocks, columns permuted by its user.

The aims of attention and of the codebook were set for two cores with AVX-512; elsewhere the table shows ratios alone.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.competitors.adapter import Problem
from benchmarks.competitors.attention import attention_competitors
from benchmarks.harness import (
    DTYPES,
    ROOT,
    Bench,
    Cell,
    Contender,
    Options,
    Recorder,
    Trial,
    Work,
    limit_memory,
    machine,
    read_records,
)
from benchmarks.harness.ceilings import ceiling_of
from benchmarks.harness.timing import timer_of
from benchmarks.suites import attention, codebook, decode
from dalle_kernels import Row, TokenLayout
from dalle_kernels.backends import native

CPU = torch.device("cpu")
TARGETS = json.loads((ROOT / "benchmarks" / "targets.json").read_text())
DENSE = ("SDPA causal (flash)", "SDPA mask (flash)")
FLEX = {
    False: ("FlexAttention", "FlexAttention, 64 blocks"),
    True: ("FlexAttention, permuted", "FlexAttention, permuted, 64 blocks"),
}
SHIM = "int mkl_serv_intel_cpu_true(void) { return 1; }\nint mkl_serv_intel_cpu(void) { return 1; }\n"


@dataclass(frozen=True)
class Case:
    """One attention row of the table: times as long as ours that each opponent should take."""

    part: str
    pattern: str
    grid: int
    heads: int
    dtype: str
    backward: bool
    dense: float | None = None
    dense_forced: float | None = None
    flex: float | None = None

    @property
    def title(self) -> str:
        direction = "backward" if self.backward else "forward"
        return f"{self.pattern} {self.grid} x {self.grid}, {self.heads} heads, {direction} {self.dtype}"

    def cell(self, names: Sequence[str]) -> Cell:
        """The attention cell with these competitors."""
        chosen = [competitor for competitor in attention_competitors() if competitor.name in names]
        dtype = DTYPES[self.dtype]
        return attention.cell(
            CPU, self.pattern, 256, self.grid, dtype, self.backward, batch=1, heads=self.heads, competitors=chosen
        )


def _cases() -> list[Case]:
    found = []
    for row in TARGETS["attention"]:
        aims = {name: row.get(name) for name in ("dense", "dense_forced", "flex")}
        for pattern in row["patterns"]:
            found.append(
                Case(row["part"], pattern, row["grid"], row["heads"], row["dtype"], row.get("backward", False), **aims)
            )
    return found


PARTS = ("forward", "convolution", "backward", "large", "shapes", "gumbel", "decode", "forced")
USUAL = "D 64"
# Row attention with 8 heads: text, rows, columns, batch, width.
SHAPES = {
    USUAL: (256, 32, 32, 1, 64),
    "D 32": (256, 32, 32, 1, 32),
    "D 80": (256, 32, 32, 1, 80),
    "D 128": (256, 32, 32, 1, 128),
    "B 4": (256, 32, 32, 4, 64),
    "S 1274 = 251 + 31 x 33": (251, 31, 33, 1, 64),
}


def main(output: Path, parts: Sequence[str] = (), dry_run: bool = False) -> int:
    """Measures `parts` of the table (all, where none is named), prints it and records it."""
    parts = tuple(parts) or PARTS
    if unknown := set(parts) - set(PARTS):
        print(f"--part: got {', '.join(sorted(unknown))}, wanted some of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    if dry_run:
        print("\n".join(case.title for case in _cases() if case.part in parts))
        print("\n".join(part for part in parts if part in ("shapes", "gumbel", "decode", "forced")))
        return 0
    limit_memory()
    recorder = Recorder(output)
    bench = Bench(Options(CPU, seconds=2.0), recorder, command="cpu")
    bench.begin()
    once = {"shapes": 4, "gumbel": len(TARGETS["gumbel"]), "decode": 6}
    bench.expect(sum(case.part in parts for case in _cases()) + sum(once.get(part, 0) for part in parts))
    entries = _attention(bench, parts)
    if "shapes" in parts:
        entries += _shapes(bench)
    if "gumbel" in parts:
        entries += _gumbel(bench)
    if "decode" in parts:
        entries += _decode(bench)
    if "forced" in parts and not bench.interrupted:
        entries += _forced(bench)
    records = [{"kind": "cpu", "run": bench.run_id} | entry for entry in entries]
    recorder.add(records)
    print("\n" + "\n".join(table(records)))
    return 130 if bench.interrupted else 0


# --- What is measured -------------------------------------------------------------------------------------------------


def _aim(ratio: float | None, dtype: str = "fp32") -> float | None:
    """The aim, where it applies: on a processor with AVX-512, of bf16 on one that multiplies it."""
    wanted = ("avx512_bf16",) if dtype == "bf16" else ("avx512", "avx512_bf16")
    return ratio if native.instruction_set() in wanted else None


def _entry(
    case: str, against: str, theirs: dict[str, Any], ours: dict[str, Any], target: float | None, **more: Any
) -> dict[str, Any]:
    ratio = theirs["ms"] / ours["ms"]
    return {
        "case": case,
        "against": against,
        "ratio": ratio,
        "target": target,
        "met": None if target is None else ratio >= target,
        "ours_ms": ours["ms"],
        "theirs_ms": theirs["ms"],
        "theirs": theirs["contender"],
        "share": ours.get("ceiling_fraction"),
    } | more


def _measured(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
    """Our row, where it is good, and the others' by name."""
    good = {row["contender"]: row for row in rows if row["status"] == "ok"}
    return good.pop("dalle_kernels", None), good


def _fastest(rows: dict[str, dict[str, Any]], names: Sequence[str]) -> dict[str, Any] | None:
    return min((rows[name] for name in names if name in rows), key=lambda row: row["ms"], default=None)


def _attention(bench: Bench, parts: Sequence[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    per_pair: dict[tuple[str, str, int], float] = {}
    for case in _cases():
        if case.part not in parts or bench.interrupted:
            continue
        flex = () if case.backward else FLEX[case.pattern == "column"]
        ours, theirs = _measured(bench.run([case.cell((*DENSE, *flex))]))
        if ours is None:
            continue
        if not case.backward:
            pairs = ours["visible_pairs"] * case.heads
            per_pair[case.pattern, case.dtype, case.grid] = ours["ms"] / pairs
        for against, names, target in (("best dense", DENSE, case.dense), ("FlexAttention", flex, case.flex)):
            if best := _fastest(theirs, names):
                found.append(_entry(case.title, against, best, ours, _aim(target, case.dtype)))
    for (pattern, dtype, grid), large in per_pair.items():
        if grid == 64 and (small := per_pair.get((pattern, dtype, 32))):
            found.append(
                {
                    "case": f"{pattern} forward {dtype}, time per visible pair",
                    "against": "64 x 64 over 32 x 32",
                    "ratio": large / small,
                    "target": TARGETS["time_per_pair_64_over_32"],
                    "met": large / small <= TARGETS["time_per_pair_64_over_32"],
                }
            )
    return found


def _shapes(bench: Bench) -> list[dict[str, Any]]:
    """Time per visible pair and unit of width, as a multiple of the usual shape's; all shapes timed in turn."""
    found = []
    most = TARGETS["time_per_pair_over_usual_shape"]
    for backward in (False, True):
        for dtype in ("fp32", "bf16"):
            direction = "backward" if backward else "forward"
            case = {"pattern": "row", "heads": 8, "dtype": dtype, "pass": direction}
            make = partial(_shape_contenders, DTYPES[dtype], backward)
            rows = bench.run([Cell("shapes", case, DTYPES[dtype], Work, make)])
            rates = {row["contender"]: row["pair_dims_per_s"] for row in rows if row["status"] == "ok"}
            for name, rate in rates.items():
                if name != USUAL and USUAL in rates:
                    ratio = rates[USUAL] / rate
                    entry = {"case": f"row {direction} {dtype}, time per visible pair and width", "against": name}
                    found.append(entry | {"ratio": ratio, "target": most, "met": ratio <= most})
    return found


def _shape_contenders(dtype: torch.dtype, backward: bool) -> list[Contender]:
    def prepare(problem: Problem) -> Trial:
        trial = next(iter(attention.contenders(problem, ()))).prepare()
        pairs = problem.pattern.visible_pairs * problem.batch * problem.heads
        trial.counts["pair_dims"] = pairs * problem.width
        return trial

    found = []
    for name, (text, rows, columns, batch, width) in SHAPES.items():
        pattern = Row(TokenLayout(text, (rows, columns)))
        problem = Problem(pattern, batch, 8, width, dtype, CPU, backward)
        found.append(Contender(name, partial(prepare, problem)))
    return found


def _gumbel(bench: Bench) -> list[dict[str, Any]]:
    found = []
    for direction, aims in TARGETS["gumbel"].items():
        cell = codebook.gumbel_cell(CPU, 1024, torch.float32, False, "backward" in direction)
        ours, theirs = _measured(bench.run([cell]))
        title = f"Gumbel lookup 1024 x 8192 -> 128 fp32, {direction}"
        if ours is None:
            continue
        if "eager" in theirs:
            found.append(_entry(title, "eager", theirs["eager"], ours, _aim(aims["eager"])))
        if best := _fastest(theirs, ("compiled", "compiled, uniform noise")):
            found.append(_entry(title, "compiled", best, ours, _aim(aims["compiled"])))
    return found


def _decode(bench: Bench) -> list[dict[str, Any]]:
    found = []
    for pattern in ("row", "column", "convolution"):
        for dtype in (torch.float32, torch.bfloat16):
            cell = decode.cell(CPU, pattern, 256, 32, dtype, batch=8, competitors=())
            ours, theirs = _measured(bench.run([cell]))
            if ours is not None and decode.YARDSTICK in theirs:
                copy = theirs[decode.YARDSTICK]
                entry = _entry(f"decode, {pattern} {cell.case['dtype']}, B 8, H 8", "the copy", copy, ours, None)
                entry |= {"ratio": ours["ms"] / copy["ms"], "target": TARGETS["decode_over_copy"]}
                found.append(entry | {"met": entry["ratio"] <= TARGETS["decode_over_copy"]})
    return found


# --- MKL's AVX-512 path -----------------------------------------------------------------------------------------------


def obstacle_to_forcing() -> str | None:
    """Why MKL's AVX-512 path cannot or need not be forced here, or None."""
    if platform.system() != "Linux":
        return "a library is preloaded the way Linux does it"
    if machine(CPU).get("vendor_id") == "GenuineIntel":
        return "on an Intel processor MKL takes it as installed"
    if not torch.backends.mkl.is_available():
        return "this torch was built without MKL"
    if "avx512" not in torch.backends.cpu.get_cpu_capability().lower():
        return "this processor has no AVX-512"
    if shutil.which("cc") is None:
        return "there is no C compiler to build the preloaded library with"
    return None


def torch_mm_rate() -> float:
    """TFLOP/s of torch's own product of large float32 matrices."""
    ceiling = ceiling_of("gemm", torch.float32, CPU)
    timer = timer_of([ceiling.runs["torch.mm"]], CPU)
    return ceiling.rate(min(timer.sample() for _ in range(5)))


def _forced(bench: Bench) -> list[dict[str, Any]]:
    """The dense baselines, and ours beside them, in a process whose MKL believes that the processor is Intel's."""
    if reason := obstacle_to_forcing():
        print(f"no brackets: {reason}")
        return []
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "intel.c"), Path(folder, "intel.so")
        source.write_text(SHIM)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
        output = Path(folder, "rows.jsonl")
        environment = os.environ | {"LD_PRELOAD": str(library)}
        subprocess.run([sys.executable, "-m", "benchmarks.suites.cpu", output], env=environment, check=True)
        records = read_records([output])
    forced = next(record["torch_mm_tflops"] for record in records if record["kind"] == "torch.mm")
    installed = torch_mm_rate()
    print(f"torch.mm fp32: {installed:.3g} TFLOP/s as installed, {forced:.3g} forced")
    found = []
    for case in _cases():
        cell = case.cell(())
        ours, theirs = _measured([r for r in records if r["kind"] == "row" and r["case"] == cell.case])
        if ours and (best := _fastest(theirs, DENSE)):
            more = {"forced_mm_tflops": forced, "installed_mm_tflops": installed}
            found.append(
                _entry(case.title, "best dense, MKL's AVX-512 path forced", best, ours, case.dense_forced, **more)
            )
    return found


def _measure_forced(output: Path) -> None:
    limit_memory()
    recorder = Recorder(output)
    recorder.add([{"kind": "torch.mm", "torch_mm_tflops": torch_mm_rate()}])
    bench = Bench(Options(CPU, seconds=1.0), recorder, command="cpu, MKL's AVX-512 path forced")
    bench.begin()
    bench.run([case.cell(DENSE) for case in _cases()])


# --- The table --------------------------------------------------------------------------------------------------------


def table(records: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: a case a line; ratios with their targets beside them, short of target in bold."""
    latest = {(record["case"], record["against"]): record for record in records}
    lines = []
    cases = list(dict.fromkeys(case for case, _ in latest))
    attention_cases = [case for case in cases if (case, "best dense") in latest or (case, "FlexAttention") in latest]
    forced = "best dense, MKL's AVX-512 path forced"
    attention_cases += [case for case in cases if (case, forced) in latest and case not in attention_cases]
    if attention_cases:
        lines += [
            "| attention, S = 256 + grid, B = 1, D = 64 | ours, ms | share of GEMM |"
            " best dense [MKL's AVX-512 path] | FlexAttention |"
        ]
        lines += ["|---|---|---|---|---|"]
        for case in attention_cases:
            dense, bracket, flex = (latest.get((case, name)) for name in ("best dense", forced, "FlexAttention"))
            ours = next(entry for entry in (dense, bracket, flex) if entry)
            share = f"{ours['share']:.0%}" if ours.get("share") else "-"
            first = (_ratio(dense) if dense else "-") + (f" [{_ratio(bracket)}]" if bracket else "")
            lines.append(f"| {case} | {ours['ours_ms']:.3g} | {share} | {first} | {_ratio(flex) if flex else '-'} |")
        lines.append("")
    others = [key for key in latest if key[0] not in attention_cases]
    if others:
        lines += ["| case | against | ours, ms | ratio |", "|---|---|---|---|"]
        for key in others:
            entry = latest[key]
            ours = f"{entry['ours_ms']:.3g}" if "ours_ms" in entry else ""
            lines.append(f"| {key[0]} | {key[1]} | {ours} | {_ratio(entry)} |")
    return lines


def _ratio(entry: dict[str, Any]) -> str:
    text = f"{entry['ratio']:.3g}x"
    if entry["target"] is None:
        return text
    limit = "at most" if "theirs_ms" not in entry or entry["against"] == "the copy" else "target"
    return (text if entry["met"] else f"**{text}**") + f" ({limit} {entry['target']:g}x)"


if __name__ == "__main__":
    _measure_forced(Path(sys.argv[1]))
