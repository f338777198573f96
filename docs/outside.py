"""Files outside docs/ that pages link to: they become pages of the site too, so that no link ends at its edge.

A link in a page is written as it works in the repository, from file to file. In the site, docs/ is the root, and
what lies outside of it lies where it does in the repository: `studies/README.md`, `examples/first_adapter.ipynb`.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.structure.files import File, Files, InclusionLevel
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, *, config: Any) -> Files:
    """Add what the navigation and the pages link to, and what these link to in turn."""
    waiting = [f"docs/{file.src_uri}" for file in files if file.is_documentation_page()]
    waiting += [path for page in _in_navigation(config.nav) for path in _outside(page)]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        for file in _as_files(path, config):
            if files.get_file_from_path(file.src_uri) is None:
                files.append(file)
        if path.endswith(".md"):
            found = {target for target in _targets(path) if (ROOT / target).is_file()} - seen
            seen |= found
            waiting += sorted(found)
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Rewrite links between files of the repository as links between pages of the site."""
    here = page.file.src_uri
    in_repository = f"docs/{here}" if (ROOT / "docs" / here).exists() else here

    def in_site(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), match[2]))
        if not (ROOT / target).is_file():
            return match[0]  # which mkdocs then reports
        return match[1] + posixpath.relpath(_uri(target), posixpath.dirname(here) or ".") + (match[3] or "")

    return "".join(part if part.startswith("```") else LINK.sub(in_site, part) for part in FENCE.split(markdown))


def _in_navigation(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from _in_navigation(entry)


def _outside(page: str) -> Iterator[str]:
    """The file that a page of the navigation is made from, if it lies outside docs/."""
    for path in (page, str(Path(page).with_suffix(".ipynb"))):
        if not (ROOT / "docs" / page).exists() and (ROOT / path).is_file():
            yield path


def _targets(path: str) -> set[str]:
    """The files, from the repository's root, that a page links to."""
    text = FENCE.sub("", (ROOT / path).read_text(encoding="utf-8"))
    return {posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2])) for match in LINK.finditer(text)}


def _uri(path: str) -> str:
    """Where a file of the repository lies in the site's sources."""
    uri = path.removeprefix("docs/")
    return str(Path(uri).with_suffix(".md")) if uri.endswith(".ipynb") else uri


def _as_files(path: str, config: Any) -> Iterator[File]:
    if not path.endswith(".ipynb"):
        # Only some of these are in the navigation; that the others are not is no mistake.
        yield File.generated(config, _uri(path), abs_src_path=str(ROOT / path), inclusion=InclusionLevel.NOT_IN_NAV)
        return
    body, resources = MarkdownExporter().from_notebook_node(nbformat.read(ROOT / path, as_version=4))
    yield File.generated(config, _uri(path), content=body.replace("![png](", "![Output of the cell above]("))
    for name, picture in resources["outputs"].items():
        yield File.generated(config, posixpath.join(posixpath.dirname(path), name), content=picture)
