"""README's drop-ins run as they stand there."""

import re
from pathlib import Path

import pytest

from .peers import peer

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = {
    found[1]: block
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    if (found := re.search(r"from dalle_kernels\.integrations\.(\w+) import", block))
}
RESULTS = {
    "natten": lambda names: names["out"].shape == names["q"].shape,  # needs nothing of theirs
    "vector_quantize_pytorch": lambda names: names["quantized"].shape == (1, 1024, 64),
    "dalle_pytorch": lambda names: names["images"].isfinite().all(),
    "rudalle": lambda names: len(names["model"].transformer._patterns) == 2,
    "transformers_cache": lambda names: names["drawn"].shape[0] == 4 and names["cache"].nbytes > 0,
    "transformers": lambda names: 257 <= names["tokens"].shape[1] <= 264,
}


def test_there_are_drop_ins():
    assert set(BLOCKS) == set(RESULTS)


@pytest.mark.usefixtures("attention_names")
@pytest.mark.parametrize("name", BLOCKS)
def test_drop_in(name):
    if name != "natten":
        peer(name.removesuffix("_cache"))
    names = {}
    if name == "transformers_cache":  # it goes on with the model of the block before
        exec(BLOCKS["transformers"], names)
    exec(BLOCKS[name], names)
    assert RESULTS[name](names)
