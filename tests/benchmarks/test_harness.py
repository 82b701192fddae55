"""The harness: what becomes of contenders that are wrong, fail, are missing or slow; interruption; records; report."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import against, report
from benchmarks.__main__ import ON_CPU, SUITES, cells_of, main
from benchmarks.fit import NEEDS, fit
from benchmarks.harness import (
    ROOT,
    Bench,
    Cell,
    Check,
    Contender,
    Options,
    Recorder,
    Trial,
    UnavailableError,
    Work,
    label,
    peak_memory,
    quantile,
    read_records,
)
from benchmarks.suites import codebook, cpu, decode, neighborhood, sampling
from benchmarks.suites.attention import cell as attention_cell
from benchmarks.suites.choice import Choice
from dalle_kernels import Row, TokenLayout, sparse_attention

CPU = torch.device("cpu")
OPTIONS = Options(CPU, seconds=0.0, patience=5.0)


def trial(run: Callable[[], object] = lambda: None, error: float = 0.0) -> Trial:
    return Trial([run], lambda: Check(error, 1.0), {"note": "n"}, {"things": 2})


def cell_of(*contenders: Contender, series: str = "") -> Cell:
    return Cell("test", {"size": 1}, torch.float32, lambda: Work(flops=10), lambda: contenders, series)


def run(*cells: Cell, options: Options = OPTIONS, path: Path | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    said: list[str] = []
    bench = Bench(options, Recorder(path), say=said.append)
    return bench.run(cells), said


def raising(error: BaseException) -> Callable[[], Trial]:
    def prepare() -> Trial:
        raise error

    return prepare


def test_good_rows_carry_the_figures(tmp_path: Path) -> None:
    rows, said = run(cell_of(Contender("ours", trial), Contender("theirs", trial)), path=tmp_path / "r.jsonl")
    assert [row["status"] for row in rows] == ["ok", "ok"]
    for row in rows:
        assert row["p20_ms"] <= row["ms"] <= row["p80_ms"]
        assert row["samples"] >= 3
        assert {"ratio", "tflops", "ceiling_fraction", "peak_bytes", "error", "note", "things_per_s"} <= row.keys()
    assert rows[0]["ratio"] == 1.0
    assert read_records([tmp_path / "r.jsonl"]) == json.loads(json.dumps(rows))
    assert any("ratio" in line for line in said)


def test_a_wrong_answer_is_not_timed() -> None:
    for error in (2.0, float("nan")):
        rows, said = run(cell_of(Contender("ours", trial), Contender("wrong", partial(trial, error=error))))
        assert rows[1]["status"] == "wrong"
        assert "ms" not in rows[1]
        assert any("wrong" in line for line in said)


def test_what_fails_is_a_row_and_the_run_goes_on() -> None:
    contenders = [
        Contender("ours", trial),
        Contender("absent", raising(UnavailableError("it needs a moon"))),
        Contender("broken", raising(ValueError("lost /some/where/on/this/machine/file.py"))),
        Contender("large", raising(RuntimeError("DefaultCPUAllocator: not enough memory: you tried"))),
        Contender("last", trial),
    ]
    rows, said = run(cell_of(*contenders))
    assert [row["status"] for row in rows] == ["ok", "skipped", "failed", "out of memory", "ok"]
    assert rows[1]["reason"] == "it needs a moon"
    assert "/some/where" not in json.dumps(rows)
    assert any("it needs a moon: absent" in line for line in said)


def test_a_contender_that_gave_up_skips_larger_sizes() -> None:
    small = cell_of(Contender("ours", trial), Contender("large", raising(MemoryError("no"))), series="s")
    rows, _ = run(small, cell_of(Contender("ours", trial), Contender("large", trial), series="s"))
    assert rows[3]["status"] == "skipped"
    assert "out of memory" in rows[3]["reason"]


def test_a_slow_contender_is_not_waited_for() -> None:
    rows, _ = run(cell_of(Contender("ours", trial)), options=Options(CPU, seconds=0.0, patience=-1.0))
    assert rows[0]["status"] == "too slow"


def test_an_interruption_keeps_what_was_measured(tmp_path: Path) -> None:
    cells = [
        cell_of(Contender("ours", trial)),
        cell_of(Contender("ours", trial), Contender("next", raising(KeyboardInterrupt()))),
        cell_of(Contender("never", trial)),
    ]
    rows, said = run(*cells, path=tmp_path / "r.jsonl")
    assert [row["status"] for row in rows] == ["ok", "ok", "interrupted"]
    assert len(read_records([tmp_path / "r.jsonl"])) == 3
    assert "interrupted: what was measured is kept" in said


def test_contenders_can_be_chosen() -> None:
    contenders = [Contender("ours", trial), Contender("a", trial), Contender("b", trial)]
    rows, _ = run(cell_of(*contenders), options=Options(CPU, 0.0, 5.0, ("b",)))
    assert [row["contender"] for row in rows] == ["ours", "b"]


def test_quantiles() -> None:
    assert [quantile([3.0, 1.0, 2.0, 5.0, 4.0], share) for share in (0.2, 0.5, 0.8)] == [2.0, 3.0, 5.0]


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is Linux's")
def test_peak_memory_sees_results_in_kept_memory() -> None:
    layout = TokenLayout(256, (16, 16))
    q = torch.randn(1, 8, layout.length, 64)
    sparse_attention(q, q, q, Row(layout))
    assert 0.9 * q.nbytes < peak_memory(lambda: sparse_attention(q, q, q, Row(layout)), CPU) < 3 * q.nbytes  # type: ignore[operator]


def test_peak_memory_sees_what_is_freed_again() -> None:
    def use() -> None:
        torch.ones(2**24)  # 64 MB

    assert 60e6 < peak_memory(use, CPU) < 80e6  # type: ignore[operator]


@pytest.mark.parametrize("suite", [*SUITES, *ON_CPU])
def test_every_suite_lists_its_cells(suite: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", suite, "--dry-run", "--device", "cpu"]) == 0
    everything = capsys.readouterr().out.splitlines()
    assert main(["run", suite, "--dry-run", "--quick", "--device", "cpu"]) == 0
    quick = capsys.readouterr().out.splitlines()
    assert 1 <= len(quick) <= len(everything)
    assert len(cells_of(suite, Choice(CPU))) == len(everything)


def test_the_grid_of_cells_follows_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    wishes = ["--grid", "16,32", "--text", "0,64", "--dtype", "bf16", "--pattern", "row"]
    main(["run", "attention", "--dry-run", "--device", "cpu", *wishes])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 2 * 2
    assert all("pattern row" in line and "dtype bf16" in line for line in lines)


def test_cells_are_matched_by_their_titles(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quantizers", "--match", "codes 65536, width 16", "--dry-run"]) == 0
    titles = capsys.readouterr().out.splitlines()
    assert len(titles) == 2
    assert all(title.endswith("rows 1024, codes 65536, width 16") for title in titles)


@pytest.mark.parametrize(
    "words",
    [
        ["run", "attention", "--dtype", "fp8"],
        ["run", "quantizers", "--match", "dice"],
        ["run", "attention", "--pattern", "spiral"],
        ["run", "chess"],
        ["chess"],
    ],
)
def test_bad_options_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert words[-1] in capsys.readouterr().err


SMALL = [
    attention_cell(CPU, "row", 16, 8, torch.float32, False, competitors=()),
    attention_cell(CPU, "column", 0, 8, torch.bfloat16, True, competitors=()),
    neighborhood.cell(CPU, (9, 10), (3, 5), 2, 16, torch.float32, True, competitors=()),
    decode.cell(CPU, "convolution", 16, 8, torch.float32, 2, competitors=()),
    codebook.gumbel_cell(CPU, 64, torch.float32, False, True, codes=128, width=16, competitors=()),
    codebook.gumbel_cell(CPU, 64, torch.bfloat16, True, False, codes=128, width=16, competitors=()),
    codebook.gumbel_cell(CPU, 64, torch.float32, True, True, codes=128, width=16, competitors=()),
    codebook.vq_cell(CPU, 64, torch.float32, True, codes=128, width=16, competitors=()),
    codebook.vq_cell(CPU, 64, torch.bfloat16, False, codes=128, width=16, competitors=()),
    codebook.vq_best_cell(CPU, 64, torch.float32, k=8, codes=128, width=16, competitors=()),
    codebook.vq_best_cell(CPU, 64, torch.float32, temperature=0.9, codes=128, width=16, competitors=()),
    codebook.laplace_cell(CPU, 1000, torch.float32, competitors=()),
    sampling.cell(CPU, 8, torch.float32, "guidance, top-k 256, top-p 0.9", 512, competitors=()),
]


@pytest.mark.parametrize("cell", SMALL, ids=str)
def test_ours_passes_the_benchmark_s_check(cell: Cell) -> None:
    ours = next(iter(cell.contenders())).prepare()
    ours.runs[0]()
    check = ours.verify()
    assert check.passed, check
    assert cell.work().flops or cell.work().bytes


def test_quantizers_agree_with_their_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours and theirs, where it is installed; wrong codes and wrong gradients are caught."""
    from benchmarks.suites import quantizers

    cells = [
        quantizers.product_cell(CPU, 96, 300, 16),
        quantizers.vq_cell(CPU, 96, 300, 16),
        quantizers.residual_cell(CPU, 96, 2, 64, 16),
        quantizers.lfq_cell(CPU, 96, 8, False),
        quantizers.lfq_cell(CPU, 96, 8, True),
        quantizers.ibq_cell(CPU, 96, 300, 16),
    ]
    for cell in cells:
        for contender in cell.contenders():
            with contextlib.suppress(UnavailableError):
                trial = contender.prepare()
                trial.runs[0]()
                assert trial.verify().passed, (cell, contender.name)
    right, step = quantizers.vq_lookup, quantizers._ibq_ours
    monkeypatch.setattr(quantizers, "vq_lookup", lambda features, codes: right(features.roll(1, 0), codes))
    monkeypatch.setattr(quantizers, "_ibq_ours", lambda features, codes: step(features, 1.01 * codes))
    for cell in (cells[0], cells[-1]):
        assert not next(iter(cell.contenders())).prepare().verify().passed


