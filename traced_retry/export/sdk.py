# SPDX-License-Identifier: Apache-2.0
"""Sets the OpenTelemetry SDK up for a process that has none, from what was said of it.

``OTEL_CONFIG_FILE``, else the standard ``OTEL_*`` variables, else a preset, else the local store.
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter

from traced_retry.core.guard import logger
from traced_retry.core.policy import RetryPolicy
from traced_retry.errors import missing_extra
from traced_retry.export import files
from traced_retry.export.exporting import (
    METRICS_WITHIN,
    BoundedMetricReader,
    BoundedSpanProcessor,
    ExportError,
)
from traced_retry.export.local import StoreExporter, new_store
from traced_retry.export.store import store_processor

if TYPE_CHECKING:
    from traced_retry.export.declarative import Declared

SERVICE: Final = "livekit-agent"
"""``service.name`` where nobody said one."""

_PROTOCOLS: Final = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}


@dataclass(frozen=True)
class SetUp:
    """What was set up."""

    destination: str
    """Where spans go, for people; the path, for a local store."""
    policy: RetryPolicy | None = None
    """The one that a configuration file holds."""


class LocalStoreExporter(StoreExporter):
    """A new local store, for ``traced_retry_store`` in a configuration file or in
    ``OTEL_TRACES_EXPORTER``: an entry point takes no arguments.
    """

    def __init__(self) -> None:
        super().__init__(new_store(os.environ.get("OTEL_SERVICE_NAME") or SERVICE))


def set_up(preset: str | None, service_name: str | None) -> SetUp:
    """Set the global providers. Only for a process without a global tracer provider.

    Raises:
        ExportError: there is no such preset, or a variable asks for what is not to be had.
        ConfigurationFileError: the configuration file cannot be.
    """
    known = files.presets()
    if preset is not None and preset not in known:
        raise ExportError(f"preset is {preset!r}; it must be one of {', '.join(known)}")
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return SetUp("nowhere: OTEL_SDK_DISABLED is true")
    if path := os.environ.get("OTEL_CONFIG_FILE"):
        return _declared(_load_file(Path(path)), f"what {path} says")
    if _said("TRACES") is not None or _said("METRICS") is not None:
        return _from_environment(service_name or SERVICE)
    if preset is not None:
        declared = _load_file(known[preset], f"preset {preset!r}")
        if service_name is not None and not os.environ.get("OTEL_SERVICE_NAME"):
            _name(declared, service_name)
        return _declared(declared, f"preset {preset}")
    return _local_store(service_name or SERVICE)


# --- a configuration file ---------------------------------------------------------------------


def file_policy() -> RetryPolicy | None:
    """The policy in the file that ``OTEL_CONFIG_FILE`` names, where it names one."""
    path = os.environ.get("OTEL_CONFIG_FILE")
    return _load_file(Path(path)).options.policy() if path else None


def _load_file(path: Path, feature: str = "OTEL_CONFIG_FILE") -> Declared:
    # Imported late: half a second, in which the job's event loop stands still.
    try:
        import opentelemetry.configuration  # noqa: F401, PLC0415 - an extra of its own

        from traced_retry.export.declarative import load  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ExportError(str(missing_extra(feature, error))) from None
    return load(path)


def _declared(declared: Declared, destination: str) -> SetUp:
    from opentelemetry.configuration import (  # noqa: PLC0415 - an extra of its own
        ConfigurationError,
        configure_sdk,
    )

    from traced_retry.export.declarative import (  # noqa: PLC0415
        ConfigurationFileError,
        take_batches,
    )

    policy = declared.options.policy()
    model = declared.model
    if model.disabled:
        return SetUp(f"nowhere: {declared.path} says disabled", policy)
    if has_meter_provider():
        model.meter_provider = None
    try:
        batches = take_batches(model)
        configure_sdk(model)
    except (ConfigurationError, OSError) as error:  # a missing package, a store not writable
        raise ConfigurationFileError(f"{declared.path}: {error}") from None
    # At exit the last one registered is shut down first, and the SDK would begin with its meter
    # provider, for up to 30 s: the spans come first, for what is dropped of them is counted.
    # A meter provider that was shut down takes this registration of it away, too.
    meter_provider = metrics.get_meter_provider()
    if model.meter_provider is not None and isinstance(meter_provider, MeterProvider):
        atexit.register(meter_provider.shutdown, METRICS_WITHIN * 1000)
    tracer_provider = trace.get_tracer_provider()
    if isinstance(tracer_provider, TracerProvider):
        for start in batches:
            processor = start()  # after the meter provider is there, which it counts with
            tracer_provider.add_span_processor(processor)
            atexit.register(processor.shutdown)
    return SetUp(destination, policy)


def _name(declared: Declared, service_name: str) -> None:
    resource = declared.model.resource
    for attribute in (resource and resource.attributes) or []:
        if attribute.name == SERVICE_NAME:
            attribute.value = service_name


# --- standard variables -----------------------------------------------------------------------


def _said(signal: str) -> list[str] | None:
    """The exporters that the variables name for ``TRACES`` or ``METRICS``; None: they say nothing.

    An endpoint alone means ``otlp``, as in the specification.
    """
    names = os.environ.get(f"OTEL_{signal}_EXPORTER", "").strip()
    if names:
        return [name.strip() for name in names.split(",") if name.strip().lower() != "none"]
    return ["otlp"] if _endpoint(signal) else None


def _endpoint(signal: str) -> str | None:
    one, all_ = f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"
    return os.environ.get(one) or os.environ.get(all_) or None


def _from_environment(service_name: str) -> SetUp:
    resource = _resource(service_name)
    spans, measures = _said("TRACES"), _said("METRICS")
    readers = [_metric_reader(name) for name in measures or []]
    # The meter provider first: at exit the last one made is shut down first, and it is the spans
    # dropped then that the metrics are to tell of.
    if readers and not has_meter_provider():
        metrics.set_meter_provider(MeterProvider(readers, resource=resource))
    if spans is None:
        return _local_store(service_name)
    tracer_provider = TracerProvider(resource=resource)
    for name in spans:
        tracer_provider.add_span_processor(BoundedSpanProcessor(_span_exporter(name), name))
    trace.set_tracer_provider(tracer_provider)
    return SetUp(", ".join(_place(name) for name in spans) or "nowhere: OTEL_TRACES_EXPORTER")


def _place(name: str) -> str:
    endpoint = _endpoint("TRACES")
    if name != "otlp" or endpoint is None:
        return name
    url = urlsplit(endpoint)  # without the user's name and password, should it hold them
    try:
        port = url.port
    except ValueError:
        raise ExportError("the port of the OTLP endpoint is no number up to 65535") from None
    return f"otlp, {url.hostname or '?'}" + (f":{port}" if port else "")


def _span_exporter(name: str) -> SpanExporter:
    exporter = _protocol("TRACES") if name == "otlp" else name
    if exporter == "otlp_proto_http":
        from traced_retry.export.otlp import OtlpSpanExporter  # noqa: PLC0415 - takes a while

        return OtlpSpanExporter()
    made: SpanExporter = _plugin("TRACES", exporter)()
    return made


def _metric_reader(name: str) -> MetricReader:
    exporter = _protocol("METRICS") if name == "otlp" else name
    if exporter == "otlp_proto_http":
        from traced_retry.export.otlp import OtlpMetricExporter  # noqa: PLC0415 - takes a while

        return BoundedMetricReader(OtlpMetricExporter())
    made = _plugin("METRICS", exporter)()
    return made if isinstance(made, MetricReader) else BoundedMetricReader(made)


def _protocol(signal: str) -> str:
    """The exporter of the protocol asked for; ``http/protobuf``, as the specification wants, where
    none is (``opentelemetry-instrument`` with a distro takes gRPC).
    """
    variable = f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL"
    if not os.environ.get(variable):
        variable = "OTEL_EXPORTER_OTLP_PROTOCOL"
    protocol = os.environ.get(variable, "").strip() or "http/protobuf"
    if protocol not in _PROTOCOLS:
        raise ExportError(
            f"{variable} is {protocol!r}; it must be {' or '.join(map(repr, _PROTOCOLS))}"
        )
    return _PROTOCOLS[protocol]


def _plugin(signal: str, name: str) -> Any:
    installed = {e.name: e for e in entry_points(group=f"opentelemetry_{signal.lower()}_exporter")}
    if name not in installed:
        raise ExportError(
            f"OTEL_{signal}_EXPORTER is {name!r}; installed are "
            f"{', '.join(sorted({'otlp', *installed}))}"
        )
    return installed[name].load()


def _resource(service_name: str) -> Resource:
    """Of this process; ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES`` win."""
    resource = Resource.create()
    if str(resource.attributes.get(SERVICE_NAME)).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: service_name}))
    return resource


# --- the local store --------------------------------------------------------------------------


def _local_store(service_name: str) -> SetUp:
    resource = _resource(service_name)
    path = new_store(str(resource.attributes[SERVICE_NAME]).replace(os.sep, "-"))
    try:
        exporter = StoreExporter(path)
    except OSError as error:
        # Nobody asked for it, and a container's disk is often read-only: no reason to fail.
        logger.warning(
            "spans go nowhere: the local store %s cannot be written (%s); set "
            "OTEL_EXPORTER_OTLP_ENDPOINT, or XDG_STATE_HOME to a folder that can be",
            path,
            error.strerror,
        )
        return SetUp(f"nowhere: {path} cannot be written")
    tracer_provider = TracerProvider(resource=resource)
    tracer_provider.add_span_processor(store_processor(exporter))
    trace.set_tracer_provider(tracer_provider)
    return SetUp(str(path))


def has_meter_provider() -> bool:
    """Whether a global meter provider is set; the API has no way to ask."""
    return type(metrics.get_meter_provider()).__name__ != "_ProxyMeterProvider"
