"""Whether kernels are right on the GPU that is here, found out before they serve on it.

The first time that a kernel of a GPU backend would serve a device, a child process puts the cases of that operation,
dtype and width to it (cases.py): a process of its own, because an illegal address ends the CUDA context in which it
happens. The verdict is kept in the user's cache folder, for this GPU, its driver, these versions of torch and Triton,
and these very kernels; from then on it costs a look into a dictionary when a backend is chosen, and nothing in a call.
A backend whose answers are wrong, or whose child dies or hangs, is refused for such calls, with one warning, and the
next one serves.

`DALLE_KERNELS_SELF_CHECK` says when: "once" (the default), "always" (once a process, whatever was kept), "off" (never,
and nothing that was kept is heeded). While a CUDA graph is captured nothing is run: calls that nobody has checked are
served, and the next one outside of a capture is checked.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dalle_kernels.backends.contract import Call
from dalle_kernels.device import capturing

VARIABLE = "DALLE_KERNELS_SELF_CHECK"
MODES = ("off", "once", "always")
BACKENDS = ("triton", "cuda")
SECONDS = 600  # how long the cases may take, compilation included, before a child counts as hanging
SECONDS_TO_START = 600
WRONG = "wrong on this GPU by the self-check"

_PACKAGE = Path(__file__).parents[1]
_NAME = __name__.partition(".")[0]
_READY = "the device answers"  # what a child says before the first kernel runs


class Subject(NamedTuple):
    """What a verdict is about: one backend's kernels for one kind of call."""

    operation: str
    backend: str
    dtype: str
    width: int
    extras: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join((self.operation, self.backend, self.dtype, f"width {self.width}", *self.extras))


class Verdict(NamedTuple):
    """What was found: whether all answers were right, and a line about it.

    An exception is not kept: its cause may be a missing compiler, or whatever else gets mended without a trace in
    `machine`. One that CUDA threw is.
    """

    right: bool
    detail: str
    keep: bool = True


def mode() -> str:
    """What `DALLE_KERNELS_SELF_CHECK` asks for.

    Raises:
        ValueError: for a value that it does not know.
    """
    asked = os.environ.get(VARIABLE) or "once"
    if asked not in MODES:
        raise ValueError(f"{VARIABLE}: got {asked!r}, wanted one of {', '.join(MODES)}")
    return asked


def covers(backend: str, device: torch.device) -> bool:
    """Whether a backend's kernels are checked on `device` at all."""
    return backend in BACKENDS and device.type == "cuda" and mode() != "off"


def subject(operation: str, backend: str, call: Call) -> Subject:
    # The likelihood is taken element by element: its kernels do not know a row's length.
    width = 0 if operation == "logit_laplace_nll" else call.width
    return Subject(operation, backend, str(call.dtype).removeprefix("torch."), width, call.extras)


# --- Verdicts of this process, and those that are kept ----------------------------------------------------------------

_verdicts: dict[tuple[str, Subject], Verdict | None] = {}  # by device; None where a check could not be made
_warned: set[Subject] = set()
_lock = threading.RLock()


def forget() -> None:
    """Drops what this process knows: kept verdicts are read again."""
    _verdicts.clear()
    _warned.clear()
    machine.cache_clear()


def known(operation: str, backend: str, call: Call) -> Verdict | None:
    """The verdict, if there is one; nothing is run for it."""
    if not covers(backend, call.device):
        return None
    asked = subject(operation, backend, call)
    found = _verdicts.get((str(call.device), asked))
    if found is None and mode() == "once":
        found = _read(_file(call.device)).get(str(asked))
    return found


def pending(operation: str, backend: str, call: Call) -> bool:
    """Whether a check is still to be made, so that the choice is not to be remembered."""
    return covers(backend, call.device) and (str(call.device), subject(operation, backend, call)) not in _verdicts


def describe(operation: str, backend: str, call: Call) -> str:
    """For `explain`, of a backend that serves: what its self-check gave, or that there was none."""
    if not covers(backend, call.device):
        return ""
    verdict = known(operation, backend, call)
    return "not checked on this GPU yet" if verdict is None else f"self-check: {verdict.detail}"


