# SPDX-License-Identifier: Apache-2.0
"""Check the built site: ``python tools/docs/check_site.py site``.

Each link and each image has to lead to a file of the site, each anchor has to exist, and no page
may load a file from another host. Addresses in plain links are not requested.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

_LOADS: Final = {"img", "script", "link", "iframe", "source", "video", "audio", "object"}
"""Elements whose address the browser loads by itself."""
_STYLE: Final = re.compile(r"url\(\s*['\"]?(https?:)?//|@import\s+['\"]?(https?:)?//")


class Links(HTMLParser):
    """The addresses and the anchors of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.anchors = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the attributes that hold an address or an anchor."""
        values = dict(attrs)
        self.anchors |= {values.get("id") or "", values.get("name") or ""}
        self.found += [(tag, v) for key in ("href", "src", "data") if (v := values.get(key))]


def problems(site: Path) -> list[str]:
    """Return one line per broken link, missing anchor and foreign file."""
    pages = {path.resolve(): Links(path.read_text()) for path in site.rglob("*.html")}
    found = [
        f"{path.relative_to(site)}: the style loads a file from another host"
        for path in site.rglob("*.css")
        if _STYLE.search(path.read_text())
    ]
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        if name.name == "404.html":  # its links start at the root of a server
            continue
        for tag, address in page.found:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if tag in _LOADS and parts.scheme != "data":
                    found.append(f"{name}: <{tag}> loads {address}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                found.append(f"{name}: {address} does not exist")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{name}: {address} has no such anchor")
    return found


if __name__ == "__main__":
    lines = problems(Path(sys.argv[1]))
    print("\n".join(lines) or "links are correct")
    sys.exit(1 if lines else 0)
