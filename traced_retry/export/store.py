# SPDX-License-Identifier: Apache-2.0
"""Where spans go when nobody said: OTLP-JSON lines under the user's state directory.

The format is the OpenTelemetry Collector's own file format, so other tools read it too. Standard
``OTEL_*`` variables, where they name an endpoint, add an OTLP exporter.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider

from traced_retry.export.local import StoreExporter, latest_store, new_store, store_directory
from traced_retry.export.processor import BoundedMetricReader, BoundedSpanProcessor, ExportError

__all__ = [
    "ExportError",
    "endpoint",
    "latest_store",
    "new_store",
    "providers",
    "store_directory",
    "store_processor",
]

_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
_METRICS_ENDPOINT = "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"
_PROTOCOL = "OTEL_EXPORTER_OTLP_PROTOCOL"

_WITHIN: Final = 1.0
"""Seconds that the local store has at exit."""
_DELAY: Final = 1.0
"""Seconds that a span waits for its batch at most: a write costs little, and a killed process
loses what it had not written."""


def endpoint() -> str | None:
    """Where the standard variables send traces, if anywhere."""
    return os.environ.get(_TRACES_ENDPOINT) or os.environ.get(_ENDPOINT) or None


def store_processor(
    exporter: StoreExporter, meter_provider: MeterProvider | None = None
) -> BoundedSpanProcessor:
    """What hands spans to a local store. ``meter_provider``, else the global one, counts drops."""
    return BoundedSpanProcessor(
        exporter, "local_store", meter_provider=meter_provider, within=_WITHIN, delay=_DELAY
    )


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
    spans = endpoint() is not None
    measures = bool(os.environ.get(_ENDPOINT) or os.environ.get(_METRICS_ENDPOINT))
    protocol = os.environ.get(_PROTOCOL) or "http/protobuf"
    if (spans or measures) and protocol != "http/protobuf":
        raise ExportError(
            f"{_PROTOCOL} is {protocol!r}; it must be 'http/protobuf' here, whose port is "
            "mostly 4318 (4317 is gRPC's)"
        )
    try:
        local = StoreExporter(store)
    except OSError as error:
        raise ExportError(
            f"the store {store} cannot be written ({error.strerror}): name another with --store"
        ) from None
    # otlp is imported late: it takes a third of a second, which who has no endpoint need not wait.
    readers: list[MetricReader] = []
    if measures:
        from traced_retry.export.otlp import OtlpMetricExporter  # noqa: PLC0415

        readers.append(BoundedMetricReader(OtlpMetricExporter()))
    # The meter provider first: at exit the last one made is shut down first, and it is the spans
    # dropped then that the metrics are to tell of.
    meter_provider = MeterProvider(readers, resource=resource)
    tracer_provider = TracerProvider(resource=resource)
    tracer_provider.add_span_processor(store_processor(local, meter_provider))
    if spans:
        from traced_retry.export.otlp import OtlpSpanExporter  # noqa: PLC0415

        tracer_provider.add_span_processor(
            BoundedSpanProcessor(OtlpSpanExporter(), "otlp", meter_provider=meter_provider)
        )
    return tracer_provider, meter_provider