def test_the_check_catches_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.suites import attention

    right = attention.sparse_attention
    monkeypatch.setattr(attention, "sparse_attention", lambda *args, **named: right(*args, **named) * 1.1)
    for cell in SMALL[:2]:
        assert not next(iter(cell.contenders())).prepare().verify().passed


def test_whole_models_agree_with_the_same_models_on_sdpa() -> None:
    from benchmarks.suites import generation, training

    cells = [
        training.cell(CPU, 8, 4, torch.float32, layers=2, heads=2),
        generation.cell(CPU, 8, 4, torch.float32, 2, layers=2, heads=2, tokens=5),
        generation.candidates_cell(CPU, torch.float32, 3, tokens=3, preset="demo"),
    ]
    for cell in cells:
        for contender in cell.contenders():
            try:
                ready = contender.prepare()
            except UnavailableError:
                continue
            ready.runs[0]()
            assert ready.verify().passed, (str(cell), contender.name)


@pytest.mark.parametrize("quick", [False, True])
def test_candidates_are_drawn_by_every_model(quick: bool) -> None:
    from benchmarks.suites import generation
    from benchmarks.suites.choice import Choice

    numbers: dict[str, list[int]] = {}
    for cell in generation.cells(Choice(CPU, quick=quick)):
        assert cell.suite == "generation"
        if "peer" in cell.case or "candidates" in cell.case:
            number = cell.case.get("candidates", cell.case.get("batch"))
            numbers.setdefault(cell.case.get("peer", "dalle_reference"), []).append(number)
    theirs = [1, 16] if quick else [1, 16, 64, 512]
    assert numbers.pop("dalle_reference") == [1, 16, 64, 512]
    assert numbers == dict.fromkeys(("DALLE-pytorch", "ruDALL-E", "transformers' Llama"), theirs)


