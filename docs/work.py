"""What the build's processes are handed: the name of a module beside this one, whose pages they make."""

from __future__ import annotations

import importlib
from typing import Any


def pages(module: str, *arguments: Any) -> list[tuple[str, str | bytes]]:
    return list(importlib.import_module(f"docs.{module}").pages(*arguments))
