"""The script behind `make matrix`: which versions it takes, and what it writes. The environments are not made here."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests import matrix

RECORD = {"python": "3.11.7", "torch": "2.9.0", "triton": "3.6.0", "numpy": "1.26.4", "answers": 9, "tests": 12}
RECORD |= {"sources": "0123456789ab", "processor": "a processor"}


def test_what_is_promised_is_tried_at_its_lower_end() -> None:
    dependencies = tomllib.loads((matrix.ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    least = dict(re.fullmatch(r"(\w+)>=([\d.]+)", dependency).groups() for dependency in dependencies)  # type: ignore[union-attr]
    oldest = matrix.PAIRINGS[0]
    assert oldest.torch.startswith(least["torch"] + ".")
    assert oldest.numpy.startswith(f"numpy=={least['numpy']}.")
    assert len({pairing.record for pairing in matrix.PAIRINGS}) == len(matrix.PAIRINGS)


def test_every_room_with_triton_kernels_is_tested() -> None:
    kernels = matrix.ROOT / "dalle_kernels"
    rooms = {path.relative_to(kernels).parts[0] for path in kernels.rglob("triton.py")}
    tested = {Path(name).parts[1] for name in matrix.triton_tests()}
    assert rooms
    assert rooms <= tested


def test_the_table_keeps_the_rows_of_other_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "TABLE", tmp_path / "matrix.md")
    matrix.write_table([{**RECORD, "torch": "2.11.0+cu130"}])
    matrix.write_table([RECORD])
    matrix.write_table([{**RECORD, "tests": 13}])
    rows = [line for line in matrix.TABLE.read_text().splitlines() if line.startswith("| 3")]
    assert [row.split(" | ")[1] for row in rows] == ["2.9.0", "2.11.0+cu130"], "in the order of the versions"
    assert " | 9 | 13 | 0123456789ab | a processor |" in rows[0]


def test_a_step_that_fails_is_named_with_the_end_of_its_output(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    program.symlink_to(sys.executable)
    environment = matrix.Environment(tmp_path, tmp_path / "log")
    assert environment.run("speaking", "python", "-c", "print('well')") == "well\n"
    with pytest.raises(matrix.StepError, match=r"counting failed, .*log:\n +one\n +two$"):
        environment.run("counting", "python", "-c", "print('one\\ntwo'); raise SystemExit(3)")
    assert "$ python -c print('well')\nwell\n" in (tmp_path / "log").read_text()


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        matrix.main(["--only", "torch 1.0"])
    assert "--only torch 1.0: no pairing is named so; --list names them" in capsys.readouterr().err