def test_peers_agree_before_and_after() -> None:
    from benchmarks.suites import integrations as peers
    from benchmarks.suites import integrations_rudalle, integrations_transformers

    sizes = {"grid": 4, "text": 8, "hidden": 64}
    cells = [
        *(peers.dalle_pytorch_module(CPU, kind, True, kind == "full", 4, 8, 1) for kind in peers.MIXED),
        peers.dalle_pytorch_training(CPU, 4, 8, 1),
        peers.dalle_pytorch_sampling(CPU, 2, 1.0, 5, 4, 8, 1),
        peers.dalle_pytorch_sampling(CPU, 1, 3.0, 5, 4, 8, 1),
        peers.dalle_pytorch_sampling(CPU, 2, 1.0, 5, 4, 8, 1, number=3),
        *integrations_rudalle.cells(CPU, **sizes),
        *integrations_transformers.cells(CPU, **sizes),
    ]
    for cell in cells:
        for contender in cell.contenders():
            ready = contender.prepare()
            ready.runs[0]()
            assert ready.verify().passed, (str(cell), contender.name)


def test_the_table_of_aims() -> None:
    theirs = {"contender": "SDPA causal (flash)", "ms": 12.0}
    rows = [
        cpu._entry("row", "best dense", theirs, {"ms": 2.0}, 6.0),
        cpu._entry("row", "best dense, MKL's AVX-512 path forced", theirs | {"ms": 5.0}, {"ms": 2.0}, 3.0),
        cpu._entry("gumbel", "eager", {"contender": "eager", "ms": 200.0}, {"ms": 10.0}, 22.0),
    ]
    text = "\n".join(cpu.table(rows))
    assert "| row | 2 | - | 6x (target 6x) [**2.5x** (target 3x)] | - |" in text
    assert "| gumbel | eager | 10 | **20x** (target 22x) |" in text


