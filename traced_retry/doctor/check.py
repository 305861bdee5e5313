# SPDX-License-Identifier: Apache-2.0
"""Define a finding of the doctor, and show addresses without secrets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One finding."""

    check: str
    """The subject of the check: a word or a variable's name."""
    status: Status
    message: str
    fix: str = ""
    """The remedy, empty if the check passed."""


def is_url(text: str) -> bool:
    """Return whether ``text`` is an HTTP URL with a host."""
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # no port, no host
        return False


def redact_url(text: str) -> str:
    """Return the URL without user, password and query."""
    url = urlsplit(text)
    host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
    port = f":{url.port}" if url.port else ""
    return f"{url.scheme}://{host}{port}{url.path}"