def refuse(operation: str, backend: str, call: Call) -> str | None:
    """Why the self-check keeps a backend from serving `call`, or None; checks it where that was not done yet."""
    if not covers(backend, call.device):
        return None
    asked, device = subject(operation, backend, call), str(call.device)
    with _lock:
        if (device, asked) not in _verdicts:
            if capturing():
                found = known(operation, backend, call)
                return None if found is None else refusal(found)
            _verdicts[device, asked] = _settle(asked, call)
        verdict = _verdicts[device, asked]
        reason = None if verdict is None else refusal(verdict)
        if verdict is not None and reason and asked not in _warned:
            _warned.add(asked)
            warnings.warn(_report(asked, verdict, call.device), RuntimeWarning, stacklevel=2)
        return reason


def refusal(verdict: Verdict) -> str | None:
    """A verdict as a backend's reason."""
    return None if verdict.right else f"{WRONG}: {verdict.detail}"


def _report(asked: Subject, verdict: Verdict, device: torch.device) -> str:
    lines = [f"{name}: {value}" for name, value in machine(device).items()]
    return "\n    ".join(
        [
            f"dalle_kernels: the {asked.backend} kernels of {asked.operation} are {WRONG}; calls of this kind go to"
            " another backend. Please report what follows:",
            f"{asked}: {verdict.detail}",
            *lines,
            f"kept in: {_file(device)} ({VARIABLE}=always asks again)",
        ]
    )


def _settle(asked: Subject, call: Call) -> Verdict | None:
    """The kept verdict, or else that of a child, which is then kept. Processes that ask for the same take turns."""
    path = _file(call.device)
    if mode() == "always":
        verdict = run(asked, call.device)
        with _locked(path):
            _keep(path, asked, verdict, call.device)
        return verdict
    if kept := _read(path).get(str(asked)):
        return kept
    with _locked(path):
        if kept := _read(path).get(str(asked)):
            return kept
        verdict = run(asked, call.device)
        _keep(path, asked, verdict, call.device)
    return verdict


@functools.lru_cache(maxsize=16)
def machine(device: torch.device) -> dict[str, str]:
    """What a verdict holds for: the GPU and everything that makes or runs its kernels."""
    facts = {"device": "", "capability": "", "driver": ""}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        facts = {"device": torch.cuda.get_device_name(device), "capability": f"{major}.{minor}", "driver": _driver()}
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {**facts, "torch": torch.__version__, "triton": triton, "dalle_kernels": f"{version_of_ours()} {_digest()}"}


def version_of_ours() -> str:
    return str(sys.modules[_NAME].__version__)


def _driver() -> str:
    with contextlib.suppress(OSError):
        return Path("/sys/module/nvidia/version").read_text().strip()
    return f"for CUDA {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1)
def _digest() -> str:
    """Of all that GPU kernels are made of: a change of ours is another version of ours."""
    whole = hashlib.sha256()
    for path in sorted([*_PACKAGE.rglob("*.py"), *_PACKAGE.rglob("*.json"), *_PACKAGE.glob("_cuda.so")]):
        whole.update(path.read_bytes())
    return whole.hexdigest()[:12]


