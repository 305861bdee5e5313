# SPDX-License-Identifier: Apache-2.0
"""The off switch: one variable and one call, for an incident that traced-retry may cause itself."""

from __future__ import annotations

import os
from typing import Final

from traced_retry.core.guard import logger
from traced_retry.errors import UsageError

VARIABLE: Final = "TRACED_RETRY_DISABLED"

_off: bool | None = None
"""None until the variable is read. It is read once, because that takes a microsecond."""


class SwitchError(UsageError):
    """The value of :data:`VARIABLE` is invalid."""


def disable() -> None:
    """Switch retries and traces of replies off in this process, from the next reply on.

    Each ``generate_reply`` and each function under ``@retry`` is then called as it is, as if
    traced-retry were not installed. Replies in progress end as they would. Spans of other libraries
    are still delivered. :func:`enable` switches traced-retry on again.

    To start a process switched off, set ``TRACED_RETRY_DISABLED=true``.
    """
    global _off  # noqa: PLW0603 - there is one switch per process
    _off = True
    logger.warning("disable() was called: replies are neither retried nor traced")


def switch_on() -> None:
    """Undo :func:`disable`. The variable stays valid."""
    global _off  # noqa: PLW0603
    _off = None


def is_off() -> bool:
    """Return whether traced-retry is switched off, by the call or by the variable."""
    global _off  # noqa: PLW0603
    if _off is None:
        _off = _by_variable()
    return _off


def check() -> bool:
    """Return whether traced-retry is switched off.

    Raises:
        SwitchError: if the value of the variable is invalid.
    """
    value = os.environ.get(VARIABLE, "").strip().lower()
    if value not in ("", "true", "false"):
        raise SwitchError(f"{VARIABLE} is {value!r}: expected true or false")
    return is_off()


def _by_variable() -> bool:
    return os.environ.get(VARIABLE, "").strip().lower() == "true"
