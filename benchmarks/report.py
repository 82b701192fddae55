"""`python -m benchmarks report`: from the committed results to plots, a page of tables and README's headline rows.

Of every cell and contender the newest row counts, per machine. Nothing is measured here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import RESULTS, ROOT, label, read_records, slug
from benchmarks.suites import cpu

START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
PAGE = "README.md"  # beside the results
OURS = "dalle_kernels"
Record = dict[str, Any]

# README's rows: what a reader asks first, in words, by the suite and what its case must hold.
HEADLINES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("attention, row, forward, fp32", "attention", {"pattern": "row", "grid": 32, "dtype": "fp32", "pass": "forward"}),
    (
        "attention, row, backward, fp32",
        "attention",
        {"pattern": "row", "grid": 32, "dtype": "fp32", "pass": "backward"},
    ),
    (
        "attention, column, forward, bf16",
        "attention",
        {"pattern": "column", "grid": 32, "dtype": "bf16", "pass": "forward"},
    ),
    (
        "attention, row over 64 x 64, fp32",
        "attention",
        {"pattern": "row", "grid": 64, "dtype": "fp32", "pass": "forward"},
    ),
    (
        "attention, convolution, forward, fp32",
        "attention",
        {"pattern": "convolution", "grid": 32, "dtype": "fp32", "pass": "forward"},
    ),
    (
        "neighbourhoods of 7 x 7 in 56 x 56, forward, fp32",
        "neighborhood",
        {"shape": "56 x 56", "window": "7 x 7", "heads": 4, "dtype": "fp32", "pass": "forward"},
    ),
    (
        "neighbourhoods of 13 x 13 in 64 x 64, forward + backward, bf16",
        "neighborhood",
        {"shape": "64 x 64", "window": "13 x 13", "heads": 8, "dtype": "bf16", "pass": "forward + backward"},
    ),
    (
        "Gumbel lookup, forward + backward",
        "codebook",
        {"operation": "gumbel_lookup", "dtype": "fp32", "pass": "forward + backward"},
    ),
    ("decoding, row, 8 sequences", "decode", {"pattern": "row", "grid": 32, "dtype": "fp32", "batch": 8}),
    ("a training step of the reference model", "training", {}),
    ("sampling with the reference model", "generation", {}),
)


def main(arguments: Sequence[str] | None = None, results: Path = RESULTS, readme: Path = ROOT / "README.md") -> int:
    """Draws the plots and writes the page beside the results, and README's rows between its markers."""
    argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__.split("\n", 1)[0]).parse_args(
        arguments
    )
    machines = by_machine(read_records(sorted(results.glob("*.jsonl"))))
    if not machines:
        print(f"no results in {results.relative_to(ROOT) if results.is_relative_to(ROOT) else results}")
        return 1
    text = readme.read_text()
    if START not in text or END not in text:
        print(f"README has no {START} and {END} to write between")
        return 1
    lines = ["# Measured", "", "Written by `python -m benchmarks report` from the files beside this one.", ""]
    for name, records in machines.items():
        lines += section(name, records, results / "plots")
    _write(results / PAGE, "\n".join(lines).rstrip() + "\n")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    short = headlines(newest(machines))
    _write(readme, f"{before}{START}\n" + "\n".join(short).rstrip() + f"\n{END}{after}")
    print("\n".join(short))
    return 0


def newest(machines: dict[str, list[Record]]) -> list[Record]:
    """The records of the commit that has most of README's rows, on one machine and without uncommitted changes; of
    those with equally many, the latest."""
    everything = [record for records in machines.values() for record in records]
    clean = [record for record in everything if not record["facts"]["commit"].endswith("+")] or everything
    runs: dict[tuple[str, str], list[Record]] = {}
    for record in clean:
        runs.setdefault((record["facts"]["commit"], label(record["facts"]["machine"])), []).append(record)
    return max(runs.values(), key=lambda run: (len(_headline_rows(run)), max(record["run"] for record in run)))


def headlines(records: Sequence[Record]) -> list[str]:
    """README's rows."""
    facts = records[-1]["facts"]
    lines = [
        f"{label(facts['machine'])}, {facts['machine']['cores']} cores, torch {facts['versions']['torch']}, commit "
        f"{facts['commit']}; medians of interleaved runs, every answer checked first, times as long as ours:",
        "",
        "| | ours, ms | share of the machine's rate | others |",
        "|---|---|---|---|",
    ]
    for title, ours, others in _headline_rows(records):
        named = "; ".join(f"{row['contender']} {row['ratio']:.3g}x{_unfit(row)}" for row in others[:4])
        share = f"{ours['ceiling_fraction']:.0%} of {ours['ceiling']}" if "ceiling" in ours else ""
        lines.append(f"| {title} | {ours['ms']:.3g} | {share} | {named} |")
    return lines


