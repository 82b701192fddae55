"""MkDocs' door to what the site makes of the code: pages, pictures, outputs, formulas. What fails ends the build."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "python")) if path not in sys.path]

from docs import docstrings, operations, snippets, work  # noqa: E402

# Files of the repository that are pages as they stand.
INCLUDED = {
    "DESIGN.md": "inside/design.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/results/matrix.md": "measured/matrix.md",
    **{
        f"benchmarks/notes/{path.name}": f"inside/notes/{path.name}"
        for path in (ROOT / "benchmarks/notes").glob("*.md")
    },
}
IMAGE = re.compile(r"!\[[^\]\n]*\]\(([^)\s:]+)\)")
PICTURES = [  # of the demo and the family, which take minutes
    *(f"demo/{name}.png" for name in ("samples", "reconstructions", "curves")),
    *(f"family/{name}.png" for name in ("best-of", "pixels", "palette", "variations", "variations-pixels", "panels")),
]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    (inside,) = (entry["Inside"] for entry in config.nav or [] if "Inside" in entry)
    inside.append({"Notes": sorted(page for page in INCLUDED.values() if page.startswith("inside/notes/"))})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {file.src_uri: file.content_string for file in files.documentation_pages()}
    for uri, text in pages.items():
        if lacking := docstrings.without_example(docstrings.described(text)):
            raise PluginError(f"{uri}: no example in the docstring of {', '.join(lacking)}")
    for source, page in INCLUDED.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
        for target in IMAGE.findall((ROOT / source).read_text()):  # where the page's own link finds it
            picture, place = (os.path.normpath(os.path.join(os.path.dirname(name), target)) for name in (source, page))
            files.append(File.generated(config, place, abs_src_path=str(ROOT / picture)))
    for name in PICTURES:
        files.append(File.generated(config, f"assets/{name}", abs_src_path=str(ROOT / "docs" / name)))
    with _pool() as pool:
        made = [pool.submit(work.pages, "gallery")]  # the longest first
        made += [pool.submit(work.pages, "notebook", path) for path in sorted((ROOT / "docs/notebooks").glob("*.py"))]
        made += [pool.submit(work.pages, module) for module in ("measured", "drawings")]
        ran = {uri: pool.submit(snippets.run, text, uri) for uri, text in pages.items() if snippets.has_code(text)}
        for future in made:
            for uri, content in _result(future):
                files.append(File.generated(config, uri, content=content))
        for uri, future in ran.items():
            file = files.get_file_from_path(uri)
            assert file is not None
            file.content_string = _result(future)
    return files


def _pool() -> ProcessPoolExecutor:
    """A fresh process for every page, forked from one that has imported what takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "dalle_kernels", "matplotlib.figure"])
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])
    return ProcessPoolExecutor(os.cpu_count(), mp_context=context, max_tasks_per_child=1)


def _result(future: Any) -> Any:
    try:
        return future.result()
    except Exception as error:
        raise PluginError(str(error)) from error


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    markdown = re.sub(r"^\{\{ backends (\w+) \}\}$", lambda found: operations.backends(found[1]), markdown, flags=re.M)
    if uri in INCLUDED.values():
        markdown = _linked(markdown, uri)
    return _formulas(markdown)


def _linked(markdown: str, uri: str) -> str:
    """Links between files of the repository as links between pages; what is no page is named without a link."""
    source = next(name for name, page in INCLUDED.items() if page == uri)

    def moved(found: re.Match[str]) -> str:
        text, target = found[1], found[2]
        if re.match(r"https?:|#|mailto:", target):
            return found[0]
        name, _, anchor = target.partition("#")
        path = os.path.normpath(os.path.join(os.path.dirname(source), name))
        page = {**INCLUDED, "README.md": "index.md", "benchmarks/results/README.md": "measured/index.md"}.get(path)
        if page is None:
            return text
        to = os.path.relpath(page, os.path.dirname(uri) or ".")
        return f"[{text}]({to}{'#' + anchor if anchor else ''})"

    return re.sub(r"(?<!!)\[([^\]\n]+)\]\(([^)\s]+)\)", moved, markdown)


def _formulas(markdown: str) -> str:
    """LaTeX between dollars as MathML, which browsers draw without a script; code is left alone."""
    from latex2mathml.converter import convert

    parts = re.split(r"(^ *```.*?^ *```$|`[^`\n]+`)", markdown, flags=re.MULTILINE | re.DOTALL)
    for place in range(0, len(parts), 2):
        text = re.sub(
            r"\$\$(.+?)\$\$", lambda found: _block(convert(found[1], display="block")), parts[place], flags=re.S
        )
        parts[place] = re.sub(r"\$([^$\n]+)\$", lambda found: convert(found[1]), text)
    return "".join(parts)


def _block(mathml: str) -> str:
    return f'<div class="formula">{mathml}</div>'
