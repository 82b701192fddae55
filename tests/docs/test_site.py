"""What the site is made of, without MkDocs: its modules, and every page's code (`make docs` builds the whole)."""

from __future__ import annotations

import functools
import json
import re
import shlex
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dalle_reference import cli

import dalle_kernels
from dalle_kernels import Causal, Row, Schedule, TokenLayout, nn
from docs import docstrings, drawings, gallery, measured, operations, snippets

PAGES = sorted((snippets.ROOT / "docs/pages").rglob("*.md"))
NAMES = [str(path.relative_to(snippets.ROOT / "docs/pages")) for path in PAGES]
# Pages about other projects' models: tests/integrations/test_pages.py runs those.
QUICK = [
    path
    for path in (snippets.ROOT / "README.md", *PAGES)
    if snippets.has_code(path.read_text()) and path.parent.name != "models"
]


@pytest.mark.parametrize("path", QUICK, ids=lambda path: path.stem)
def test_the_code_of_a_page_runs(path: Path) -> None:
    ran = snippets.run(path.read_text(), path.name)
    assert "```sh run" not in ran
    assert ran.count("```") >= path.read_text().count("```")


def test_the_command_line_takes_what_the_pages_say(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def noted(name: str, command: Callable[..., None]) -> Callable[..., None]:
        return functools.wraps(command)(lambda **arguments: taken.append(name))

    monkeypatch.setattr(cli, "_COMMANDS", {name: noted(name, command) for name, command in cli._COMMANDS.items()})
    asked = []
    for path in (snippets.ROOT / "README.md", *PAGES):
        text = path.read_text().replace("\\\n", " ")
        for line in re.findall(r"(?:^|`|-m )dalle[-_]reference ([^`\n]+)", text, re.MULTILINE):
            arguments = shlex.split(line, comments=True)
            if arguments[-1] == "--help":
                assert arguments[0] in cli._COMMANDS, f"{path.name}: {line}"
                continue
            try:
                cli.main(arguments)
            except SystemExit:
                pytest.fail(f"{path.name}: {line}")
            asked.append(arguments[0])
    assert taken == asked
    assert {"generate", "plan", "tokenize", "train-dvae", "train-transformer"} <= set(asked)


def test_what_a_block_prints_stands_beneath_it() -> None:
    python = "- in a list\n\n    ```python\n    print(a + 1)\n    ```\n\n"
    page = "```python\na = 2\n```\n\n" + python + "```sh run\necho $((3 + 4))\n```\n"
    ran = snippets.run(page, "page")
    assert "    print(a + 1)\n    ```\n\n    ```text\n    3\n    ```\n\n```sh\n" in ran
    assert ran.endswith("```sh\necho $((3 + 4))\n```\n\n```text\n7\n```\n")


@pytest.mark.parametrize("block", ["```python\n1 / 0\n```", "```sh run\nfalse\n```"])
def test_a_block_that_fails_names_its_page(block: str) -> None:
    with pytest.raises(snippets.BlockError, match=r"somewhere\.md"):
        snippets.run(f"{block}\n", "somewhere.md")


def test_every_public_name_is_described_and_has_an_example() -> None:
    described = [name for path in PAGES for name in docstrings.described(path.read_text())]
    assert len(described) == len(set(described))
    public = {f"dalle_kernels.{name}" for name in dalle_kernels.__all__}
    modules = [kind for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, torch.nn.Module)]
    public |= {f"dalle_kernels.nn.{kind.__name__}" for kind in modules if kind.__module__ == "dalle_kernels.nn"}
    assert public - set(described) == set()
    assert docstrings.without_example([name for name in described if "dalle_pytorch" not in name]) == []


def test_a_docstring_without_an_example_is_noticed() -> None:
    assert docstrings.without_example(["dalle_kernels.native.refuse_cpu", "dalle_kernels.explain"][1:]) == []
    assert docstrings.without_example(["dalle_kernels.backends.native.refuse_cpu"]) == [
        "dalle_kernels.backends.native.refuse_cpu"
    ]


def test_the_gallery_shows_every_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gallery.missing() == []
    monkeypatch.setattr(gallery, "SHOWN", gallery.SHOWN[1:])
    assert gallery.missing() == ["Causal"]


def test_a_pattern_s_section() -> None:
    (shown,) = (shown for shown in gallery.SHOWN if shown.title == "Row")
    section = "\n".join(gallery._section(shown, gallery.make(shown), "row"))
    assert "328,304 of 819,840 causal ones" in section
    assert "a cache of 289 tokens" in section
    assert "from dalle_kernels import Row, TokenLayout\n" in section
    snippets.run(section, "row")


def test_pictures_of_a_pattern() -> None:
    drawn = gallery.draw(Row(TokenLayout(16, (8, 8))))
    assert set(drawn) == {"pairs", "tiles", "order", "keys"}
    assert all(image.startswith(b"\x89PNG") and len(image) > 3000 for image in drawn.values())


@pytest.mark.parametrize("backward", [False, True])
def test_a_walk_numbers_every_tile_once(backward: bool) -> None:
    schedule = Schedule.build(Causal(TokenLayout(64, (16, 16))))
    tree = ElementTree.fromstring(drawings.walk(schedule, backward))
    texts = [int(text.text or 0) for text in tree.iter("{http://www.w3.org/2000/svg}text")]
    offsets = schedule.query_offsets if backward else schedule.key_offsets
    assert sorted(texts) == sorted(step + 1 for count in np.diff(offsets) for step in range(count))


def test_refusals_come_from_the_code() -> None:
    assert "it takes a head dimension D up to 256, not {width}" in operations.refused("dalle_kernels.attention.cpu")
    assert any("8.0 or later" in text for text in operations.refused("dalle_kernels.likelihood.triton"))
    assert "it takes bfloat16, float16, not {dtype}" in operations.refused("dalle_kernels.attention.cuda")
    assert operations.refused("dalle_kernels.attention.reference") == []
    for path in (path for path in PAGES if "{{" in path.read_text()):
        for name in re.findall(r"^\{\{ backends (\w+) \}\}$", path.read_text(), re.MULTILINE):
            assert operations.backends(name).count("\n| `") == len(operations.operation(name).modules)


def test_measurements_are_the_committed_ones() -> None:
    made = dict(measured.pages())
    page = str(made["measured/index.md"])
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page)[1])  # type: ignore[index]
    assert all(len(row) == len(data["columns"]) for row in data["rows"])
    assert "`python -m benchmarks run cpu` |" in page
    for plot in re.findall(r"\((plots/\S+?\.svg)\)", page):
        assert f"measured/{plot}" in made


def test_notebooks_are_scripts_that_parse() -> None:
    scripts = sorted((snippets.ROOT / "docs/notebooks").glob("*.py"))
    assert [f"notebooks/{path.stem}.md" for path in scripts] == sorted(
        found
        for found in re.findall(r"notebooks/\w+\.md", (snippets.ROOT / "docs/mkdocs.yml").read_text())
        if "index" not in found
    )
    for path in scripts:
        compile(path.read_text(), str(path), "exec")
        assert path.read_text().startswith("# %% [markdown]\n")


def test_every_page_is_in_the_navigation() -> None:
    navigation = (snippets.ROOT / "docs/mkdocs.yml").read_text().partition("\nnav:")[2]
    assert [name for name in NAMES if name not in navigation] == []
    assert "docs" in sys.modules
