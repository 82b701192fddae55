"""The mistakes that `tests.emulation.mutations` makes on purpose can still be made: each stands once in the kernels.

Whether tests catch them takes a build of the emulation each: `python -m tests.emulation.mutations`.
"""

from __future__ import annotations

import pytest

from tests.emulation.mutations import MUTATIONS, ROOT, Mutation, mutate


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.file}: {mutation.meaning}")
def test_a_mutation_applies(mutation: Mutation) -> None:
    text = (ROOT / "csrc" / mutation.file).read_text()
    assert mutate(text, mutation) != text
    assert all((ROOT / test).exists() for test in mutation.tests)


def test_each_is_another_one() -> None:
    assert len({(mutation.file, mutation.meaning) for mutation in MUTATIONS}) == len(MUTATIONS)
