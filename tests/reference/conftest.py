"""A handful of captioned pictures, and the options that say where they are."""

from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    colors = ["red", "green", "blue", "yellow", "black", "orange", "purple", "gray", "pink", "brown", "cyan", "navy"]
    for color in colors:
        picture = Image.new("RGB", (16, 16), "white")
        picture.paste(color, (3, 3, 13, 13))
        picture.save(folder / f"{color}.png")
        (folder / f"{color}.txt").write_text(f"a {color} square\n{color}\n")
    return folder


@pytest.fixture(scope="session")
def common(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["--source", str(pictures), "--cache", str(tmp_path_factory.mktemp("cache"))]
