"""Reads what `torch.save` wrote without running anything in it: state dicts, checkpoints, whole pickled modules.

A pickle is a program: it names functions and calls them. Here it may name only what `_ADMITTED` lists, by module and
name together, and gets an inert stand-in for each; nothing is imported. Three walls stand behind one another:

1. The program is read through first. It may use only the instructions that `torch.save` writes, and name only what
   is admitted; otherwise nothing of it is run, and the error says what it named.
2. What runs finds stand-ins: classes become `Record`s, which keep arguments and state and do nothing; tensors become
   `StoredTensor`s, which say where in the file their numbers are.
3. Numbers are views of the file, mapped into memory. Sizes, strides and offsets are checked against what the file
   has, so false ones neither allocate anything nor reach beyond it.

`torch.load(weights_only=True)` is not used, for two reasons: it refuses modules in the format from before torch 1.6,
in which a class comes with its source, and there it allocates whatever size a file claims.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor

from dalle_reference.errors import UserError

# What the pickler's protocol 2, which torch.save has always used, writes.
_INSTRUCTIONS = """
PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE
EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS
BINGET LONG_BINGET BINPUT LONG_BINPUT GLOBAL REDUCE NEWOBJ BUILD BINPERSID
"""

_MOST_TUPLES = 100_000
"""Enough for 20,000 tensors, at four or five each; a million within one another overflow the stack when hashed."""

_HUGE = 1 << 48
"""Sizes from here on could overflow where torch multiplies them, even those of tensors without elements."""

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


class Record:
    """Stands for an object of some class in the file: what it was made with, and does nothing.

    Attributes:
        arguments: the positional arguments it was made with.
        state: its attributes, for most objects; None where the pickle gives none.
        entries: what it held, for objects that are mappings or lists.
    """

    __slots__ = ("arguments", "entries", "state")
    origin: ClassVar[str]
    """The class's full name in the file."""
    arguments: tuple[Any, ...]
    state: Any
    entries: list[Any]

    def __new__(cls, *arguments: Any) -> Record:  # not __init__, which pickles of most objects never call
        self = super().__new__(cls)
        self.arguments, self.state, self.entries = arguments, None, []
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries.append((key, value))

    def append(self, value: Any) -> None:
        self.entries.append(value)

    def __repr__(self) -> str:
        return f"<{self.origin}>"


class _Mapping(dict[Any, Any]):
    """An OrderedDict without its attributes: state dicts carry some (`_metadata`), and these could hide its methods."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Storage(NamedTuple):
    """A run of numbers in the file."""

    file: _File
    key: str
    dtype: torch.dtype
    elements: int


class StoredTensor(NamedTuple):
    """A tensor of the file that has not been looked at yet; an immutable tuple, so that nothing can be set on it."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor, as a view of the file (copy on write)."""
        if not math.prod(self.size):
            return torch.empty(self.size, dtype=self.storage.dtype)
        return self.storage.file.numbers(self.storage).as_strided(self.size, self.stride, self.offset)