def folder() -> Path:
    """Where verdicts are kept: $XDG_CACHE_HOME/dalle_kernels/self_check, or below ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~")) / ".cache"
    return root / "dalle_kernels" / "self_check"


def _file(device: torch.device) -> Path:
    facts = machine(device)
    name = re.sub(r"[^A-Za-z0-9]+", "-", facts["device"]).strip("-").lower() or device.type
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return folder() / f"{name}-{digest}.json"


def kept(device: torch.device) -> dict[str, Verdict]:
    """The verdicts that are kept for `device` as it is now, by subject."""
    return _read(_file(device))


def _read(path: Path) -> dict[str, Verdict]:
    """Those of a file; none where it is damaged, so that it is made anew."""
    try:
        verdicts = json.loads(path.read_text())["verdicts"]
        return {
            name: Verdict(bool(entry["right"]), str(entry["detail"]))
            for name, entry in verdicts.items()
            if isinstance(entry["right"], bool)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _keep(path: Path, asked: Subject, verdict: Verdict | None, device: torch.device) -> None:
    """Adds a verdict to the file, if a file can be written there; whoever has it locked calls this."""
    if verdict is None or not verdict.keep:
        return
    everything = {**_read(path), str(asked): verdict}
    entries = {name: {"right": entry.right, "detail": entry.detail} for name, entry in sorted(everything.items())}
    temporary = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps({"machine": machine(device), "verdicts": entries}, indent=1) + "\n")
        os.replace(temporary, path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time, where the file system can lock; elsewhere each makes its own check."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(path.with_suffix(".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- The child --------------------------------------------------------------------------------------------------------

_CHILD = """
import importlib.util, json, sys
asked = json.loads(sys.argv[1])
sys.path[:] = asked["path"]
name, folder = asked["name"], asked["folder"]
spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules[name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
importlib.import_module(name + ".backends.self_check").answer(asked["subject"], asked["device"])
"""


def command(asked: Subject, device: torch.device) -> list[str]:
    """The child's command line. The package is loaded from where it lies here, under the name that it has here."""
    argument = {
        "name": _NAME,
        "folder": str(_PACKAGE),
        "path": sys.path,
        "subject": asked,
        "device": str(device),
    }
    return [sys.executable, "-c", _CHILD, json.dumps(argument)]


def run(asked: Subject, device: torch.device) -> Verdict | None:
    """What a child finds; None, with a warning, where it could not be made to use the device at all."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        environment = {**os.environ, VARIABLE: "off"}
        line = command(asked, device)
        try:
            child = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment, start_new_session=True
            )
        except OSError as error:
            _warn_unsure(asked, f"no child process: {error}")
            return None
        try:
            status = _wait(child, output.fileno())
        finally:
            _end(child)
        output.seek(0)
        errors.seek(0)
        said, last = output.read().splitlines(), [each for each in errors.read().splitlines() if each.strip()]
    if _READY not in said:
        _warn_unsure(asked, "; ".join(last[-1:]) or f"the child ended with status {status}")
        return None
    results = [json.loads(each) for each in said if each.startswith('{"dalle_kernels"')]
    if results:
        result = results[-1]["dalle_kernels"]
        if result["right"] is None:
            _warn_unsure(asked, result["detail"])
            return None
        return Verdict(**result)
    if status is None:
        return Verdict(False, f"the child did not end in {SECONDS} s")
    ended = (
        f"died of signal {-status} ({signal.Signals(-status).name})" if status < 0 else f"ended with status {status}"
    )
    return Verdict(False, "; ".join([f"the child {ended}", *last[-1:]]))


def _wait(child: subprocess.Popen[Any], output: int) -> int | None:
    """The child's exit status; None where it hangs."""
    ready, deadline = False, time.monotonic() + SECONDS_TO_START
    while (status := child.poll()) is None and time.monotonic() < deadline:
        time.sleep(0.05)
        # Read without moving the file's position, which is the child's too.
        if not ready and _READY.encode() in os.pread(output, 1 << 16, 0):
            ready, deadline = True, time.monotonic() + SECONDS
    return status


def _end(child: subprocess.Popen[Any]) -> None:
    """With the compilers that it may have started."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _warn_unsure(asked: Subject, reason: str) -> None:
    warnings.warn(
        f"dalle_kernels: whether {asked} is right on this GPU could not be checked ({reason}); it serves unchecked."
        f" {VARIABLE}=off silences this.",
        RuntimeWarning,
        stacklevel=2,
    )


def answer(asked: Sequence[Any], device_name: str) -> None:
    """What a child does: says that the device answers, then what came of the cases."""
    from dalle_kernels.backends.cases import cases_for, judge

    operation, backend, dtype, width, extras = asked
    about, device = Subject(operation, backend, dtype, width, tuple(extras)), torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.ones(1, device=device).item()
    print(_READY, flush=True)
    begun, details = time.perf_counter(), list[str]()
    right: bool | None = True
    keep = True
    for case in cases_for(about.operation, about.extras):
        try:
            found = judge(case, about.width, device, getattr(torch, about.dtype), about.backend)
        except torch.OutOfMemoryError as error:
            right, details = None, [str(error).partition("\n")[0]]
            break
        except Exception as error:  # whatever a kernel throws is the verdict
            lines = str(error).splitlines() or [""]
            right, details = False, [f"{case.name}: {type(error).__name__}: {lines[0]}"]
            keep = isinstance(error, torch.AcceleratorError)
            break
        if not found.right:
            right, details = False, [f"{case.name}: {found.detail}"]
            break
        details.append(f"{case.name} {found.detail}")
    detail = "; ".join(details) + f" ({time.perf_counter() - begun:.1f} s)"
    print(json.dumps({"dalle_kernels": {"right": right, "detail": detail, "keep": keep}}), flush=True)
