"""The mistakes that `tests.emulation.mutations` makes on purpose can still be made: each stands once in the kernels.

Whether tests catch them takes a build of the emulation each: `python -m tests.emulation.mutations`.
"""

from __future__ import annotations

import pytest

from tests.emulation.mutations import MUTATIONS, ROOT, TABLE, Mutation, mutate, recorded, table


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.file}: {mutation.meaning}")
def test_a_mutation_applies(mutation: Mutation) -> None:
    text = (ROOT / "csrc" / mutation.file).read_text()
    assert mutate(text, mutation) != text
    assert all((ROOT / test).exists() for test in mutation.tests)


def test_each_is_another_one() -> None:
    assert len({(mutation.file, mutation.meaning) for mutation in MUTATIONS}) == len(MUTATIONS)


def test_the_page_keeps_what_was_not_made_again() -> None:
    caught = recorded()
    assert table(caught) == TABLE.read_text()
    first, second = ((entry.file, entry.meaning) for entry in MUTATIONS[:2])
    page = table({first: None, second: "test_attention.py::test_forward[a | b]", ("gone.cuh", "no more"): None})
    assert f"| `{first[0]}` | {first[1]} | **nothing** |" in page
    assert f"| `{second[0]}` | {second[1]} | `test_attention.py::test_forward[a | b]` |" in page
    assert "gone.cuh" not in page
