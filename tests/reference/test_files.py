"""Files appear whole, outputs are asked for before work is done, a folder has one writer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from dalle_reference.errors import UserError
from dalle_reference.files import exclusive, read_bounded, replacing, require_output


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "note.txt"
    with replacing(path) as draft:
        draft.write_text("first")

    def stop_half_way() -> None:
        with replacing(path) as draft:
            draft.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_half_way()
    assert path.read_text() == "first"
    assert [entry.name for entry in path.parent.iterdir()] == ["note.txt"]


def test_a_new_file_has_the_mode_that_the_user_gives_files(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with replacing(tmp_path / "private") as draft:
            draft.write_text("x")
    finally:
        os.umask(before)
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600


def test_what_a_link_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "target")
    with replacing(tmp_path / "link") as draft:
        draft.write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "target").read_text() == "x"


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "no ordinary file"),
        (Path("/dev/null"), "no ordinary file"),
        (tmp_path / "file" / "deeper" / "x", "file is no folder"),
        (Path("/proc/x"), "cannot be written"),
    ):
        with pytest.raises(UserError, match=message), replacing(path) as draft:
            draft.write_text("x")
    with pytest.raises((UserError, OSError), match="loop"):
        require_output(tmp_path / "loop")
    with pytest.raises(UserError, match=r"x\.jpg: got a name that ends in \.jpg, wanted \.png"):
        require_output(tmp_path / "x.jpg", ".png")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "loop", "pipe"]


def test_reading_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bounded(tmp_path / "file", 5) == b"12345"
    for path, message in (
        (tmp_path / "file", "has 5 bytes, wanted at most 4"),
        (tmp_path / "none", "No such file"),
        (Path("/dev/zero"), "no ordinary file"),
    ):
        with pytest.raises(UserError, match=message):
            read_bounded(path, 4)


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = "import sys; from pathlib import Path; from dalle_reference.files import exclusive\n"
    code += "with exclusive(Path(sys.argv[1])): print('mine', flush=True); input()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match=rf"run: another process \({process.pid}\) is at work there"):
            exclusive(folder).__enter__()
        process.kill()
    assert (folder / ".lock").exists()  # the file of one that was killed hinders nobody
    with exclusive(folder):
        (folder / "result").touch()
    assert [entry.name for entry in folder.iterdir()] == ["result"]


def test_a_folder_that_stays_empty_is_taken_away(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing"), exclusive(tmp_path / "run"):
        raise UserError("nothing to do")
    assert not (tmp_path / "run").exists()
