# SPDX-License-Identifier: Apache-2.0
"""The ``opentelemetry_instrumentor`` entry point: ``opentelemetry-instrument python agent.py``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from opentelemetry.instrumentation.instrumentor import (  # type: ignore[attr-defined]
    BaseInstrumentor,
)

from traced_retry.livekit.hook import instrument, uninstrument


class TracedRetryInstrumentor(BaseInstrumentor):  # type: ignore[misc]
    """:func:`traced_retry.instrument` in the shape that OpenTelemetry's auto-instrumentation loads.

    ``TracedRetryInstrumentor().instrument(policy=..., tracer_provider=..., meter_provider=...)``.
    """

    def instrumentation_dependencies(self) -> Collection[str]:
        """What must be installed for this to be loaded."""
        return ("livekit-agents >= 1.7.0",)

    def _instrument(self, **kwargs: Any) -> None:
        known = ("policy", "tracer_provider", "meter_provider", "on_exhausted")
        instrument(**{name: kwargs[name] for name in known if name in kwargs})

    def _uninstrument(self, **kwargs: Any) -> None:
        uninstrument()
