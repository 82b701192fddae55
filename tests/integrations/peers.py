"""The projects that we drop into, imported for what the tests need of them.

`tests/peers.txt` installs them without their dependencies, most of which concern other parts of them (picture
transforms, training loops, downloads) and no longer install beside a current torch. Modules that are missing are stood
in for while a peer is imported: any name in one can be imported, subclassed and called, and does nothing.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch

STAND_INS = (
    "basicsr",
    "cv2",
    "more_itertools",
    "pkg_resources",
    "pytorch_lightning",
    "pywt",
    "torchvision",
    "youtokentome",
)


class _Anything:
    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _StandIn(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return torch.nn.Module if name == "LightningModule" else type(name, (_Anything,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in STAND_INS:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


@contextmanager
def _standing_in() -> Iterator[None]:
    # transformers remembers whether torchvision is there; it must not ask while something stands in for it.
    importlib.import_module("transformers.utils.import_utils").is_torchvision_available()
    finder = _Finder()
    sys.meta_path.append(finder)  # last: what is installed is found first
    hub = importlib.import_module("huggingface_hub")
    missing = not hasattr(hub, "cached_download")
    if missing:
        hub.cached_download = _Anything()
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        if missing:
            del hub.cached_download
        for name in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
            del sys.modules[name]


def peer(name: str) -> types.ModuleType:
    """The peer's module of this name; raises ImportError where `tests/peers.txt` was not installed."""
    with _standing_in():
        return importlib.import_module(name)
