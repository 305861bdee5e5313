# SPDX-License-Identifier: Apache-2.0
"""The versions that traced-retry supports, and the check for a LiveKit that is newer.

Adapters read private attributes of LiveKit's plugins. A newer LiveKit may have moved one: then the
session is traced and not retried. It may also have changed the meaning of one, which no check
finds. So a newer LiveKit is reported once, and :data:`VARIABLE` decides about its replies.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Final, Literal, cast, get_args

from traced_retry._version import __version__
from traced_retry.core.guard import log_once
from traced_retry.errors import UsageError


@dataclass(frozen=True)
class Versions:
    """The oldest version supported and the newest version tested."""

    oldest: str
    newest: str

    def __contains__(self, installed: str) -> bool:
        return _parts(self.oldest) <= _parts(installed) <= _parts(self.newest)

    def newer(self, installed: str) -> bool:
        """Return whether a version is above the newest version tested."""
        return _parts(installed) > _parts(self.newest)


PYTHON: Final = Versions("3.11", "3.14")
LIVEKIT: Final = Versions("1.7.0", "1.8.9")
"""livekit-agents and its plugins."""
OPENTELEMETRY: Final = Versions("1.39.0", "1.45.2")
"""opentelemetry-api."""
OPENTELEMETRY_SDK: Final = Versions("1.43.0", "1.45.2")
"""opentelemetry-sdk, for ``enable()``."""

PLUGINS: Final = ("aws", "azure", "google", "nvidia", "openai", "phonic", "ultravox", "xai")
"""LiveKit's plugins that have an adapter, or no replies to retry."""

VARIABLE: Final = "TRACED_RETRY_UNTESTED_LIVEKIT"
Choice = Literal["warn", "allow", "observe"]
"""Replies on a LiveKit newer than the newest version tested.

``warn``, the default, logs one warning and retries. ``allow`` retries without the warning.
``observe`` logs the warning, traces the replies and does not retry them.
"""


class SupportError(UsageError):
    """The value of :data:`VARIABLE` is invalid."""


def choice() -> Choice:
    """Return the value of :data:`VARIABLE`.

    Raises:
        SupportError: if the value is invalid.
    """
    value = os.environ.get(VARIABLE, "").strip() or "warn"
    if value not in get_args(Choice):
        raise SupportError(f"{VARIABLE} is {value!r}: expected {', '.join(get_args(Choice))}")
    return cast("Choice", value)


def installed(distribution: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


@functools.cache
def newer_livekit() -> list[str]:
    """Return name and version of each LiveKit package above the newest version tested."""
    names = ("livekit-agents", *(f"livekit-plugins-{name}" for name in PLUGINS))
    found = {name: installed(name) for name in names}
    return [f"{n} {there}" for n, there in found.items() if there and LIVEKIT.newer(there)]


def check_livekit() -> bool:
    """Log one warning if LiveKit is newer than the newest version tested.

    Returns:
        Whether replies may be retried.

    Raises:
        SupportError: if the value of :data:`VARIABLE` is invalid.
    """
    chosen = choice()
    newer = newer_livekit()
    if not newer or chosen == "allow":
        return True
    effect = "traced and not retried" if chosen == "observe" else "retried all the same"
    log_once(
        f"traced-retry {__version__} was tested up to livekit-agents {LIVEKIT.newest}, and "
        f"installed is {', '.join(newer)}. Replies are {effect}. Look for a newer traced-retry, "
        f"or set {VARIABLE} to one of {', '.join(get_args(Choice))}.",
        logging.WARNING,
    )
    return chosen != "observe"


def _parts(text: str) -> tuple[int, ...]:
    numbers = [int(part) for part in re.findall(r"\d+", text)[:3]]
    return tuple(numbers + [0] * (3 - len(numbers)))
