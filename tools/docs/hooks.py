# SPDX-License-Identifier: Apache-2.0
"""MkDocs hooks: add pages from outside ``docs/`` and the text of ``--help``.

README, changelog and the READMEs of shipped folders stay beside the files that they describe. A
link from ``docs/`` to such a page, or to a file of the repository, is rewritten, and the file is
copied into the site. The site then needs no address of a repository.
"""

from __future__ import annotations

import itertools
import posixpath
import re
from pathlib import Path
from typing import Final

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from traced_retry.cli.main import app

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "dashboards/README.md",
    "dashboards/runbook.md",
    "exporters/README.md",
)
"""Pages from outside ``docs/``, with the same path in the site."""
_LINK: Final = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)\s]*)?\))")

_ROLE: Final = re.compile(r":(?:attr|class|data|func|meth|mod):<code>~?([^<]+)</code>")
_TABLE: Final = re.compile(r"<table>.*?</table>", re.DOTALL)
_HEADING: Final = re.compile(r"<th[^>]*>(.*?)</th>", re.DOTALL)
_CELL: Final = re.compile(r"<td[^>]*>(.*?)</td>", re.DOTALL)
_CODE: Final = re.compile(r"<code>([^<]+)</code>")
_TAG: Final = re.compile(r"<[^>]+>")
_NARROW: Final = 40
"""The characters of a row that fit into a narrow screen."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside, and each file that a page links to."""
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for page in files.documentation_pages():
        home = _home(page.src_uri)
        for _, target, _ in _LINK.findall(page.content_string):
            path = posixpath.normpath(posixpath.join(home, target))
            uri = _uri(path)
            if uri.startswith("files/") and uri not in files.src_uris and (ROOT / path).is_file():
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page, and insert the command line's help."""
    here = page.file.src_uri
    home = _home(here)

    def rewrite(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(home, match[2]))
        return match[1] + posixpath.relpath(_uri(path), posixpath.dirname(here) or ".") + match[3]

    return _LINK.sub(rewrite, markdown).replace("<!-- cli -->", _help())


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show the names that docstrings mark for Sphinx as code, and prepare wide tables."""
    return _TABLE.sub(_stackable, _ROLE.sub(r"<code>\1</code>", html))


def _stackable(match: re.Match[str]) -> str:
    """Return the table. If it is too wide for a narrow screen, each cell gets its heading.

    ``docs/extra.css`` then shows the cells of a row below each other.
    """
    table = match[0]
    headings = [_TAG.sub("", text).replace('"', "&quot;") for text in _HEADING.findall(table)]
    cells = _CELL.findall(table)
    columns = len(headings)
    widths = [max(len(_TAG.sub("", cell)) for cell in cells[n::columns]) for n in range(columns)]
    if columns < 3 or sum(widths) <= _NARROW:
        return table
    has_long_names = any(len(name) > _NARROW for name in _CODE.findall("".join(cells[::columns])))
    kind = "stacked long" if has_long_names else "stacked"
    labels = itertools.cycle(f'<td data-label="{text}"' for text in headings)
    return f'<div class="{kind}">{re.sub("<td", lambda _: next(labels), table)}</div>'


def _home(uri: str) -> str:
    """Return the folder of a page in the repository."""
    return posixpath.dirname(uri if uri in PAGES else f"docs/{uri}")


def _uri(path: str) -> str:
    """Return where a file of the repository is in the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "README.md":
        return "index.md"
    return path if path in PAGES else f"files/{path}"


def _help() -> str:
    """Return the help of each command, as the terminal shows it."""
    group = typer.main.get_command(app)
    context = typer.Context(
        group, info_name="traced-retry", terminal_width=90, max_content_width=90
    )
    return "\n".join(_section(command, name, context) for name, command in group.commands.items())


def _section(command: typer.core.TyperCommand, name: str, parent: typer.Context) -> str:
    context = typer.Context(
        command, info_name=name, parent=parent, terminal_width=90, max_content_width=90
    )
    inner = getattr(command, "commands", {})
    if inner:
        return "\n".join(
            _section(child, child_name, context) for child_name, child in inner.items()
        )
    return f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