class _Rebuild:
    """Stands for one of torch's functions that put a tensor together; has no attributes that a file could set."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError(f"state for the function {self._name}")

    def __call__(self, *arguments: Any) -> Any:
        if self._name.startswith("_rebuild_parameter"):
            return arguments[0]
        match arguments:
            case (_Storage() as storage, int() as offset, tuple() as size, tuple() as stride, *_) if len(size) == len(
                stride
            ) <= 8 and all(map(_is_count, (offset, *size, *stride))):
                needed = math.prod(size)
                last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
                # A tensor of more elements than its storage repeats some: written out, it could have any size.
                if (needed and max(last + 1, needed) > storage.elements) or math.prod(max(n, 1) for n in size) >= _HUGE:
                    raise storage.file.refused(
                        f"a tensor of shape {size} with strides {stride} at {offset} does not fit"
                        f" its storage of {storage.elements} elements"
                    )
                return StoredTensor(storage, offset, size, stride)
        raise pickle.UnpicklingError(f"{self._name} of something else than a storage, an offset, sizes and strides")


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number < _HUGE


def _record(module: str, name: str) -> type[Record]:
    return type(name, (Record,), {"__slots__": (), "origin": f"{module}.{name}"})


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

_CLASSES = {
    "dall_e.encoder": "Encoder EncoderBlock",
    "dall_e.decoder": "Decoder DecoderBlock",
    "dall_e.utils": "Conv2d",
    "torch.nn.modules.activation": "ReLU",
    "torch.nn.modules.container": "Sequential",
    "torch.nn.modules.linear": "Identity",
    "torch.nn.modules.pooling": "MaxPool2d",
    "torch.nn.modules.upsampling": "Upsample",
    "torch": "Size device float16 float32 float64 bfloat16",
    "functools": "partial",
    # What training programs leave beside the weights: settings and the state of callbacks.
    **dict.fromkeys(
        ("__builtin__", "builtins"), "bool bytearray complex dict float int list long object set str tuple unicode"
    ),
    "_codecs": "encode",
    "argparse": "Namespace",
    "collections": "Counter defaultdict",
    "numpy": "dtype ndarray",
    **dict.fromkeys(("numpy.core.multiarray", "numpy._core.multiarray"), "scalar _reconstruct"),
    "omegaconf.base": "Container ContainerMetadata Metadata",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.nodes": "AnyNode BooleanNode BytesNode EnumNode FloatNode IntegerNode PathNode StringNode",
    "pathlib": "Path PosixPath WindowsPath",
    **{
        f"{lightning}.{module}": names
        for lightning in ("pytorch_lightning", "lightning.pytorch")
        for module, names in {
            "callbacks.early_stopping": "EarlyStopping",
            "callbacks.lr_monitor": "LearningRateMonitor",
            "callbacks.model_checkpoint": "ModelCheckpoint",
            "utilities.parsing": "AttributeDict",
        }.items()
    },
    "lightning_fabric.utilities.data": "AttributeDict",
    "typing": "Any",
}

_ADMITTED: dict[tuple[str, str], Any] = {
    **{(module, name): _record(module, name) for module, names in _CLASSES.items() for name in names.split()},
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    **{
        ("torch._utils", name): _Rebuild(name)
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state")
    },
    ("collections", "OrderedDict"): _Mapping,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, program: bytes, file: _File) -> None:
        super().__init__(io.BytesIO(program))
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        return self._file.admit(module, name)

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("module", type() as origin, *_) if issubclass(origin, Record):
                return origin  # the legacy format adds the class's file and source, which nobody looks at
            case ("storage", torch.dtype() as dtype, str() as key, str(), int() as count, *view) if count >= 0:
                if any(part is not None for part in view):
                    raise self._file.refused("a storage in it is a view of another one, as torch wrote before 0.4")
                self._file.claim(key, dtype, count)
                return _Storage(self._file, key, dtype, count)
        raise self._file.refused("it refers to something that is neither a storage nor a module")


class _File:
    """A file in either of torch's formats, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError as error:  # an empty file cannot be mapped
            raise UserError(f"{path}: is empty") from error
        self._claims: dict[str, tuple[torch.dtype, int]] = {}  # what the pickle says of each storage
        self._starts: dict[str, int] = {}  # where each storage begins, once it is known to be there

    def refused(self, reason: str) -> UserError:
        return UserError(f"{self.path}: refused: {reason}")

    def admit(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise self.refused(
                f"its pickle names {module}.{name}, which weights do not need and which could run anything"
            ) from None

    def claim(self, key: str, dtype: torch.dtype, count: int) -> None:
        if self._claims.setdefault(key, (dtype, count)) != (dtype, count):
            raise self.refused(f"it gives storage {key!r} two sizes")

    def _place(self, key: str, start: int, length: int) -> None:
        """Storage `key` has `length` bytes from `start` on: what the pickle said must be just that."""
        dtype, count = self._claims[key]
        if count * dtype.itemsize != length or start + length > len(self._bytes):
            there = min(length, len(self._bytes) - start)
            raise self.refused(f"storage {key!r} should have {count * dtype.itemsize} bytes, the file has {there}")
        self._starts[key] = start

    def numbers(self, storage: _Storage) -> Tensor:
        """All of a storage's elements."""
        start = self._starts[storage.key]
        flat = torch.frombuffer(self._bytes, dtype=storage.dtype, count=storage.elements, offset=start)
        if flat.data_ptr() % storage.dtype.itemsize:  # the legacy format aligns nothing
            whole = bytearray(self._bytes[start : start + storage.elements * storage.dtype.itemsize])
            flat = torch.frombuffer(whole, dtype=storage.dtype)
        return flat

    def load(self) -> Any:
        try:
            return self._load_zip() if self._bytes[:4] == b"PK\x03\x04" else self._load_legacy()
        except UserError:
            raise
        except Exception as error:  # a forged pickle can make the unpickler raise anything
            raise self.refused(
                f"it is damaged, or not what torch.save writes ({error or type(error).__name__})"
            ) from error

    def _run(self, program: bytes) -> Any:
        """Runs a pickle after a look at all of its instructions."""
        stored, tuples, allowed = 0, 0, set(_INSTRUCTIONS.split())
        for instruction, argument, _ in pickletools.genops(program):
            if instruction.name == "GLOBAL":
                self.admit(*str(argument).split(" ", 1))
            elif instruction.name not in allowed:
                raise self.refused(
                    f"its pickle has the instruction {instruction.name}, which torch.save does not write"
                )
            elif instruction.name in ("BINPUT", "LONG_BINPUT"):
                if int(argument or 0) > stored:  # the unpickler's memo is an array as long as the largest index
                    raise self.refused("its pickle numbers objects out of order")
                stored += 1
            elif instruction.name.startswith("TUPLE"):
                tuples += 1
                if tuples > _MOST_TUPLES:
                    raise self.refused(f"its pickle makes more than {_MOST_TUPLES} tuples")
        return _Unpickler(program, self).load()

    def _load_zip(self) -> Any:
        with zipfile.ZipFile(self.path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
        programs = [name for name in entries if name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise self.refused(f"a zip archive with {len(programs)} entries named data.pkl, wanted one")
        folder = programs[0].removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in entries and self._read(entries[order]) != b"little":
            raise self.refused("its numbers are not in little-endian order")
        tree = self._run(self._read(entries[programs[0]]))
        for key in self._claims:
            entry = entries.get(f"{folder}data/{key}")
            if entry is None:
                raise self.refused(f"storage {key!r} is missing")
            self._place(key, self._start_of(entry), entry.file_size)
        return tree

    def _read(self, entry: zipfile.ZipInfo) -> bytes:
        start = self._start_of(entry)
        return self._bytes[start : start + entry.file_size]

    def _start_of(self, entry: zipfile.ZipInfo) -> int:
        """Where an entry's bytes begin. torch stores them as they are; a compressed one could unfold to any size."""
        header = self._bytes[entry.header_offset : entry.header_offset + 30]
        if entry.compress_type != zipfile.ZIP_STORED or len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise self.refused(f"entry {entry.filename!r} is not stored as torch.save stores it")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + entry.file_size > len(self._bytes):
            raise self.refused(f"entry {entry.filename!r} should have {entry.file_size} bytes, the file is shorter")
        return start

    def _next_pickle(self) -> bytes:
        start = self._bytes.tell()
        for _ in pickletools.genops(self._bytes):  # type: ignore[arg-type]  # a map reads as a file does
            pass
        return self._bytes[start : self._bytes.tell()]

    def _load_legacy(self) -> Any:
        """Five pickles (magic number, version, the writer's platform, the object, keys), then the storages."""
        if not self._bytes[:2] == b"\x80\x02" or self._run(self._next_pickle()) != _LEGACY_MAGIC:
            raise UserError(f"{self.path}: is neither of torch's formats nor safetensors")
        version = self._run(self._next_pickle())
        platform = self._run(self._next_pickle())
        if version != _LEGACY_PROTOCOL or not platform["little_endian"]:
            raise self.refused(f"version {version} on a platform {platform}")
        tree = self._run(self._next_pickle())
        keys = self._run(self._next_pickle())
        at = self._bytes.tell()
        for key in keys:
            (count,) = struct.unpack("<q", self._bytes[at : at + 8])
            length = count * self._claims[key][0].itemsize
            self._place(key, at + 8, length)
            at += 8 + length
        if self._starts.keys() != self._claims.keys():
            raise self.refused("some of its storages are missing")
        return tree


def load(path: Path) -> Any:
    """What a file of `torch.save` holds, as plain data.

    Args:
        path: in torch's zip format, or in the one from before torch 1.6.

    Returns:
        dicts, lists, tuples, strings and numbers; `StoredTensor` for tensors, `Record` for objects of classes.

    Raises:
        UserError: for a file that names anything but what weights need, claims more than it has, or is damaged.

    Example:
        >>> torch.save({"weight": torch.ones(2, 3), "epoch": 7}, "model.pt")
        >>> saved = load(Path("model.pt"))
        >>> saved["epoch"], saved["weight"].read().shape
        (7, torch.Size([2, 3]))
    """
    return _File(path).load()


def modules(root: Record, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A pickled module of the file `path`, and all within it: name ("" or one that ends in a dot), and attributes."""
    pending, seen = [("", root)], set()
    while pending:
        name, record = pending.pop(0)
        state = record.state if isinstance(record, Record) else None
        children = state.get("_modules") if isinstance(state, dict) else None
        if not isinstance(children, dict) or id(record) in seen:  # one that holds itself would never end
            raise UserError(f"{path}: refused: {name or 'the object in it'} is no module of a tree of modules")
        seen.add(id(record))
        yield name, state
        pending += [(f"{name}{child}.", inner) for child, inner in children.items() if inner is not None]


def state_dict(node: Any, path: Path) -> dict[str, StoredTensor]:
    """The tensors of a pickled module, or those of a dict, by name; what else a dict holds is left out."""
    if isinstance(node, Record):
        pairs = [
            (prefix + name, tensor)
            for prefix, state in modules(node, path)
            for group in ("_parameters", "_buffers")
            for name, tensor in state.get(group, {}).items()
        ]
    else:
        pairs = list(node.items())
    return {name: value for name, value in pairs if isinstance(name, str) and isinstance(value, StoredTensor)}
