"""Gumbel lookups of rows far from 0: the rule of every backend."""

from __future__ import annotations

import functools

import pytest
import torch

from dalle_kernels import gumbel_lookup, gumbel_projection_lookup
from tests.codebook import offsets

# Backend and dtype, as a name.
CASES = {
    "reference": torch.float32,
    "cpu": torch.float32,
    "cpu-16": torch.bfloat16,
    "triton": torch.float32,
    "triton-16": torch.float16,
}
MODES = [(False, True), (True, True), (True, False)]  # (hard, noise)


def _backend(name: str) -> str:
    if name.startswith("triton"):
        pytest.importorskip("triton")
    return name.removesuffix("-16")


@pytest.mark.parametrize("mask", offsets.MASKS)
@pytest.mark.parametrize(("hard", "noise"), MODES)
@pytest.mark.parametrize("name", CASES)
def test_lookup(name: str, mask: str, hard: bool, noise: bool) -> None:
    def lookup(logits, codebook, hard, noise):  # type: ignore[no-untyped-def]
        return gumbel_lookup(logits, codebook, offsets.TAU, hard, noise, 5, _backend(name))

    offsets.check(lookup, CASES[name], mask, hard, noise)


@pytest.mark.parametrize("mask", ["-1e9", "lowest", "1e6 away"])
@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_projection(name: str, mask: str) -> None:
    lookup = functools.partial(_projection, _backend(name))
    offsets.check(offsets.projected(lookup), torch.float32, mask, False, True)


def _projection(backend, features, weight, bias, codebook, hard, noise):  # type: ignore[no-untyped-def]
    return gumbel_projection_lookup(features, weight, bias, codebook, offsets.TAU, hard, noise, 5, backend)
