# SPDX-License-Identifier: Apache-2.0
"""Warn if a tracer provider is configured after ``enable()``, for example by Logfire.

OpenTelemetry keeps the first global provider and logs that the second one is refused, without a
remedy. A provider that LiveKit is given later gets the spans of later replies.
"""

from __future__ import annotations

import logging

from livekit.agents import telemetry as livekit_telemetry
from opentelemetry import trace

from traced_retry.core import telemetry
from traced_retry.core.guard import log_once

REMEDY = (
    "Configure it before traced_retry.enable() (for example logfire.configure(), "
    "langfuse.get_client(), sentry_sdk.init() or trace.set_tracer_provider()): enable() then uses "
    "it."
)


class _Refused(logging.Filter):
    """A filter that passes each record, and looks for OpenTelemetry's refusal of a provider."""

    def filter(self, record: logging.LogRecord) -> bool:
        if str(record.msg).startswith("Overriding of current TracerProvider"):
            log_once(
                "a tracer provider was configured after traced_retry.enable(), and OpenTelemetry "
                f"refuses it: it gets no spans. {REMEDY}",
                logging.WARNING,
            )
        return True


_refused = _Refused()


def watch() -> None:
    """Watch from now on for a provider that is configured later."""
    logging.getLogger(trace.__name__).addFilter(_refused)  # A second time has no effect.
    given = _given_to_livekit()

    def compare() -> None:
        if _given_to_livekit() is not given:
            log_once(
                "LiveKit was given a tracer provider after traced_retry.enable(): only that one "
                f"gets the spans of replies. {REMEDY}",
                logging.WARNING,
            )

    telemetry.on_counters_initialized.append(compare)


def _given_to_livekit() -> object:
    return getattr(livekit_telemetry.tracer, "_tracer_provider", None)
