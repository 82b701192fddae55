"""A file that is to be converted: its tensors by name, and what stands beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dalle_reference.convert import pickles
from dalle_reference.errors import UserError

_SHOWN = 4


@dataclass(frozen=True)
class Source:
    """A file of another project.

    Attributes:
        path: the file.
        tensors: by name (as views of the file, where torch wrote it): those of the module, of the state dict, or of a
            checkpoint's "state_dict" or "weights", whichever the file has.
        tree: all that the file holds, as `pickles.load` gives it; the tensors again for safetensors.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    tree: Any

    @classmethod
    def open(cls, path: Path) -> Source:
        """Reads safetensors, or either of torch's formats.

        Raises:
            UserError: if there is no such file, it is refused, or it holds no tensors.
        """
        tensors: Mapping[str, Tensor]
        try:
            if path.suffix == ".safetensors":
                tensors = tree = load_file(path)
            else:
                tree = pickles.load(path)
                tensors = {name: stored.read() for name, stored in pickles.state_dict(_weights(tree), path).items()}
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from error
        except SafetensorError as error:
            raise UserError(f"{path}: cannot be read as safetensors ({error})") from error
        if not tensors:
            raise UserError(f"{path}: holds no tensors where a module, a state dict or a checkpoint has them")
        if all(name.startswith("module.") for name in tensors):  # as wrappers for several GPUs and for fp16 name them
            tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
        return cls(path, tensors, tree)

    def check(self, what: str, found: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> None:
        """Raises UserError unless the tensors have just the names and shapes that `what` has."""
        problems = []
        if missing := expected.keys() - found.keys():
            problems.append(f"{some(missing)} missing")
        if unexpected := found.keys() - expected.keys():
            problems.append(f"{some(unexpected)} unexpected")
        problems += [
            f"{name} has shape {tuple(found[name].shape)}, wanted {tuple(shape)}"
            for name, shape in expected.items()
            if name in found and tuple(found[name].shape) != tuple(shape)
        ][:_SHOWN]
        if problems:
            raise UserError(f"{self.path}: not the weights of {what}: {'; '.join(problems)}")

    def size(self, name: str, dimension: int) -> int:
        """One side of a tensor, from which a configuration is read.

        Raises:
            UserError: if there is no such tensor, or it has fewer dimensions.
        """
        tensor = self.tensors.get(name)
        if tensor is None or tensor.dim() <= dimension:
            shape = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise UserError(f"{self.path}: {name} is {shape}; it tells the model's size")
        return tensor.shape[dimension]

    def count(self, pattern: str, first: int = 0) -> int:
        """How many of `pattern`, with `first`, `first` + 1, ... in the place of {}, begin names of tensors."""
        number = 0
        while any(name.startswith(pattern.format(first + number)) for name in self.tensors):
            number += 1
        return number


def _weights(tree: Any) -> Any:
    if isinstance(tree, dict):
        for name in ("state_dict", "weights"):
            if isinstance(tree.get(name), dict):
                return tree[name]
    if isinstance(tree, (dict, pickles.Record)):
        return tree
    return {}


def some(names: Iterable[str]) -> str:
    """A few of the names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more


def shapes(model: type[nn.Module], config: Any) -> dict[str, tuple[int, ...]]:
    """The names and shapes of one of our models' tensors."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in model(config).state_dict().items()}
