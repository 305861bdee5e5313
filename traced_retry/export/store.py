# SPDX-License-Identifier: Apache-2.0
"""Where spans go when nobody said: OTLP-JSON lines under the user's state directory.

The format is the OpenTelemetry Collector's own file format, so other tools read it too. Standard
``OTEL_*`` variables, where they name an endpoint, add an OTLP exporter.
"""

from __future__ import annotations

import os
from datetime import datetime, timezone
from pathlib import Path

from opentelemetry.exporter.otlp.json.file import FileSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from platformdirs import user_state_path

from traced_retry.errors import UsageError

_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
_METRICS_ENDPOINT = "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"
_PROTOCOL = "OTEL_EXPORTER_OTLP_PROTOCOL"


class ExportError(UsageError):
    """A setting of the export that cannot be; the message names it and the remedy."""


def store_directory() -> Path:
    """The folder of the local stores; it need not exist yet."""
    return user_state_path("traced-retry", appauthor=False) / "spans"


def new_store(name: str) -> Path:
    """A path for a new local store, named after ``name`` and the time in UTC."""
    now = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")
    return store_directory() / f"{name}-{now}.jsonl"


def latest_store() -> Path | None:
    """The local store that was written last, if there is any."""
    found = [path for path in store_directory().glob("*.jsonl") if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def endpoint() -> str | None:
    """Where the standard variables send traces, if anywhere."""
    return os.environ.get(_TRACES_ENDPOINT) or os.environ.get(_ENDPOINT) or None


def providers(store: Path, service_name: str) -> tuple[TracerProvider, MeterProvider]:
    """Set the SDK up: spans go to ``store``, and by OTLP/HTTP where ``OTEL_*`` names an endpoint.

    Args:
        store: a file to append to; its folder is made.
        service_name: ``service.name``, unless ``OTEL_SERVICE_NAME`` says otherwise.

    Raises:
        ExportError: ``OTEL_EXPORTER_OTLP_PROTOCOL`` asks for what is not to be had here, or the
            store cannot be written.
    """
    if os.environ.get("OTEL_SERVICE_NAME"):
        service_name = os.environ["OTEL_SERVICE_NAME"]
    resource = Resource.create({SERVICE_NAME: service_name})
    tracer_provider = TracerProvider(resource=resource)
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        exporter = FileSpanExporter(store)
    except OSError as error:
        raise ExportError(
            f"the store {store} cannot be written ({error.strerror}): name another with --store"
        ) from None
    tracer_provider.add_span_processor(BatchSpanProcessor(exporter))
    readers: list[MetricReader] = []
    if endpoint() is not None or os.environ.get(_METRICS_ENDPOINT):
        protocol = os.environ.get(_PROTOCOL, "http/protobuf")
        if protocol != "http/protobuf":
            raise ExportError(
                f"{_PROTOCOL} is {protocol!r}; it must be 'http/protobuf' here, whose port is "
                "mostly 4318 (4317 is gRPC's)"
            )
        # Imported late: it takes a third of a second, which who has no endpoint need not wait.
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import (  # noqa: PLC0415
            OTLPMetricExporter,
        )
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter,
        )

        if endpoint() is not None:
            tracer_provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        if os.environ.get(_ENDPOINT) or os.environ.get(_METRICS_ENDPOINT):
            readers.append(PeriodicExportingMetricReader(OTLPMetricExporter()))
    return tracer_provider, MeterProvider(readers, resource=resource)