def _headline_rows(records: Sequence[Record]) -> list[tuple[str, Record, list[Record]]]:
    """(title, ours, the others) of those that were measured."""
    rows = latest((record for record in records if record["kind"] == "row"), _case_key)
    found = []
    for title, suite, wanted in HEADLINES:
        group = [
            row
            for row in rows
            if row["suite"] == suite and row["status"] == "ok" and wanted.items() <= row["case"].items()
        ]
        ours = next((row for row in group if row["contender"].split(",")[0] == OURS), None)
        if ours is not None:
            others = [row for row in group if row is not ours and row["case"] == ours["case"] and "ratio" in row]
            found.append((title, ours, others))
    return found


def _unfit(row: Record) -> str:
    """Says of a competitor in bf16 that the processor does not multiply it: a path that nobody would take."""
    set_ = row["facts"]["machine"].get("instruction_set")
    emulated = row["case"].get("dtype") == "bf16" and set_ in ("avx2", "avx512")
    return " (bf16 without its instructions)" if emulated else ""


def by_machine(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Rows and `cpu` entries by the machine of their run, each with its run's facts under "facts"."""
    runs: dict[str, Record] = {}
    found: dict[str, list[Record]] = {}
    for record in records:
        if record.get("kind") == "run":
            runs[record["run"]] = record
        elif record.get("kind") in ("row", "cpu") and record["run"] in runs:
            facts = runs[record["run"]]
            found.setdefault(label(facts["machine"]), []).append(record | {"facts": facts})
    return found


def latest(records: Iterable[Record], key: Callable[[Record], Any]) -> list[Record]:
    """The last record of each key, in the order of their first."""
    return list({key(record): record for record in records}.values())


def _case_key(record: Record) -> tuple[Any, ...]:
    return record["suite"], tuple(sorted(record["case"].items())), record["contender"]


def section(machine: str, records: Sequence[Record], plots: Path) -> list[str]:
    """One machine's part of the page beside the results."""
    rows = latest((record for record in records if record["kind"] == "row"), _case_key)
    aims = latest((r for r in records if r["kind"] == "cpu"), lambda r: (r["case"], r["against"]))
    facts = records[-1]["facts"]
    commits = ", ".join(dict.fromkeys(record["facts"]["commit"] for record in [*aims, *rows]))
    details = [
        f"{facts['machine']['cores']} cores" if "cpu family" in facts["machine"] else "",
        f"torch {facts['versions']['torch']}",
    ]
    lines = [f"## {machine}", "", f"{', '.join(filter(None, details))}, measured at {commits}."]
    lines += [f"Medians of interleaved runs; every answer was checked first.{_ceilings(rows)}", ""]
    if facts["machine"].get("instruction_set") in ("avx2", "avx512"):
        lines += [
            "This processor has no instructions for products of bfloat16: torch's run hundreds of times slower than"
            " float32's, and nobody would take that path. Ratios to it say that ours can be used, not more.",
            "",
        ]
    if aims:
        lines += [
            "How many times as long the other takes, with the aim beside it, bold where it is missed."
            " In brackets: against SDPA with MKL's AVX-512 path, which MKL does not take on this processor by itself.",
            "",
            *cpu.table(aims),
            "",
        ]
    if operations := operation_table(rows):
        lines += [*operations, ""]
    for title, name, draw in (
        ("Time against the grid", "scaling", draw_scaling),
        ("Memory against the grid", "memory", draw_memory),
        ("Against the alternatives", "ratios", draw_ratios),
    ):
        figure = draw(rows, machine)
        if figure is not None:
            _save(figure, plots / f"{slug(machine)}-{name}")
            path = f"{plots.name}/{slug(machine)}-{name}"
            lines += [f"[![{title}, {machine}]({path}.png)]({path}.svg)", ""]
    return lines


def _ceilings(rows: Sequence[Record]) -> str:
    """The medians of what was measured beside the cells, by kind."""
    rates: dict[str, list[float]] = {}
    for row in rows:
        if "ceiling" in row:
            rates.setdefault(row["ceiling"], []).append(row["ceiling_rate"])
    if not rates:
        return ""
    said = (f"{name} {median(taken):.3g} {'GB/s' if name == 'copy' else 'TFLOP/s'}" for name, taken in rates.items())
    return f" Ceilings beside them (medians over the cells): {', '.join(said)}."


def operation_table(rows: Sequence[Record]) -> list[str]:
    """Per operation outside attention and the table of aims: our time, and each contender's ratio to it."""
    lines = ["| operation | ours, ms | how many times as long the others take |", "|---|---|---|"]
    cells: dict[tuple[Any, ...], list[Record]] = {}
    for row in rows:
        if row["suite"] != "attention" and row["facts"]["command"] != "cpu" and row["status"] == "ok":
            cells.setdefault(_case_key(row)[:2], []).append(row)
    for group in cells.values():
        ours = next((row for row in group if row["contender"].split(",")[0] == OURS), None)
        if ours is None or len(group) < 2:
            continue
        others = "; ".join(
            f"{row['contender']} {row['ratio']:.3g}x" for row in group if row is not ours and "ratio" in row
        )
        share = f" (attention is {ours['attention_share']:.0%} of it)" if ours.get("attention_share", 0) > 0 else ""
        case = ", ".join(
            str(value) if name in ("operation", "setting", "pattern", "dtype", "pass", "mode") else f"{name} {value}"
            for name, value in ours["case"].items()
        )
        lines.append(f"| {ours['suite']}: {case} | {ours['ms']:.3g}{share} | {others} |")
    return lines if len(lines) > 2 else []


# --- Plots ------------------------------------------------------------------------------------------------------------


def _figure(columns: int, height: float = 4.2) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "dalle_kernels"  # the same results give the same file
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(5.2 * columns, height), squeeze=False, layout="constrained")


