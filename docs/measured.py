"""The page of measurements: plots and tables of the committed results, and every row of them in a table that sorts."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.harness import RESULTS, label, read_records

COLUMNS = (
    "suite",
    "case",
    "contender",
    "ms",
    "times ours",
    "share of ceiling",
    "peak MB",
    "machine",
    "commit",
    "command",
)
_HEAD = """# Measured

What stands here is drawn and counted from the results in `benchmarks/results` when the site is built; nothing is
measured then. Times are medians of interleaved runs in one process, and every answer was checked first. No GPU kernel
has been run on a GPU yet.

`python -m benchmarks run SUITE` measures your own machine, `python -m benchmarks report` writes its tables.

## Everything

"""


def pages() -> Iterator[tuple[str, str | bytes]]:
    """(path, content): the page and its plots."""
    machines = report.by_machine(read_records(sorted(RESULTS.glob("*.jsonl"))))
    lines = [_HEAD, _table([row for records in machines.values() for row in records if row["kind"] == "row"])]
    with tempfile.TemporaryDirectory() as folder:
        plots = Path(folder) / "plots"
        for machine, records in machines.items():
            section = "\n".join(report.section(machine, records, plots))
            lines += [re.sub(r"^\[!\[(.*?)\]\((.*?)\.png\)\]\(.*?\)$", r"![\1](\2.svg){ .wide }", section, flags=re.M)]
            lines += [_commands(records)]
        for plot in sorted(plots.glob("*.svg")):
            yield f"measured/plots/{plot.name}", plot.read_bytes()
    yield "measured/index.md", "\n".join(lines)


def _commands(records: list[dict[str, Any]]) -> str:
    """Which command at which commit gave a machine's figures."""
    runs = {(record["facts"]["command"], record["facts"]["commit"]) for record in records}
    lines = [f"| `python -m benchmarks run {command}` | {commit} |" for command, commit in sorted(runs)]
    note = "\n\nA commit with + had changes that were not committed." if any("+" in line for line in lines) else ""
    return "\n".join(["Measured by", "", "| command | at commit |", "|---|---|", *lines]) + note + "\n"


def _table(rows: list[dict[str, Any]]) -> str:
    found = report.latest(rows, lambda row: (label(row["facts"]["machine"]), *report._case_key(row)))
    data = [_cells(row) for row in found if row["status"] == "ok"]
    payload = json.dumps({"columns": COLUMNS, "rows": data}).replace("<", "\\u003c")
    choices = "".join(
        f'<label>{COLUMNS[column]}<select data-column="{column}"><option value="">all</option></select></label>'
        for column in (0, 7)
    )
    return (
        f'<div class="measured"><script type="application/json">{payload}</script>'
        f'<div class="measured-controls">{choices}<label>words<input type="search" placeholder="row fp32 backward">'
        '</label></div><output></output><div class="measured-scroll"><table><thead></thead><tbody></tbody></table>'
        "</div></div>\n"
    )


def _cells(row: dict[str, Any]) -> list[str | float | None]:
    case = ", ".join(str(value) if isinstance(value, str) else f"{name} {value}" for name, value in row["case"].items())
    share = f"{row['ceiling_fraction']:.0%} of {row['ceiling']}" if "ceiling" in row else ""
    facts, peak = row["facts"], row.get("peak_bytes")
    return [
        row["suite"],
        case,
        row["contender"],
        row.get("ms"),
        row.get("ratio"),
        share,
        None if peak is None else peak / 1e6,
        label(facts["machine"]),
        facts["commit"],
        f"run {facts['command']}",
    ]
