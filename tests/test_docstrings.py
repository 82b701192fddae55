"""Every example in a public docstring runs, with the public names and torch at hand."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import dalle_kernels

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(dalle_kernels.__path__, "dalle_kernels.")
    if not any(part.startswith(("_", "triton", "cuda")) for part in name.split("."))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    names = {**vars(dalle_kernels), **vars(module), "torch": torch}
    assert doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def test_every_public_name_has_an_example() -> None:
    public = [name for name in dalle_kernels.__all__ if name != "Pattern"]  # the base, which nobody makes
    assert [name for name in public if ">>>" not in (getattr(dalle_kernels, name).__doc__ or "")] == []