def _curves(rows: Sequence[Record], figure_of: str) -> dict[tuple[str, str, str], dict[str, dict[int, float]]]:
    """{(pattern, dtype, pass): {contender: {grid: figure per head}}} of attention with the usual text."""
    found: dict[tuple[str, str, str], dict[str, dict[int, float]]] = {}
    for row in rows:
        if row["suite"] == "attention" and row["status"] == "ok" and row["case"]["text"] == 256 and row.get(figure_of):
            case = row["case"]
            panel = found.setdefault((case["pattern"], case["dtype"], case["pass"]), {})
            panel.setdefault(row["contender"], {})[case["grid"]] = row[figure_of] / (case["heads"] * case["batch"])
    return {key: panel for key, panel in found.items() if len({grid for curve in panel.values() for grid in curve}) > 2}


def _draw_curves(curves: dict[Any, dict[str, dict[int, float]]], machine: str, label: str) -> Any | None:
    panels = dict(list(curves.items())[:4])
    if not panels:
        return None
    figure, axes = _figure(len(panels))
    for axis, ((pattern, dtype, direction), contenders) in zip(axes[0], panels.items(), strict=True):
        for name, points in contenders.items():
            grids = sorted(points)
            style = {"linewidth": 2.5, "color": "black", "zorder": 3} if name == OURS else {"linewidth": 1}
            axis.plot(grids, [points[grid] for grid in grids], marker="o", markersize=3, label=name, **style)
        axis.set(xscale="log", yscale="log", xlabel="grid side", title=f"{pattern}, {dtype}, {direction}")
        ticks = sorted({grid for points in contenders.values() for grid in points})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(label)
    axes[0][0].legend(fontsize=6)
    figure.suptitle(machine, fontsize=9)
    return figure


def draw_scaling(rows: Sequence[Record], machine: str) -> Any | None:
    """Milliseconds a head against the side of the grid; None with fewer than three grids."""
    return _draw_curves(_curves(rows, "ms"), machine, "ms per head")


def draw_memory(rows: Sequence[Record], machine: str) -> Any | None:
    """Peak memory a head against the side of the grid."""
    curves = _curves(rows, "peak_bytes")
    scaled = {
        key: {name: {grid: value / 1e6 for grid, value in points.items()} for name, points in panel.items()}
        for key, panel in curves.items()
    }
    return _draw_curves(scaled, machine, "peak MB per head")


def draw_ratios(rows: Sequence[Record], machine: str) -> Any | None:
    """How many times as long each contender takes, for attention at 32 x 32."""
    cells: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        case = row["case"]
        if (
            row["suite"] == "attention"
            and case["grid"] == 32
            and case["text"] == 256
            and row.get("ratio")
            and row["contender"] != OURS
        ):
            cells.setdefault(f"{case['pattern']} {case['dtype']} {case['pass']}", []).append(
                (row["contender"], row["ratio"])
            )
    if not cells:
        return None
    panels = sorted(cells.items(), key=lambda item: -len(item[1]))[:4]
    figure, axes = _figure(len(panels))
    for axis, (title, bars) in zip(axes[0], panels, strict=True):
        bars = sorted(bars, key=lambda bar: bar[1])
        axis.barh([name for name, _ in bars], [ratio for _, ratio in bars], color="#557799")
        axis.axvline(1, color="black", linewidth=1)
        for place, (_, ratio) in enumerate(bars):
            axis.text(ratio, place, f" {ratio:.3g}x", va="center", fontsize=7)
        axis.set(title=title, xlabel="time, as a multiple of ours", xscale="log")
        axis.tick_params(axis="y", labelsize=7)
    figure.suptitle(machine, fontsize=9)
    return figure


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        partial = path.with_name(f"{path.name}.partial{suffix}")
        figure.savefig(partial, dpi=110, metadata=metadata)
        partial.replace(path.with_name(path.name + suffix))
    pyplot.close(figure)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
