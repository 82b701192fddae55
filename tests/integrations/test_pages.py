"""The site's pages about other projects' models: their code runs as it stands there."""

from pathlib import Path

import pytest

from docs import snippets

from .peers import peer

ROOT = Path(__file__).parents[2]
RESULTS = {
    "natten": lambda names: names["out"].shape == names["q"].shape,  # needs nothing of theirs
    "vector_quantize_pytorch": lambda names: names["quantized"].shape == (1, 1024, 64),
    "dalle_pytorch": lambda names: names["images"].isfinite().all(),
    "rudalle": lambda names: len(names["model"].transformer._patterns) == 2,
    "transformers": lambda names: (
        257 <= names["tokens"].shape[1] <= 264 and names["drawn"].shape[0] == 4 and names["cache"].nbytes > 0
    ),
}


def test_every_drop_in_has_a_page():
    known = {path.stem for path in (ROOT / "dalle_kernels/integrations").iterdir() if not path.name.startswith("__")}
    assert known - {"extension", "transformers_cache"} == set(RESULTS)


@pytest.mark.usefixtures("attention_names")
@pytest.mark.parametrize("name", RESULTS)
def test_a_page_s_code_runs(name, monkeypatch):
    if name != "natten":
        peer(name)
    if name == "dalle_pytorch":
        theirs = peer("dalle_pytorch.transformer")
        monkeypatch.setattr(theirs, "SparseAttention", theirs.SparseAttention)
    names = {}
    page = f"docs/pages/models/{name.replace('_', '-')}.md"
    snippets.run((ROOT / page).read_text(), page, names)
    assert RESULTS[name](names)
