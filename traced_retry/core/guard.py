# SPDX-License-Identifier: Apache-2.0
"""Log failures of side work once, so that they never change a reply's result.

Side work is telemetry, a user's callback or an adapter's clean-up.
"""

from __future__ import annotations

import contextlib
import logging
from types import TracebackType

from traced_retry import semconv

logger = logging.getLogger(semconv.SCOPE)

_logged: set[str] = set()


def log_once(message: str, level: int = logging.ERROR) -> None:
    """Log ``message`` the first time in this process."""
    if message not in _logged:
        _logged.add(message)
        with contextlib.suppress(Exception):  # a user's log filter may raise
            logger.log(level, message)


def log_suppressed(what: str, error: BaseException) -> None:
    """Log once that ``what`` raised ``error``: its class and place.

    Leave its text out, because it may hold words of a caller or an API key.
    """
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    where = f"{at.tb_frame.f_code.co_filename}:{at.tb_lineno}" if at is not None else "?"
    log_once(f"{what} raised {type(error).__name__} at {where}; the reply goes on without it")


class suppress_and_log:  # noqa: N801 - used as a statement, like contextlib.suppress
    """Suppress an exception of the ``with`` block, and log it once."""

    __slots__ = ("_what",)

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        log_suppressed(self._what, error)
        return True
