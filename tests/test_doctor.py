"""The doctor finds an installation well, and a kernel that was made wrong ill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from dalle_kernels import doctor
from dalle_kernels.backends import choice
from dalle_kernels.likelihood import cpu as likelihood
from dalle_kernels.likelihood.contract import Outputs

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh_choices() -> Iterator[None]:
    choice.forget_choices()
    yield
    choice.forget_choices()


def test_this_installation_is_well() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "dalle_kernels.doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 wrong or failed" in done.stdout
    assert f"torch {torch.__version__.partition('+')[0]}" in done.stdout
    assert "times as fast as SDPA causal" in done.stdout
    for case in doctor.all_cases():
        assert case.name in done.stdout


def findings(name: str) -> dict[str, doctor.Finding]:
    """The CPU backends' answers in float32 to one case."""
    only = [case for case in doctor.all_cases() if case.name == name]
    with mock.patch.object(doctor, "all_cases", return_value=only):
        return {seen.backend: seen for seen in doctor.examine(CPU, [torch.float32], speed=False)}


def test_a_wrong_answer_is_found() -> None:
    right = likelihood.forward
    with mock.patch.object(likelihood, "forward", lambda inputs: Outputs(right(inputs).nll * 1.001)):
        seen = findings("likelihood")
    assert seen["cpu"].status == "wrong"
    assert seen["cpu"].chosen
    assert seen["reference"].status == "right"
    assert any("WRONG" in line for line in doctor.table(list(seen.values())))


def test_nan_is_a_wrong_answer() -> None:
    with mock.patch.object(likelihood, "forward", lambda inputs: Outputs(torch.full_like(inputs.pixels, torch.nan))):
        assert findings("likelihood")["cpu"].status == "wrong"


def test_a_kernel_that_fails_is_found() -> None:
    with mock.patch.object(likelihood, "forward", side_effect=RuntimeError("no such image\nmore")):
        seen = findings("likelihood")["cpu"]
    assert seen.status == "failed"
    assert seen.detail == "RuntimeError: no such image"
    assert seen.bad


def test_a_wrong_answer_is_the_exit_status(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    only = [case for case in doctor.all_cases() if case.name == "likelihood"]
    wrong = mock.patch.object(likelihood, "forward", lambda pixels, *_: torch.zeros_like(pixels))
    found = tmp_path / "found.json"
    with mock.patch.object(doctor, "all_cases", return_value=only), wrong:
        assert doctor.main(["--no-speed", "--json", str(found)]) == 1
    assert "please report this table" in capsys.readouterr().out
    on_cpu = [seen for seen in json.loads(found.read_text()) if seen["backend"] == "cpu"]
    assert {seen["status"] for seen in on_cpu} == {"failed"}
    assert {seen["operation"] for seen in on_cpu} == {"logit_laplace_nll"}
    assert list(tmp_path.iterdir()) == [found]


def test_refusals_are_said_once() -> None:
    lines = doctor.table(list(findings("likelihood").values()))
    assert sum(line.startswith("cuda on cpu: ") for line in lines) == 1
