"""Runs the code of a page, and puts beneath each block what it printed.

The Python blocks of a page run one after another in one namespace and one folder, as a reader would type them; a shell
block runs where its fence says `sh run`. Python that is shown and not run (another project's, which is not installed
here) has the fence `py`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<kind>python|sh run)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
# The projects whose models a page's code makes, imported as the tests import them.
PEERS = ("dalle_pytorch", "rudalle", "transformers", "vector_quantize_pytorch")


class BlockError(Exception):
    """A block of a page does not run."""


def has_code(markdown: str) -> bool:
    return FENCE.search(markdown) is not None


def run(markdown: str, where: str, names: dict[str, Any] | None = None) -> str:
    """`markdown` with the output of each block beneath it; `names` takes what the blocks define.

    Raises:
        BlockError: for a block that fails; names `where` and the block.
    """
    names = {} if names is None else names
    names["__name__"] = "page"
    _import_peers(markdown)

    def answered(found: re.Match[str]) -> str:
        code, indent = textwrap.dedent(found["code"]), found["indent"]
        try:
            said = _python(code, names) if found["kind"] == "python" else _shell(code)
        except Exception as error:
            raise BlockError(f"{where}: {type(error).__name__}: {error}, in\n{code}") from error
        block = found[0].replace("```sh run", "```sh", 1)
        if said.strip():
            block += "\n\n" + textwrap.indent(f"```text\n{said.rstrip()}\n```", indent)
        return block

    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return FENCE.sub(answered, markdown)
        finally:
            os.chdir(before)


def _python(code: str, names: dict[str, Any]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "a block", "exec"), names)
    return printed.getvalue()


def _shell(code: str) -> str:
    found = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(code, shell=True, env=os.environ | found, capture_output=True, text=True)
    if done.returncode:
        raise BlockError(f"exit status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _import_peers(markdown: str) -> None:
    wanted = [name for name in PEERS if re.search(rf"^ *(import|from) {name}\b", markdown, re.MULTILINE)]
    if wanted:
        from tests.integrations.peers import peer

        for name in wanted:
            peer(name)
