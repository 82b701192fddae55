"""What mkdocstrings has to know of our docstrings, and the rule that each has an example."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

from griffe import Extension, Object

WITHOUT = ("dalle_kernels.Pattern",)  # a base, which nobody makes


class Examples(Extension):
    """Our sections are headed `Example:`; the parser knows `Examples:`."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)


def described(markdown: str) -> list[str]:
    """The names that a page hands to mkdocstrings."""
    return re.findall(r"^::: (\S+)$", markdown, re.MULTILINE)


def without_example(names: list[str]) -> list[str]:
    """Those of `names` whose docstrings have none."""
    return [name for name in names if name not in WITHOUT and ">>>" not in (inspect.getdoc(_found(name)) or "")]


def _found(name: str) -> Any:
    """The object of a dotted name, the longest prefix of which is a module."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise ValueError(f"{name}: no such module")
