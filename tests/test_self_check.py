"""The self-check against kernels that are right and kernels that were made wrong, in Triton's interpreter and in the
emulation of CUDA, where the CPU stands for a GPU."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dalle_kernels import doctor, explain, logit_laplace_nll, sample_tokens
from dalle_kernels.backends import choice, self_check
from dalle_kernels.backends.contract import Call
from dalle_kernels.likelihood.op import OPERATION

pytest.importorskip("triton")

CPU = torch.device("cpu")
CALL = Call(CPU, torch.float32, 7)
CHILD = Path(__file__).with_name("self_check_child.py")
X = torch.full((3, 7), 0.25)
RUN = self_check.run


class Machine:
    """A GPU whose kernels are of some kind, as self-check children see it.

    Attributes:
        kind: of tests/self_check_child.py.
        quick: children are only counted, and verdicts made up: for tests that are not about them.
    """

    def __init__(self, log: Path) -> None:
        self.kind, self.log, self.quick = "right", log, False

    def command(self, asked: self_check.Subject, device: torch.device) -> list[str]:
        return [sys.executable, str(CHILD), self.kind, json.dumps(asked), str(device)]

    def run(self, asked: self_check.Subject, device: torch.device) -> self_check.Verdict | None:
        if not self.quick:
            return RUN(asked, device)
        with self.log.open("a") as log:
            log.write(f"{asked}\n")
        wrong = self_check.Verdict(False, "likelihood: 1.0e-03 of 2e-05")
        return self_check.Verdict(True, "likelihood 1.0e-07 of 2e-05") if self.kind == "right" else wrong

    @property
    def children(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def quick(machine: Machine) -> Machine:
    machine.quick = True
    return machine


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    """Triton and CUDA kernels count as a GPU's on the CPU too, and "auto" takes Triton first there."""
    seen = Machine(tmp_path / "children")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SELF_CHECK_LOG", str(seen.log))
    monkeypatch.setenv(self_check.VARIABLE, "once")
    monkeypatch.setattr(
        self_check, "covers", lambda backend, device: backend in self_check.BACKENDS and self_check.mode() != "off"
    )
    monkeypatch.setattr(self_check, "command", seen.command)
    monkeypatch.setattr(self_check, "run", seen.run)
    monkeypatch.setitem(choice._AUTOMATIC, "cpu", ("triton", "cpu", "reference"))
    choice.forget_choices()
    yield seen
    choice.forget_choices()


def serving(backend: str = "auto") -> str:
    return OPERATION.choose(backend, CALL).__name__.rpartition(".")[2]


def kept() -> dict[str, self_check.Verdict]:
    return self_check.kept(CPU)


def test_right_kernels_serve_and_are_asked_once(machine: Machine) -> None:
    assert explain(logit_laplace_nll, X, X, X).detail == "not checked on this GPU yet"
    assert machine.children == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            torch.testing.assert_close(logit_laplace_nll(X, X, X), logit_laplace_nll(X, X, X, backend="reference"))
    assert serving() == "triton"
    assert machine.children == 1
    assert explain(logit_laplace_nll, X, X, X).detail.startswith("self-check: likelihood ")
    self_check.forget()  # another process
    choice.forget_choices()
    assert serving() == "triton"
    assert machine.children == 1
    assert [verdict.right for verdict in kept().values()] == [True]


