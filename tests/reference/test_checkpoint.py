"""Checkpoints appear whole, are checked when read, and every fault is one clear error."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from dalle_reference import checkpoint
from dalle_reference.checkpoint import begin, load, require_same, save
from dalle_reference.errors import UserError

CONFIG = {"model": {"width": 8, "grid": (4, 4)}, "seed": 1}


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((2, 3), float(step)), "ema.weight": torch.ones(2, 3).t()}


def shard(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    path = save(tmp_path, "dvae", 7, CONFIG, tensors(7))
    found = load(tmp_path, "dvae")
    assert (found.path, found.kind, found.step) == (path, "dvae", 7)
    assert torch.equal(found.group("model")["weight"], torch.full((2, 3), 7.0))
    assert found.group("ema")["weight"].shape == (3, 2)
    require_same(found, CONFIG)


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        save(tmp_path, "dvae", step, CONFIG, tensors(step))
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000010", "step-00000100"]
    assert load(tmp_path, "dvae").step == 100


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, "dvae", 5, CONFIG, tensors(1))
    save(tmp_path, "dvae", 5, CONFIG, tensors(2))
    assert float(load(tmp_path, "dvae").group("model")["weight"][0, 0]) == 2


def test_a_write_that_fails_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "dvae", 5, CONFIG, tensors(5))

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sync", full_disk)
        with pytest.raises(OSError, match="no space"):
            save(tmp_path, "dvae", 6, CONFIG, tensors(6))
    assert load(tmp_path, "dvae").step == 5
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]  # no draft on a full disk
    (tmp_path / "checkpoints" / ".step-00000007").mkdir()  # as a kill leaves it
    save(tmp_path, "dvae", 7, CONFIG, tensors(7))
    assert load(tmp_path, "dvae").step == 7


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "dvae", 5, CONFIG, tensors(5))
    disk = threading.Event()
    monkeypatch.setattr(checkpoint, "sync", lambda path: disk.wait(60))
    values = tensors(6)
    saving = begin(tmp_path, "dvae", 6, CONFIG, values)
    values["model.weight"].zero_()
    assert load(tmp_path, "dvae").step == 5
    assert not saving.done()
    disk.set()
    assert saving.result() == tmp_path / "checkpoints" / "step-00000006"
    assert torch.equal(load(tmp_path, "dvae").group("model")["weight"], torch.full((2, 3), 6.0))


def test_damage_is_found(tmp_path: Path) -> None:
    save(tmp_path / "run", "dvae", 4, CONFIG, tensors(4))
    save(tmp_path / "run", "dvae", 5, CONFIG, tensors(5))
    pristine = tmp_path / "run"

    def damaged(name: str) -> tuple[Path, Path]:
        run = tmp_path / name
        shutil.copytree(pristine, run)
        return run, run / "checkpoints" / "step-00000005"

    run, newest = damaged("truncated")
    os.truncate(shard(newest), 40)
    with pytest.raises(UserError, match=r"step-00000005: damaged checkpoint .*40 bytes.*go on from step-00000004"):
        load(run, "dvae")

    run, newest = damaged("flipped")
    data = bytearray((shard(newest)).read_bytes())
    data[-3] ^= 1
    (shard(newest)).write_bytes(data)
    with pytest.raises(UserError, match="digest differs"):
        load(run, "dvae")

    run, newest = damaged("no tensors")
    (shard(newest)).unlink()
    with pytest.raises(UserError, match="damaged checkpoint"):
        load(run, "dvae")

    run, newest = damaged("document")
    text = (newest / "checkpoint.json").read_text()
    (newest / "checkpoint.json").write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="damaged checkpoint"):
        load(run, "dvae")

    for number, text_of in enumerate(("[]", "{}", "null", "[" * 100_000, '{"format": 1, "kind": "dvae"}', "\udcff")):
        run, newest = damaged(f"document {number}")
        (newest / "checkpoint.json").write_bytes(text_of.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match="damaged checkpoint"):
            load(run, "dvae")

    for name, value in {"step": -1.5, "config": [], "kind": 3, "files": "many", "blake2b": None}.items():
        run, newest = damaged(f"document {name}")
        document = json.loads((newest / "checkpoint.json").read_text())
        (newest / "checkpoint.json").write_text(json.dumps({**document, name: value}))
        with pytest.raises(UserError, match=f"damaged checkpoint .checkpoint.json: {name} is"):
            load(run, "dvae")

    for old, new in (('"step": 5', '"step": 4'), ('"width": 8', '"width": 9'), ('"seed": 1', '"seed": 3')):
        run, newest = damaged(f"document {new}")
        document = (newest / "checkpoint.json").read_text()
        assert old in document
        (newest / "checkpoint.json").write_text(document.replace(old, new))
        with pytest.raises(UserError, match=r"damaged checkpoint .*digest differs"):
            load(run, "dvae")

    run, newest = damaged("format")
    (newest / "checkpoint.json").write_text(json.dumps({**json.loads(text), "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        load(run, "dvae")


def test_absent_and_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint there"):
        load(tmp_path, "dvae")
    save(tmp_path, "transformer", 5, CONFIG, tensors(5))
    with pytest.raises(UserError, match="a checkpoint of a transformer, wanted one of a dvae"):
        load(tmp_path, "dvae")


def test_another_configuration_is_named(tmp_path: Path) -> None:
    save(tmp_path, "dvae", 5, CONFIG, tensors(5))
    with pytest.raises(UserError, match=r"model\.width was 8, is 16; seed was 1, is absent"):
        require_same(load(tmp_path, "dvae"), {"model": {"width": 16, "grid": (4, 4)}})


def test_weights_of_another_shape_or_name(tmp_path: Path) -> None:
    save(tmp_path, "dvae", 5, CONFIG, tensors(5))
    saved = load(tmp_path, "dvae")
    with pytest.raises(UserError, match=r"another configuration: model\.weight is \[2, 3\], wanted \[5, 5\]"):
        saved.read({"model.weight": torch.zeros(5, 5)})
    with pytest.raises(UserError, match=r"another configuration: model\.bias is absent, wanted \[3\]"):
        saved.read({"model.weight": torch.zeros(2, 3), "model.bias": torch.zeros(3)})
    save(tmp_path, "dvae", 6, CONFIG, {**tensors(6), "model.bias": torch.zeros(3)})
    with pytest.raises(UserError, match=r"model\.bias is not this model's"):
        load(tmp_path, "dvae").read({"model.weight": torch.zeros(2, 3)})
    filled = torch.zeros(3, 2).t()
    load(tmp_path, "dvae").read({"model.weight": filled, "model.bias": torch.ones(3)})
    assert torch.equal(filled, torch.full((2, 3), 6.0))
