"""Objects are made again when something that they are made of changed, and only then."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kernels.cuda_build import build_cuda
from tests.emulation import build as emulation


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "included.h").write_text("#define VALUE 1\n")
    (tmp_path / "through.h").write_text('#include "included.h"\n')
    (tmp_path / "other.h").write_text("#define OTHER 1\n")
    source = tmp_path / "a source.cpp"
    source.write_text('#include "through.h"\nint value() { return VALUE; }\n')
    return source


def _compile(source: Path, flags: tuple[str, ...] = (), salt: str = "") -> tuple[Path, int]:
    made = build_cuda.compile_object(source, [*build_cuda.compiler(), *flags], source.parent, "object", salt)
    assert [path.name for path in source.parent.glob("*.o")] == [made.name]
    return made, made.stat().st_mtime_ns


def test_an_object_is_kept_until_something_that_it_includes_changes(source: Path) -> None:
    first = _compile(source)
    assert _compile(source) == first
    (source.parent / "other.h").write_text("#define OTHER 2\n")
    assert _compile(source) == first
    (source.parent / "included.h").write_text("#define VALUE 2\n")
    second = _compile(source)
    assert second[0] != first[0]
    source.write_text(source.read_text().replace("through.h", "included.h"))
    third = _compile(source)
    assert third[0] != second[0]
    (source.parent / "through.h").unlink()  # no longer read
    assert _compile(source) == third


def test_flags_and_compilers_count(source: Path) -> None:
    objects = {_compile(source)[0], _compile(source, ("-O1",))[0], _compile(source, salt="another compiler")[0]}
    assert len(objects) == 3


def test_a_failure_shows_the_compilers_words_and_leaves_no_object(source: Path) -> None:
    source.write_text("int value() { return MISSING; }\n")
    with pytest.raises(RuntimeError, match="MISSING"):
        _compile(source)
    assert not list(source.parent.glob("*.o"))


def test_the_compiler_may_have_a_wrapper(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env c++")
    monkeypatch.setattr(emulation, "OUTPUT", source.parent)
    made, _ = _compile(source, ("-fPIC",))
    assert emulation._link([made], "wrapped", []).exists()