def test_revisions_are_compared() -> None:
    samples = {"row": {"new": [1.0, 2.0, 3.0], "old": [4.0, 5.0, 1.0]}, "column": {"new": [1.0]}}
    lines = against.compare(samples, ["new", "old"])
    assert lines[1].split()[:3] == ["2.00x", "2", "4"]
    assert "only one" in lines[2]
    assert against._without(["attention", "--against", "main", "--quick"], "--against") == ["attention", "--quick"]


def _results(folder: Path) -> None:
    records: list[dict[str, Any]] = [
        {
            "kind": "run",
            "run": "r1",
            "command": "attention",
            "machine": {"name": "Test CPU", "cores": 2, "cpu family": "1"},
            "versions": {"torch": "2"},
            "commit": "abc",
        }
    ]
    for grid in (16, 32, 64):
        for contender, ratio in (("dalle_kernels", 1.0), ("SDPA causal (flash)", 4.0)):
            case = {"pattern": "row", "grid": grid, "text": 256, "batch": 1, "heads": 2, "width": 64}
            case |= {"dtype": "fp32", "pass": "forward"}
            row = {"kind": "row", "run": "r1", "suite": "attention", "case": case, "contender": contender}
            row |= {"ceiling": "gemm fp32", "ceiling_rate": 0.3, "ceiling_fraction": 0.5}
            records.append(row | {"status": "ok", "ms": grid * ratio, "ratio": ratio, "peak_bytes": 1000 * grid})
    theirs = {"contender": "eager", "ms": 200.0}
    records.append({"kind": "cpu", "run": "r1"} | cpu._entry("gumbel", "eager", theirs, {"ms": 10.0}, 22.0))
    Recorder(folder / "test.jsonl").add(records)


def test_the_report_writes_plots_a_page_and_readme_s_rows(tmp_path: Path) -> None:
    results, readme = tmp_path / "results", tmp_path / "README.md"
    _results(results)
    readme.write_text(f"before\n{report.START}\nstale\n{report.END}\nafter\n")
    assert report.main([], results, readme) == 0
    first, page = readme.read_text(), (results / report.PAGE).read_text()
    assert first.startswith(f"before\n{report.START}\nTest CPU, 2 cores, torch 2, commit abc;")
    assert first.endswith(f"{report.END}\nafter\n")
    assert "stale" not in first
    assert "| attention, row, forward, fp32 | 32 | 50% of gemm fp32 | SDPA causal (flash) 4x |" in first
    assert "## Test CPU" in page
    assert "**20x** (target 22x)" in page
    assert "gemm fp32 0.3 TFLOP/s" in page
    for name in ("scaling", "memory", "ratios"):
        assert f"(plots/test-cpu-{name}.svg)" in page
        assert (results / "plots" / f"test-cpu-{name}.png").stat().st_size > 5000
    drawn = (results / "plots" / "test-cpu-scaling.svg").read_bytes()
    assert report.main([], results, readme) == 0
    assert (readme.read_text(), (results / report.PAGE).read_text()) == (first, page)
    assert (results / "plots" / "test-cpu-scaling.svg").read_bytes() == drawn


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name"),
    [
        ("AuthenticAMD", 25, 1, "Zen 3"),
        ("AuthenticAMD", 25, 17, "Zen 4"),
        ("AuthenticAMD", 26, 2, "Zen 5"),
        ("GenuineIntel", 6, 143, "Sapphire Rapids"),
        ("GenuineIntel", 6, 1, ""),
    ],
)
def test_processors_of_one_name_are_told_apart(vendor: str, family: int, model: int, name: str) -> None:
    facts = {"name": "CPU", "vendor_id": vendor, "cpu family": str(family), "model": str(model)}
    facts["instruction_set"] = "avx2"
    assert label(facts) == ("CPU, " + name if name else "CPU") + ", avx2"


