# SPDX-License-Identifier: Apache-2.0
"""Make values from outside safe for a path, and for a terminal, a page or a log.

Such a value comes from a variable, a configuration file, a provider or a stored span.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import SplitResult, urlsplit

_NAME_BYTES: Final = 100
"""File systems allow 255 bytes. A store adds times and process ids to its name."""
_LONGEST: Final = 200
_LONGEST_SHOWN: Final = 80


def file_name(text: str) -> str:
    """Return ``text`` as one component of a path, without separators and of at most 100 bytes.

    Replace each character other than letters, digits, ``_``, ``.`` and ``-`` by ``-``. Remove dots
    and hyphens at the start: ``..`` is another folder, a dot hides the file, and a hyphen looks
    like an option.
    """
    name = re.sub(r"[^\w.-]", "-", text).lstrip(".-")
    short = name.encode()[:_NAME_BYTES].decode(errors="ignore")
    return short or "unnamed"


def printable(text: str, longest: int | None = _LONGEST) -> str:
    """Return ``text`` in one line, without control characters, cut to ``longest`` characters."""
    text = text[:longest]
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def shown(value: object) -> str:
    """Return a wrong value as an error message shows it, cut to 80 characters."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - an int of 5,000 digits, or an object that raises
        text = f"a {type(value).__name__} that cannot be printed"
    return printable(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}...")


def is_url(text: str) -> bool:
    """Return whether ``text`` is an HTTP URL with a host."""
    url = _split(text)
    return url is not None and url.scheme in ("http", "https") and bool(url.hostname)


def host_and_port(url: object) -> tuple[str | None, int | None]:
    """Return the host and port of a URL, and no user or password. Both are None without a host.

    The default port is 80 for ``http`` and ``ws``, else 443.
    """
    parts = _split(url) if isinstance(url, str) else None
    if parts is None or not parts.hostname:
        return None, None
    return parts.hostname, parts.port or (80 if parts.scheme in ("http", "ws") else 443)


def redact_url(text: str) -> str:
    """Return scheme, host and port of a URL.

    Its user, password, path and query may hold a key. Return "(hidden)" if it is not a URL.
    """
    url = _split(text)
    if url is None or not url.hostname:
        return "(hidden)"
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    port = f":{url.port}" if url.port else ""
    return printable(f"{url.scheme}://{host}{port}")


def _split(text: str) -> SplitResult | None:
    try:
        url = urlsplit(text)
        valid = url.port != 0
    except ValueError:  # The port or the host is invalid.
        return None
    return url if valid else None
