"""The restricted unpickler: it reads what peers save, imports none of them, and runs nothing that a file holds."""

from __future__ import annotations

import argparse
import collections
import functools
import io
import os
import pathlib
import pickle
import random
import struct
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from dalle_reference.convert import pickles
from dalle_reference.convert.pickles import Record, StoredTensor, load, state_dict
from dalle_reference.errors import UserError
from omegaconf import OmegaConf
from torch import nn

from tests.integrations.peers import peer

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(thing: Any, path: Path, zipped: bool = True) -> Path:
    torch.save(thing, path, _use_new_zipfile_serialization=zipped)
    return path


def read(tree: Any) -> Any:
    """A loaded tree with its tensors read."""
    if isinstance(tree, StoredTensor):
        return tree.read()
    if isinstance(tree, dict):
        return {key: read(value) for key, value in tree.items()}
    return type(tree)(read(part) for part in tree) if isinstance(tree, (list, tuple)) else tree


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, torch.Tensor):
        return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, (list, tuple)):
        return type(ours) is type(theirs) and all(map(same, ours, theirs)) and len(ours) == len(theirs)
    return ours == theirs


@FORMATS
def test_plain_data_and_tensors_come_back(tmp_path: Path, zipped: bool) -> None:
    base = torch.randn(6, 5)
    tree = {
        "whole": base,
        "a view that starts inside": base[2:, 1:3],
        "transposed": base.t(),
        "one number": torch.tensor(3.5, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "odd bytes, so that the next is at an odd place": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "int64": torch.arange(3),
        "half": torch.randn(3).half(),
        "bf16": torch.randn(3).bfloat16(),
        "mask": torch.eye(3, dtype=torch.bool),
        "parameter": nn.Parameter(torch.randn(2)),
        "numbers": [1, -5, 70_000, 2**40, 2.5, True, None, "текст", (1, (2, 3))],
    }
    path = save(tree, tmp_path / "file", zipped)
    assert same(read(load(path)), {**tree, "parameter": tree["parameter"].detach()})


@FORMATS
def test_openais_pickled_modules_load_without_dall_e(
    tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dall_e = peer("dall_e")
    models = [dall_e.Encoder(n_hid=64, n_blk_per_group=1, vocab_size=512)]
    models.append(dall_e.Decoder(n_hid=64, n_init=16, n_blk_per_group=2, vocab_size=512))
    paths = [save(model, tmp_path / f"{type(model).__name__}.pkl", zipped) for model in models]
    for name in [name for name in sys.modules if name.partition(".")[0] == "dall_e"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    for model, path in zip(models, paths, strict=True):
        record = load(path)
        assert record.origin == f"dall_e.{type(model).__name__.lower()}.{type(model).__name__}"
        assert record.state["n_hid"] == 64
        assert record.state["device"].arguments == ("cpu",)
        found, wanted = state_dict(record, path), model.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name].read(), wanted[name]) for name in wanted)


@FORMATS
def test_what_training_programs_leave_beside_the_weights(
    tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ModelCheckpoint:
        pass

    lightning = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    lightning.ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = lightning.__name__, "ModelCheckpoint"
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", lightning.__name__):
        monkeypatch.setitem(sys.modules, name, lightning)
    ordered = collections.OrderedDict(weight=torch.ones(2))
    ordered._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]  # as Module.state_dict does
    checkpoint = {
        "state_dict": ordered,
        "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(0.5), "dirpath": pathlib.PosixPath("x")}},
        "hparams": OmegaConf.create({"ddconfig": {"ch_mult": [1, 2], "dropout": 0.0, "name": "x", "on": True}}),
        "arguments": argparse.Namespace(lr=1.0),
        "step": functools.partial(int, base=2),
        "sizes": {torch.Size([2]), 3},
        "counts": collections.defaultdict(int, a=1),
        "key": b"bytes",
    }
    found = load(save(checkpoint, tmp_path / "last.ckpt", zipped))
    assert torch.equal(found["state_dict"]["weight"].read(), torch.ones(2))
    ((origin, state),) = found["callbacks"].items()
    assert origin.origin == "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    assert issubclass(origin, Record)
    assert origin is not ModelCheckpoint
    assert float(state["best_model_score"].read()) == 0.5
    assert found["hparams"].origin == "omegaconf.dictconfig.DictConfig"
    assert found["step"].origin == "functools.partial"
    assert found["counts"].entries == [("a", 1)]