def test_readme_s_rows_come_from_one_clean_commit() -> None:
    def record(run: str, commit: str, machine: str = "a", suite: str = "training") -> dict[str, Any]:
        facts = {"run": run, "commit": commit, "machine": {"name": machine}}
        row = {"suite": suite, "status": "ok", "case": {}, "contender": "dalle_kernels"}
        return {"run": run, "kind": "row", "facts": facts} | row

    records = [record("1", "old"), record("2", "clean"), record("3", "clean"), record("4", "dirty+")]
    assert report.newest({"a": records, "b": [record("2", "clean", "b")]}) == records[1:3]
    # A later commit that few cells were measured at does not take the page.
    assert report.newest({"a": [*records, record("5", "later", suite="neighborhood")]}) == records[1:3]


def test_competitors_in_bf16_without_its_instructions_are_marked() -> None:
    for instructions, marked in (("avx2", True), ("avx512", True), ("avx512_bf16", False)):
        facts = {"machine": {"instruction_set": instructions}}
        assert bool(report._unfit({"case": {"dtype": "bf16"}, "facts": facts})) is marked
        assert report._unfit({"case": {"dtype": "fp32"}, "facts": facts}) == ""


def test_aims_hold_where_the_processor_has_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for instructions, fp32, bf16 in (("avx2", None, None), ("avx512", 6, None), ("avx512_bf16", 6, 6)):
        monkeypatch.setattr(cpu.native, "instruction_set", lambda found=instructions: found)
        assert cpu._aim(6, "fp32") == fp32
        assert cpu._aim(6, "bf16") == bf16


def test_progress_counts_the_cells_of_the_whole_run(capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(OPTIONS, Recorder(None), say=lambda _: None)
    bench.expect(3)
    for _ in range(3):
        bench.run([cell_of(Contender("ours", trial))])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("]")[0].split(",")[0].lstrip("[") for line in lines] == ["1/3", "2/3", "3/3"]


def test_gpu_sh_reads_as_bash_and_says_what_it_wants() -> None:
    script = str(ROOT / "benchmarks" / "gpu.sh")
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert done.returncode != 0
    assert "OUTDIR" in done.stderr


def test_the_doctor_decides_what_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def seen(operation: str, backend: str, status: str, device: str = "cuda:0") -> dict[str, str]:
        return {"operation": operation, "backend": backend, "status": status, "device": device}

    findings = [seen(operation, "triton", "right") for needs in NEEDS.values() for operation in needs]
    assert fit(findings) == list(NEEDS)
    findings += [seen("sample_tokens", "triton", "wrong"), seen("sparse_attention", "triton", "failed")]
    findings += [seen("sparse_attention", "cuda", "right"), seen("vq_lookup", "cuda", "refused")]
    assert fit(findings) == [suite for suite in NEEDS if suite not in ("sampling", "generation", "pixels")]
    assert fit([seen("sample_tokens", "reference", "right"), seen("sample_tokens", "cpu", "right", "cpu")]) == []
    path = tmp_path / "found.json"
    path.write_text(json.dumps(findings[:3]))
    assert main(["fit", str(path)]) == 0
    assert capsys.readouterr().out == "attention neighborhood decode integrations\n"
    assert set(NEEDS) == set(SUITES)
