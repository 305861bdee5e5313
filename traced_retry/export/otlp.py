# SPDX-License-Identifier: Apache-2.0
"""Extend the SDK's OTLP/HTTP exporters by the reason of a failed export.

The SDK's exporters return SUCCESS or FAILURE. They write the reason to the log only, once per
failed batch, with the text of exceptions, which may hold the URL's query. Here, the reason is the
attribute ``reason``, a word of :data:`traced_retry.semconv.DROP_REASONS`, and the SDK's log records
are suppressed. Retries, waits, ``Retry-After`` and all ``OTEL_EXPORTER_OTLP_*`` variables work as
in the SDK.
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
    """``OTLPSpanExporter`` with all its arguments except ``session``."""

    def __init__(self, **settings: Any) -> None:
        self._http = _Session()
        super().__init__(session=self._http, **settings)

    @property
    def reason(self) -> semconv.DropReason:
        """Reason of the last failed export."""
        return self._http.reason

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch, with the SDK's retries."""
        with _suppress_sdk_logs():
            return super().export(spans)


class OtlpMetricExporter(metric_exporter.OTLPMetricExporter):
    """``OTLPMetricExporter`` with all its arguments except ``session``. Logs a failure once."""

    delivered = True
    """Whether the last export succeeded."""

    def __init__(self, **settings: Any) -> None:
        self._http = _Session()
        super().__init__(session=self._http, **settings)

    def export(
        self, metrics_data: MetricsData, timeout_millis: float | None = 10_000, **kwargs: Any
    ) -> MetricExportResult:
        """Send the collected metrics, with the SDK's retries."""
        with _suppress_sdk_logs():
            result = super().export(metrics_data, timeout_millis, **kwargs)
        self.delivered = result is MetricExportResult.SUCCESS
        if not self.delivered:
            log_once(
                f"exporter otlp cannot deliver metrics ({self._http.reason}); "
                "the next export carries them"
            )
        return result


class _Session(requests.Session):
    """HTTP session that keeps the reason of its last failed request."""

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


class _ExportLogFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(_exporting, "active", False)


for _module in (trace_exporter, metric_exporter):
    logging.getLogger(_module.__name__).addFilter(_ExportLogFilter())


@contextmanager
def _suppress_sdk_logs() -> Iterator[None]:
    """Suppress the log records of the SDK's exporters in this thread only."""
    _exporting.active = True
    try:
        yield
    finally:
        _exporting.active = False