def test_a_remembered_choice_asks_nobody(quick: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    serving()

    def never(*_: object) -> None:
        raise AssertionError("a look-up was more than a look-up")

    for name in ("refuse", "known", "pending", "covers"):
        monkeypatch.setattr(self_check, name, never)
    assert serving() == "triton"


@pytest.mark.parametrize(
    ("kind", "said", "is_kept"),
    [
        ("wrong", "likelihood: 1.0e-03 of 2e-05", True),
        ("raises", "likelihood: RuntimeError: no such image", False),
        ("faults", "likelihood: AcceleratorError: CUDA error: an illegal memory access was encountered", True),
        ("dies", "the child died of signal 11 (SIGSEGV)", True),
        ("hangs", "the child did not end in 1 s", True),
    ],
)
def test_kernels_made_wrong_are_refused(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, kind: str, said: str, is_kept: bool
) -> None:
    machine.kind = kind
    if kind == "hangs":
        monkeypatch.setattr(self_check, "SECONDS", 1)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        torch.testing.assert_close(logit_laplace_nll(X, X, X), logit_laplace_nll(X, X, X, backend="reference"))
        assert serving() == "cpu"
        choice._OPERATIONS[logit_laplace_nll]._chosen.clear()
        assert serving() == "cpu"
    assert len(warned) == 1
    message = str(warned[0].message)
    assert "the triton kernels of logit_laplace_nll are wrong on this GPU by the self-check" in message
    assert said in message
    for fact in (f"torch: {torch.__version__}", "triton: ", "driver: ", "capability: ", "dalle_kernels: "):
        assert fact in message
    assert machine.children == 1
    assert said in explain(logit_laplace_nll, X, X, X).refusals["triton"]
    with pytest.raises(ValueError, match="backend: 'triton' cannot serve this logit_laplace_nll call: wrong on this"):
        logit_laplace_nll(X, X, X, backend="triton")
    assert [said in verdict.detail for verdict in kept().values()] == [True] * is_kept
    choice.forget_choices()  # another process: says so again, asks again only what was not kept
    with pytest.warns(RuntimeWarning, match="wrong on this GPU"):
        assert serving() == "cpu"
    assert machine.children == (1 if is_kept else 2)


@pytest.mark.parametrize(
    ("kind", "reason"), [("no-device", "all devices are in use"), ("lacks-memory", "out of memory")]
)
def test_what_cannot_be_checked_serves(machine: Machine, kind: str, reason: str) -> None:
    machine.kind = kind
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert serving() == "triton"
        assert serving() == "triton"
    assert len(warned) == 1
    assert reason in str(warned[0].message)
    assert machine.children == 1
    assert not kept()


def test_off_and_always(quick: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    quick.kind = "wrong"
    monkeypatch.setenv(self_check.VARIABLE, "off")
    assert serving() == "triton"
    assert quick.children == 0
    monkeypatch.setenv(self_check.VARIABLE, "once")
    choice.forget_choices()
    with pytest.warns(RuntimeWarning):
        assert serving() == "cpu"
    quick.kind = "right"  # mended without a trace
    monkeypatch.setenv(self_check.VARIABLE, "always")
    choice.forget_choices()
    assert serving() == "triton"
    assert serving() == "triton"
    assert quick.children == 2
    assert [verdict.right for verdict in kept().values()] == [True]
    monkeypatch.setenv(self_check.VARIABLE, "sometimes")
    choice.forget_choices()
    with pytest.raises(ValueError, match="DALLE_KERNELS_SELF_CHECK: got 'sometimes', wanted one of off, once, always"):
        serving()


def test_under_a_capture_nothing_is_run(quick: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    quick.kind = "wrong"
    with monkeypatch.context() as captured:
        captured.setattr(self_check, "capturing", lambda: True)
        assert serving() == "triton"
        assert quick.children == 0
    with pytest.warns(RuntimeWarning):
        assert serving() == "cpu"  # the choice made under the capture was not remembered
    self_check.forget()
    choice.forget_choices()
    monkeypatch.setattr(self_check, "capturing", lambda: True)
    assert serving() == "cpu"  # a kept verdict holds there too


@pytest.mark.parametrize("damage", ["", "{", '{"verdicts": 3}', '{"verdicts": {"a": {"right": "yes"}}}', "[]", "\0"])
def test_a_damaged_file_is_made_anew(machine: Machine, damage: str) -> None:
    path = self_check._file(CPU)
    path.parent.mkdir(parents=True)
    path.write_text(damage)
    assert not kept()
    asked = self_check.subject("logit_laplace_nll", "triton", CALL)
    self_check._keep(path, asked, self_check.Verdict(True, "fine"), CPU)
    assert kept() == {str(asked): self_check.Verdict(True, "fine")}
    assert list(path.parent.iterdir()) == [path]  # no temporary file stays


def test_other_versions_are_another_machine(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    before = self_check._file(CPU)
    monkeypatch.setattr(torch, "__version__", "99.0")
    self_check.forget()
    assert self_check._file(CPU) != before


def test_a_folder_that_cannot_be_written(quick: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert serving() == "triton"
    assert serving() == "triton"
    assert quick.children == 1
    assert not kept()


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    monkeypatch.setenv("HOME", "/somewhere")
    assert self_check.folder() == Path("/somewhere/.cache/dalle_kernels/self_check")


def _keep_many(number: int, path: Path) -> None:
    for step in range(25):
        asked = self_check.Subject("operation", "triton", "float32", 100 * number + step, ())
        with self_check._locked(path):
            self_check._keep(path, asked, self_check.Verdict(True, "fine"), CPU)


def test_several_processes_lose_nothing(machine: Machine) -> None:
    path = self_check._file(CPU)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_keep_many, args=(number, path)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(kept()) == 100


def test_several_threads_ask_once(quick: Machine) -> None:
    served: list[str] = []
    threads = [threading.Thread(target=lambda: served.append(serving())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert served == ["triton"] * 4
    assert quick.children == 1


def test_the_childs_own_command_line(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the tests' one: the package from where it lies, the interpreter by the environment."""
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    verdict = self_check.run(self_check.Subject("logit_laplace_nll", "triton", "float32", 0, ()), CPU)
    assert verdict is not None
    assert verdict.right
    assert verdict.detail.startswith("likelihood ")


def test_doctor_shows_verdicts_and_counts_wrong_ones(quick: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    quick.kind = "wrong"
    with pytest.warns(RuntimeWarning):
        serving()
    lines = doctor.self_checks(CPU)
    assert lines[0].startswith("self-check: once; 1 verdicts in ")
    assert lines[1].startswith("  logit_laplace_nll, triton, float32, width 0: WRONG: likelihood: 1.0e-03 of 2e-05")
    only = [case for case in doctor.all_cases() if case.name == "likelihood"]
    monkeypatch.setattr(doctor, "all_cases", lambda: only)
    findings = {seen.backend: seen for seen in doctor.examine(CPU, [torch.float32], speed=False)}
    assert findings["triton"].status == "wrong"
    assert findings["triton"].bad
    assert any(
        "likelihood, float32, triton wrong: wrong on this GPU" in line for line in doctor.table(list(findings.values()))
    )


@pytest.mark.parametrize("kind", ["cuda-right", "cuda-wrong"])
def test_cuda_kernels_in_the_emulation(machine: Machine, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dalle_kernels.backends import cuda_library

    machine.kind = kind
    monkeypatch.setattr(cuda_library, "_refuse_device", lambda device: None)
    monkeypatch.setitem(choice._AUTOMATIC, "cpu", ("cuda", "reference"))
    logits = torch.randn(2, 150)
    if kind == "cuda-right":
        assert explain(sample_tokens, logits).backend == "cuda"
        verdict = self_check.run(self_check.Subject("sample_tokens", "cuda", "float32", 150, ()), CPU)
        assert verdict is not None
        assert verdict.right
        return
    with pytest.warns(RuntimeWarning, match="the cuda kernels of sample_tokens are wrong"):
        tokens = sample_tokens(logits, seed=1)
    assert tokens.equal(sample_tokens(logits, seed=1, backend="reference"))
    assert "sampling: 1 differ" in explain(sample_tokens, logits).refusals["cuda"]


def test_every_operation_has_a_case() -> None:
    from dalle_kernels.backends.cases import all_cases, cases_for

    names = {operation.name for operation in choice._OPERATIONS.values()}
    assert names == {case.function.__name__ for case in all_cases()}
    for name in names:
        assert cases_for(name)
    assert os.environ.get(self_check.VARIABLE) == "off"  # in all other tests, on a GPU too


@pytest.mark.parametrize("operation", ["sparse_attention", "decode_attention"])
def test_cases_put_what_a_call_has_beside_the_plain_one(operation: str) -> None:
    """Each extra changes the answer, and so what is compared."""
    from dalle_kernels.backends.cases import cases_for, judge

    if operation == "sparse_attention":
        extras = ("logit soft cap", "queries for a part of the tokens")
    else:
        extras = (
            "logit soft cap",
            "padding",
            "shared prompts",
            "positions that differ by row",
            "eight-bit caches",
            "grouped heads",
        )
    plain = cases_for(operation)[0]
    for wanted in (*((extra,) for extra in extras), extras):
        case = cases_for(operation, wanted)[0]
        assert judge(case, case.width, CPU, torch.float32, "cpu").right
        inputs = case.inputs(case.width)
        ours, theirs = case.run(inputs, "reference")[0], plain.run(inputs, "reference")[0]
        assert ours.shape != theirs.shape or not ours.equal(theirs)
