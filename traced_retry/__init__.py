# SPDX-License-Identifier: Apache-2.0
"""Retries for LiveKit realtime replies: each heard exactly once, or its failure known at once.

>>> import traced_retry
>>> model = traced_retry.wrap(openai.realtime.RealtimeModel())  # doctest: +SKIP

Importing this pulls in neither LiveKit nor the OpenTelemetry SDK.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from traced_retry._version import __version__
from traced_retry.core.breaker import CircuitOpenError
from traced_retry.core.budget import RetryBudget
from traced_retry.core.decorator import RetryingRealtimeSession, retry
from traced_retry.core.failure import Failure
from traced_retry.core.loop import FailedReply
from traced_retry.core.policy import PolicyError, RetryPolicy
from traced_retry.core.switch import disable
from traced_retry.core.waiting import WaitingReply
from traced_retry.errors import (
    ConfigurationFileError,
    ExportError,
    MissingExtraError,
    UsageError,
    missing_extra,
)

if TYPE_CHECKING:
    from traced_retry.export.enable import Tracing, enable
    from traced_retry.livekit import instrument, uninstrument, wrap
    from traced_retry.livekit.filler import Filler

__all__ = [
    "CircuitOpenError",
    "ConfigurationFileError",
    "ExportError",
    "FailedReply",
    "Failure",
    "Filler",
    "MissingExtraError",
    "PolicyError",
    "RetryBudget",
    "RetryPolicy",
    "RetryingRealtimeSession",
    "Tracing",
    "UsageError",
    "WaitingReply",
    "__version__",
    "disable",
    "enable",
    "instrument",
    "retry",
    "uninstrument",
    "wrap",
]


_LATE = {
    "Filler": "traced_retry.livekit.filler",
    "Tracing": "traced_retry.export.enable",
    "enable": "traced_retry.export.enable",
    "instrument": "traced_retry.livekit",
    "uninstrument": "traced_retry.livekit",
    "wrap": "traced_retry.livekit",
}
"""Names that need an extra. Their modules are imported at the first use."""


def __getattr__(name: str) -> Any:
    if name in _LATE:
        try:
            return getattr(importlib.import_module(_LATE[name]), name)
        except ModuleNotFoundError as error:
            raise missing_extra(f"traced_retry.{name}()", error) from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