# Files that try to run something. `MARK` stands for a path that each of them would create.


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments, state) if state is not None else (function, arguments)

    def __reduce__(self) -> Any:
        return self.parts


def program(text: bytes, mark: Path) -> bytes:
    return b"\x80\x02" + text.replace(b"MARK", str(mark).encode())


def string(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


HOSTILE: dict[str, tuple[Any, str]] = {
    "a shell command": (lambda mark: Calls(os.system, f"touch {mark}"), r"names posix\.system"),
    "eval": (lambda mark: Calls(eval, f"open({str(mark)!r}, 'w')"), r"names __builtin__\.eval"),
    "exec": (lambda mark: Calls(exec, f"open({str(mark)!r}, 'w')"), r"names __builtin__\.exec"),
    "getattr, to walk to something": (
        lambda mark: Calls(getattr, Calls(__import__, "os"), "system"),
        r"names __builtin__\.getattr",
    ),
    "a partial of a shell command": (
        lambda mark: Calls(functools.partial(os.system, f"touch {mark}")),
        r"names posix\.system",
    ),
    "a callable of torch's that loads code": (
        lambda mark: Calls(torch.hub.load, str(mark), "x"),
        r"names torch\.hub\.load",
    ),
    "a global within an admitted module": (
        lambda mark: b"ctorch.nn.modules.module\nos.system\n" + string(f"touch {mark}") + b"\x85R.",
        r"names torch\.nn\.modules\.module\.os\.system",
    ),
    "a path through an admitted class": (
        lambda mark: b"ctorch.nn.modules.container\nSequential.__init__.__globals__\n.",
        r"names torch\.nn\.modules\.container\.Sequential\.__init__\.__globals__",
    ),
    "an admitted name from another module": (lambda mark: b"cos\nOrderedDict\n.", r"names os\.OrderedDict"),
    "a module that is imported to find it": (lambda mark: b"chostile_module\nRecord\n.", r"names hostile_module\."),
    "our own unpickler": (
        lambda mark: b"cdalle_reference.convert.pickles\nStoredTensor\n.",
        r"names dalle_reference\.convert\.pickles\.StoredTensor",
    ),
    "the old instruction that calls": (
        lambda mark: b"(" + string(f"touch {mark}") + b"ios\nsystem\n.",
        "the instruction INST",
    ),
    "names put on the stack": (lambda mark: string("os") + string("system") + b"\x93.", "the instruction STACK_GLOBAL"),
    "an extension's code": (lambda mark: b"\x82\x01.", "the instruction EXT1"),
}


def forge(path: Path, data: bytes, zipped: bool) -> Path:
    """A file of `torch.save` whose pickle is `data`."""
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(4)}, buffer, _use_new_zipfile_serialization=zipped)
    if not zipped:
        head, _, tail = buffer.getvalue().partition(pickle.dumps({"weight": 0}, protocol=2)[:3])
        path.write_bytes(head + data + tail)
        return path
    with zipfile.ZipFile(buffer) as before, zipfile.ZipFile(path, "w") as after:
        for name in before.namelist():
            after.writestr(name, data if name.endswith("/data.pkl") else before.read(name))
    return path


