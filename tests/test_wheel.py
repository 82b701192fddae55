"""What pip makes of this project: one wheel for every torch and Python, a source distribution, Hugging Face's layout.

These install into fresh environments, so a package index must be reachable: where none is, they fail with pip's words.
DALLE_KERNELS_TEST_TORCH names the other torch, such as "torch==2.12.1".
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
OTHER_TORCH = os.environ.get("DALLE_KERNELS_TEST_TORCH") or (
    "torch==2.12.1" if torch.__version__.startswith("2.13") else "torch==2.13.0"
)
# Everything that says whose Python and package this is would reach into the fresh environments.
CLEAN = {
    name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DALLE_KERNELS", "PYTEST"))
}


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=CLEAN | environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that goes when the tests end: a torch is large."""
    folder = tmp_path_factory.mktemp("installations")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def wheel(folder: Path) -> Path:
    """The wheel of an isolated build, where there is no torch, as `make wheel` tags it."""
    (folder / "build.cfg").write_text(f"[build]\nbuild_base = {folder / 'build'}\n")
    environment = {"DIST_EXTRA_CONFIG": str(folder / "build.cfg"), "DALLE_KERNELS_CUDA": "0"}
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--wheel-dir",
        folder / "built",
        ROOT,
        cwd=folder,
        **environment,
    )
    (built,) = (folder / "built").glob("*.whl")
    assert re.fullmatch(r"dalle_kernels-[\d.]+-py3-none-linux_\w+\.whl", built.name)
    path = os.pathsep.join([str(Path(sys.executable).parent), CLEAN["PATH"]])
    audit = [
        sys.executable,
        "-m",
        "auditwheel",
        "repair",
        "--exclude",
        "libtorch*",
        "--wheel-dir",
        folder / "tagged",
        built,
    ]
    run(*audit, cwd=folder, PATH=path)
    (tagged,) = (folder / "tagged").glob("*.whl")
    return tagged


def test_the_wheel_is_small_and_for_old_systems_and_any_python(wheel: Path) -> None:
    match = re.search(r"-py3-none-manylinux_2_(\d+)_\w+", wheel.name)
    assert match is not None, wheel.name
    assert int(match.group(1)) <= 28
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert [name for name in names if name.endswith(".so")] == ["dalle_kernels/_cpu.so"]
        library = archive.read("dalle_kernels/_cpu.so")
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"dalle_kernels", "dalle_reference"}
    assert len(library) < 4 << 20
    assert b".debug_info" not in library
    assert b"PyObject" not in library


DOCTOR = """
import shutil, sys
import torch
from dalle_kernels import doctor
from dalle_kernels.backends import native
assert shutil.which("c++") is shutil.which("gcc") is None
assert native.absence() is None, native.absence()
print(torch.__version__, native.__file__)
sys.argv[1:] = ["--no-speed"]
sys.exit(doctor.main())
"""


def test_the_wheel_serves_another_torch_where_there_is_no_compiler(wheel: Path, folder: Path) -> None:
    run(sys.executable, "-m", "venv", folder / "other", cwd=folder)
    python, path = folder / "other" / "bin" / "python", str(folder / "other" / "bin")
    run(python, "-m", "pip", "install", "--quiet", OTHER_TORCH, wheel, cwd=folder, PATH=path)
    answer = run(python, "-W", "error::UserWarning", "-c", DOCTOR, cwd=folder, PATH=path)
    version, file = answer.stdout.splitlines()[0].split(" ", 1)
    assert version.split("+")[0] == OTHER_TORCH.split("==")[1]
    assert version.split("+")[0] != torch.__version__.split("+")[0]
    assert Path(file).is_relative_to(folder)
    assert re.search(r"attention, row .* cpu\* +right", answer.stdout), answer.stdout
    assert "0 wrong or failed" in answer.stdout


SLOW = """
import torch, warnings
from dalle_kernels import sample_tokens
from dalle_kernels.backends import native
for _ in range(2):
    sample_tokens(torch.zeros(1, 8), seed=1)
    sample_tokens(torch.zeros(2, 9), seed=1)
print(native.__file__)
print(native.absence())
"""


@pytest.mark.parametrize("wish", ["auto", "0"])
def test_the_sources_without_a_compiler_give_pure_python_and_say_so(folder: Path, wish: str) -> None:
    """To whoever did not ask for it; with the line that mends it, past pip's cache of the wheel without kernels."""
    sources, target = folder / f"sources-{wish}", folder / f"pure-{wish}"
    run(sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(sources)!r})", cwd=ROOT)
    (archive,) = sources.glob("*.tar.gz")
    environment = {"DALLE_KERNELS_NATIVE": wish, "CXX": "no-such-compiler"}
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    said = run(*pip, "--verbose", "--target", target, archive, cwd=folder, **environment)
    reason = "no C++ compiler (no-such-compiler) on the path" if wish == "auto" else "DALLE_KERNELS_NATIVE=0"
    assert f"building without the native CPU kernels ({reason})" in said.stdout + said.stderr
    assert re.search(r"dalle_kernels-[\d.]+-py3-none-any\.whl", said.stdout)
    answer = run(sys.executable, "-c", SLOW, cwd=folder, PYTHONPATH=str(target))
    file, absence = answer.stdout.splitlines()
    assert Path(file).is_relative_to(target)
    assert absence == f"the native library is absent: {reason}"
    mend = f"pip install --force-reinstall --no-deps --no-cache-dir {archive.as_uri()}"
    assert answer.stderr.count(mend) == (1 if wish == "auto" else 0), answer.stderr
    assert wish == "auto" or answer.stderr == ""
    silent = run(sys.executable, "-W", "ignore:dalle_kernels", "-c", SLOW, cwd=folder, PYTHONPATH=str(target))
    assert silent.stderr == ""


LOADED = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel
theirs = get_local_kernel(Path(sys.argv[1]), backend="cpu")
layout = theirs.TokenLayout(5, (4, 6))
pattern = theirs.Row(layout)
q = torch.randn(1, 2, layout.length, 16, requires_grad=True)
print(theirs.__name__, theirs.__file__)
print(theirs.explain(theirs.sparse_attention, q, q, q, pattern))
assert not any(name.split(".")[0] == "dalle_kernels" for name in sys.modules)
import dalle_kernels
ours = dalle_kernels.sparse_attention(q, q, q, dalle_kernels.Row(dalle_kernels.TokenLayout(5, (4, 6))))
answer = theirs.sparse_attention(q, q, q, pattern)
assert torch.equal(ours, answer)
assert str(answer.grad_fn) != str(ours.grad_fn)
torch.testing.assert_close(answer, theirs.sparse_attention(q, q, q, pattern, backend="reference"))
answer.sum().backward()
namespace = getattr(torch.ops, theirs.__name__)
assert namespace.attention_forward is not torch.ops.dalle_kernels.attention_forward
"""


def test_huggingface_kernels_loads_it_beside_an_installed_one(folder: Path) -> None:
    """From a local folder, under a name and with operators of its own."""
    run(sys.executable, ROOT / "packaging" / "kernels_layout.py", folder / "kernel", cwd=folder)
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    answer = run(sys.executable, "-c", LOADED, folder / "kernel", cwd=folder, **environment)
    name, file = answer.stdout.splitlines()[0].split(" ", 1)
    assert re.fullmatch(r"_dalle_kernels_cpu_[0-9a-f]{12}", name)
    assert Path(file).is_relative_to(folder / "kernel" / "build")
    assert "sparse_attention: cpu" in answer.stdout
