# SPDX-License-Identifier: Apache-2.0
"""The SDK's OTLP/HTTP exporters, which here also say why an export failed.

They answer SUCCESS or FAILURE, and write the reason to the log only, with each failed batch and
with the text of exceptions, which may hold the URL's query. Here it is ``reason``, a word of
:data:`traced_retry.semconv.DROP_REASONS`, and their own log records are left out. Retries, their
waits and ``Retry-After`` are the SDK's; all ``OTEL_EXPORTER_OTLP_*`` variables hold.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import requests
from opentelemetry.exporter.otlp.proto.http import metric_exporter, trace_exporter
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult

from traced_retry import semconv
from traced_retry.core.guard import log_once

_STATUS: Final[dict[int, semconv.DropReason]] = {
    429: "rate_limited",
    502: "unavailable",
    503: "unavailable",
    504: "unavailable",
}


class OtlpSpanExporter(trace_exporter.OTLPSpanExporter):
    """Takes what ``OTLPSpanExporter`` takes, but for ``session``."""

    def __init__(self, **settings: Any) -> None:
        self._watched = _Session()
        super().__init__(session=self._watched, **settings)

    @property
    def reason(self) -> semconv.DropReason:
        """Why the last export failed."""
        return self._watched.reason

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch, with the SDK's retries."""
        with _quiet():
            return super().export(spans)


class OtlpMetricExporter(metric_exporter.OTLPMetricExporter):
    """Takes what ``OTLPMetricExporter`` takes, but for ``session``. A failure is logged once."""

    def __init__(self, **settings: Any) -> None:
        self._watched = _Session()
        super().__init__(session=self._watched, **settings)

    def export(
        self, metrics_data: MetricsData, timeout_millis: float | None = 10_000, **kwargs: Any
    ) -> MetricExportResult:
        """Send what was collected, with the SDK's retries."""
        with _quiet():
            result = super().export(metrics_data, timeout_millis, **kwargs)
        if result is not MetricExportResult.SUCCESS:
            log_once(
                f"exporter otlp cannot deliver metrics ({self._watched.reason}); "
                "the next export carries them"
            )
        return result


class _Session(requests.Session):
    """Keeps the reason why its last request failed."""

    reason: semconv.DropReason = "failed"

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        try:
            response = super().send(request, **kwargs)
        except requests.exceptions.SSLError:
            self.reason = "certificate"
            raise
        except requests.exceptions.Timeout:
            self.reason = "timeout"
            raise
        except requests.exceptions.RequestException:
            self.reason = "connection"
            raise
        self.reason = _STATUS.get(response.status_code, "rejected")
        return response


_exporting = threading.local()


class _Quiet(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(_exporting, "now", False)


for _module in (trace_exporter, metric_exporter):
    logging.getLogger(_module.__name__).addFilter(_Quiet())


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the SDK's exporters log in this thread; those of others go on as they are."""
    _exporting.now = True
    try:
        yield
    finally:
        _exporting.now = False
