"""The peers can be imported where their own dependencies cannot."""

import sys

import pytest
from torch import nn

from .peers import STAND_INS, peer


@pytest.mark.parametrize(
    "name", ["dalle_pytorch", "rudalle.dalle.model", "rudalle.vae.model", "dall_e", "taming.models.vqgan"]
)
def test_imports_and_leaves_no_stand_in(name):
    assert peer(name).__name__ == name
    left = [found for found in sys.modules.values() if type(found).__name__ == "_StandIn"]
    assert not left, f"stand-ins for {STAND_INS} must not outlive the import"


def test_lightning_modules_are_modules():
    assert issubclass(peer("taming.models.vqgan").VQModel, nn.Module)