@FORMATS
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_by_name_and_nothing_of_it_runs(
    tmp_path: Path, name: str, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, message = HOSTILE[name]
    mark = tmp_path / "mark"
    (tmp_path / "hostile_module.py").write_text(f"open({str(mark)!r}, 'w')\nclass Record: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "hostile_module", raising=False)
    payload = make(mark)
    data = b"\x80\x02" + payload if isinstance(payload, bytes) else pickle.dumps(payload, protocol=2)
    path = forge(tmp_path / "file", data, zipped)
    before = set(sys.modules)
    with pytest.raises(UserError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert not mark.exists()
    imported = set(sys.modules) - before
    assert all(module.startswith("encodings.") for module in imported)  # of names in a zip archive


@pytest.mark.parametrize("name", ["a shell command", "eval", "a module that is imported to find it"])
def test_the_hostile_pickles_above_are_live(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by pickle itself they do what the test above says did not happen."""
    mark = tmp_path / "mark"
    (tmp_path / "hostile_module.py").write_text(f"open({str(mark)!r}, 'w')\nclass Record: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    payload = HOSTILE[name][0](mark)
    pickle.loads(payload if isinstance(payload, bytes) else pickle.dumps(payload, protocol=2))
    monkeypatch.delitem(sys.modules, "hostile_module", raising=False)
    assert mark.exists()


def test_a_refusal_comes_before_anything_of_the_pickle_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the unpickler was started")

    monkeypatch.setattr(pickles, "_Unpickler", never)
    data = pickle.dumps([Calls(os.system, "true")], protocol=2)
    with pytest.raises(UserError, match=r"posix\.system"):
        load(forge(tmp_path / "file", data, True))


def test_the_unpickler_itself_refuses_what_is_not_admitted(tmp_path: Path) -> None:
    """The second wall, for a name that the first one would have missed."""
    path = save({}, tmp_path / "file")
    data = pickle.dumps(Calls(os.system, f"touch {tmp_path / 'mark'}"), protocol=4)
    with pytest.raises(UserError, match=r"names posix\.system"):
        pickles._Unpickler(data, pickles._File(path)).load()
    assert not (tmp_path / "mark").exists()


STORAGE = b"(" + string("storage") + b"ctorch\nFloatStorage\n" + string("0") + string("cpu") + b"COUNTtQ"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"OFFSETSIZESTRIDE\x89}tR"


def tensor(count: bytes = b"K\x04", offset: bytes = b"K\x00", size: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85"):
    parts = {b"COUNT": count, b"OFFSET": offset, b"SIZE": size, b"STRIDE": stride}
    data = REBUILD
    for name, part in parts.items():
        data = data.replace(name, part)
    return b"\x80\x02}" + string("weight") + data + b"s."


HUGE = b"\x8a\x06" + (2**40).to_bytes(6, "little")
SIZES = {
    "a storage far larger than the file": (tensor(HUGE, size=HUGE + b"\x85"), "storage '0' should have 4398046511104"),
    "a storage a little larger": (tensor(b"K\x05", size=b"K\x05\x85"), "storage '0' should have 20 bytes.*has 16"),
    "a storage smaller than its entry": (tensor(b"K\x03", size=b"K\x03\x85"), "storage '0' should have 12 bytes"),
    "a negative storage": (tensor(b"J\xff\xff\xff\xff"), "neither a storage nor a module"),
    "one number repeated": (tensor(size=HUGE + b"\x85", stride=b"K\x00\x85"), r"shape \(1099511627776,\).*not fit"),
    "strides past the end": (tensor(stride=b"K\x02\x85"), r"strides \(2,\) at 0 does not fit"),
    "an offset past the end": (tensor(offset=b"K\x01"), r"strides \(1,\) at 1 does not fit"),
    "a negative stride": (tensor(stride=b"J\xff\xff\xff\xff\x85"), "_rebuild_tensor_v2 of something else"),
    "nothing, in sizes that overflow": (
        tensor(size=HUGE + HUGE + b"K\x00\x87", stride=b"K\x01K\x01K\x01\x87"),
        r"0\) with strides \(1, 1, 1\) at 0 does not fit",
    ),
    "sizes without strides": (tensor(stride=b")"), "_rebuild_tensor_v2 of something else"),
    "a memo of billions": (b"\x80\x02}r\xff\xff\xff\xff.", "numbers objects out of order"),
    "tuples within tuples": (b"\x80\x02})" + b"\x85" * 10**6 + b"K\x01s.", "makes more than 100000 tuples"),
    "a string longer than the file": (b"\x80\x02X\xff\xff\xff\xffabc.", "damaged"),
    "another storage": (tensor().replace(string("0"), string("7")), "storage '7' is missing"),
    "two sizes": (
        tensor()[:-2] + b"s" + string("b") + tensor(b"K\x02", size=b"K\x02\x85")[14:],
        "storage '0' two sizes",
    ),
    "a class of nothing": (b"\x80\x02(" + string("module") + string("os.system") + b"tQ.", "neither a storage nor a"),
    "attributes for a class": (
        b"\x80\x02ctorch.nn.modules.container\nSequential\n}" + string("origin") + string("x") + b"sb.",
        "damaged",
    ),
    "attributes for a function": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}" + string("_name") + string("x") + b"sb.",
        "state for the function _rebuild_tensor_v2",
    ),
    "slots of a tensor": (tensor()[:-2] + b"N}" + string("offset") + b"K\x7fs\x86bs.", "damaged"),
}


def test_the_forged_tensor_is_otherwise_sound(tmp_path: Path) -> None:
    assert torch.equal(load(forge(tmp_path / "file", tensor(), True))["weight"].read(), torch.zeros(4))


@pytest.mark.parametrize("name", SIZES)
def test_false_sizes_and_attributes_are_refused(tmp_path: Path, name: str) -> None:
    data, message = SIZES[name]
    with pytest.raises(UserError, match=message):
        load(forge(tmp_path / "file", data, True))
    assert pickles._ADMITTED["torch.nn.modules.container", "Sequential"].origin.endswith("container.Sequential")


def test_a_false_size_in_the_legacy_format(tmp_path: Path) -> None:
    path = save({"weight": torch.arange(4.0)}, tmp_path / "file", zipped=False)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"K\x04N", HUGE + b"N"))
    with pytest.raises(UserError, match=r"storage '\d+' should have 4398046511104 bytes, the file has 16"):
        load(path)
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"storage '\d+' should have 16 bytes, the file has 15"):
        load(path)


def test_a_compressed_archive_is_refused_before_it_unfolds(tmp_path: Path) -> None:
    path = save({"weight": torch.zeros(1 << 20)}, tmp_path / "file")
    with zipfile.ZipFile(path) as before:
        entries = {name: before.read(name) for name in before.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as after:
        for name, data in entries.items():
            after.writestr(name, data)
    with pytest.raises(UserError, match=r"is not stored as torch\.save stores it"):
        load(path)


def test_modules_within_themselves_are_refused(tmp_path: Path) -> None:
    inner = nn.Sequential(nn.ReLU())
    record = load(save(inner, tmp_path / "file"))
    record.state["_modules"]["1"] = record
    with pytest.raises(UserError, match=r"file: refused: 1\. is no module of a tree"):
        state_dict(record, tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04", b"\x80\x02K\x07.", b"\x80\x02" + b"(" * 50])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)):
        load(path)


@FORMATS
def test_damage_anywhere_is_one_clear_error_or_changes_only_numbers(tmp_path: Path, zipped: bool) -> None:
    whole = save({"state_dict": nn.Linear(2, 3).state_dict(), "epoch": 3}, tmp_path / "file", zipped).read_bytes()
    chance = random.Random(0)
    path, refusals = tmp_path / "damaged", []
    for _ in range(300):
        data = bytearray(whole)
        if chance.random() < 0.3:
            del data[chance.randrange(len(data)) :]
        else:
            for _ in range(chance.randint(1, 3)):
                data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            read(load(path))
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > 100
    assert all(str(path) in refusal for refusal in refusals)
