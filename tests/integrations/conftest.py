"""What tests of several drop-ins share."""

from collections.abc import Iterator

import pytest


@pytest.fixture
def attention_names() -> Iterator[None]:
    """What a test registers with transformers goes when it ends."""
    from transformers import AttentionInterface, AttentionMaskInterface

    kept = [(interface, dict(interface._global_mapping)) for interface in (AttentionInterface, AttentionMaskInterface)]
    yield
    for interface, mapping in kept:
        interface._global_mapping.clear()
        interface._global_mapping.update(mapping)
