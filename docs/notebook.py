"""Runs a notebook, a script of cells as jupytext reads it, and makes a page of it with what its cells showed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 240  # for the start of a kernel and for one cell, on a machine that has other work too


def pages(path: Path) -> Iterator[tuple[str, str | bytes]]:
    """(path, content): the page, its pictures, and the notebook itself to take home.

    Raises:
        nbclient.exceptions.CellExecutionError: for a cell that fails.
    """
    import jupytext
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import MarkdownExporter
    from traitlets.config import Config

    name = path.stem
    notebook = jupytext.read(path)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    with tempfile.TemporaryDirectory() as folder:
        place = {"metadata": {"path": folder}}
        files = Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"})  # no port is opened
        limits = {"timeout": SECONDS, "startup_timeout": SECONDS}
        NotebookClient(notebook, **limits, coalesce_streams=True, resources=place, config=files).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    body, resources = MarkdownExporter().from_notebook_node(notebook, {"output_files_dir": name})
    body += f"\n\n[This notebook]({name}.ipynb), to run at home.\n"
    yield f"notebooks/{name}.md", body
    yield f"notebooks/{name}.ipynb", nbformat.writes(notebook)
    for picture, content in resources.get("outputs", {}).items():
        yield f"notebooks/{picture}", content
