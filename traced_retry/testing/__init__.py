# SPDX-License-Identifier: Apache-2.0
"""Test your own agent against failing providers, with pytest or in a plain script.

pytest loads the fixtures by itself: see :mod:`traced_retry.testing.plugin`. In a script:

>>> from traced_retry.testing import check_agent
>>> print(check_agent(start_my_agent))  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from traced_retry.errors import missing_extra

if TYPE_CHECKING:
    from traced_retry.testing.clock import VirtualClockLoop, run
    from traced_retry.testing.server import realtime_server
    from traced_retry.testing.spans import RetrySpans
    from traced_retry.testing.verdict import CASES, Case, Finding, Verdict, check_agent

__all__ = [
    "CASES",
    "Case",
    "Finding",
    "RetrySpans",
    "Verdict",
    "VirtualClockLoop",
    "check_agent",
    "realtime_server",
    "run",
]

_HOMES = {
    "CASES": "verdict",
    "Case": "verdict",
    "Finding": "verdict",
    "RetrySpans": "spans",
    "Verdict": "verdict",
    "VirtualClockLoop": "clock",
    "check_agent": "verdict",
    "realtime_server": "server",
    "run": "clock",
}
"""The modules are imported on first use, because most of them need an extra."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        try:
            return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        except ModuleNotFoundError as error:
            raise missing_extra(f"traced_retry.testing.{name}", error) from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
