# SPDX-License-Identifier: Apache-2.0
"""Set the OpenTelemetry SDK up for a process without a tracer provider.

The source is ``OTEL_CONFIG_FILE``, else the standard ``OTEL_*`` variables, else a preset, else the
local store.
"""

from __future__ import annotations

import atexit
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter

from traced_retry import shipped_files
from traced_retry.core.guard import logger
from traced_retry.core.policy import RetryPolicy
from traced_retry.errors import ConfigurationFileError, ExportError, UsageError, missing_extra
from traced_retry.export.file_store import StoreExporter, new_store, store_processor
from traced_retry.export.processor import (
    METRICS_WITHIN,
    BoundedMetricReader,
    BoundedSpanProcessor,
)

if TYPE_CHECKING:
    from traced_retry.export.config_file import ConfigFile

Signal = Literal["TRACES", "METRICS"]
T = TypeVar("T")

SERVICE: Final = "livekit-agent"
"""Default of ``service.name``."""

_PROTOCOLS: Final = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}


@dataclass(frozen=True)
class SdkSetup:
    """The SDK set-up of this process."""

    destination: str
    """The target of the spans in a few words, or the path of a local store."""
    policy: RetryPolicy | None = None
    """The retry policy of a configuration file."""


class LocalStoreExporter(StoreExporter):
    """A new local store, for ``traced_retry_store`` in a file or in ``OTEL_TRACES_EXPORTER``.

    It needs no arguments, because entry points pass no arguments.
    """

    def __init__(self) -> None:
        super().__init__(new_store(os.environ.get("OTEL_SERVICE_NAME") or SERVICE))


def set_up(preset: str | None, service_name: str | None) -> SdkSetup:
    """Set the global providers in a process without a global tracer provider.

    Raises:
        ExportError: if the preset does not exist, or if a variable is invalid.
        ConfigurationFileError: if the configuration file is invalid.
    """
    known = shipped_files.presets()
    if preset is not None and preset not in known:
        raise ExportError(f"preset is {preset!r}; it must be one of {', '.join(known)}")
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return SdkSetup("nowhere: OTEL_SDK_DISABLED is true")
    if path := os.environ.get("OTEL_CONFIG_FILE"):
        return _from_config_file(_load_file(Path(path)), f"what {path} says")
    if _exporter_names("TRACES") is not None or _exporter_names("METRICS") is not None:
        return _from_environment(service_name or SERVICE)
    if preset is not None:
        declared = _load_file(known[preset], f"preset {preset!r}")
        if service_name is not None and not os.environ.get("OTEL_SERVICE_NAME"):
            _set_service_name(declared, service_name)
        return _from_config_file(declared, f"preset {preset}")
    return _local_store(service_name or SERVICE)


# --- a configuration file ---------------------------------------------------------------------


def file_policy() -> RetryPolicy | None:
    """Return the policy in the file that ``OTEL_CONFIG_FILE`` names, if it is set."""
    path = os.environ.get("OTEL_CONFIG_FILE")
    return _load_file(Path(path)).options.policy() if path else None


def _load_file(path: Path, feature: str = "OTEL_CONFIG_FILE") -> ConfigFile:
    # Import this late: the import blocks the job's event loop for 0.5 s.
    try:
        import opentelemetry.configuration  # noqa: F401, PLC0415 - an extra of its own

        from traced_retry.export.config_file import load  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ExportError(str(missing_extra(feature, error))) from None
    return load(path)


def _from_config_file(declared: ConfigFile, destination: str) -> SdkSetup:
    from opentelemetry.configuration import ConfigurationError  # noqa: PLC0415 - an extra

    from traced_retry.export.config_file import (  # noqa: PLC0415
        extract_batch_processors,
        without_quotes,
    )

    policy = declared.options.policy()
    model = declared.model
    if model.disabled:
        return SdkSetup(f"nowhere: {declared.path} says disabled", policy)
    if has_meter_provider():
        model.meter_provider = None

    sets_meter_provider = model.meter_provider is not None
    try:
        batches = extract_batch_processors(model, construct)
        _configure_sdk(model, f"of {declared.path}")
    except ConfigurationError as error:  # a missing package
        raise ConfigurationFileError(f"{declared.path}: {without_quotes(error)}") from None
    # Handlers run in reverse order at exit, and the SDK would begin with its meter provider, for up
    # to 30 s. Shut the span processors down first, because the metrics must include spans dropped
    # during shutdown. The shutdown of a meter provider also removes this registration.
    meter_provider = metrics.get_meter_provider()
    if sets_meter_provider and isinstance(meter_provider, MeterProvider):
        atexit.register(meter_provider.shutdown, METRICS_WITHIN * 1000)
    tracer_provider = trace.get_tracer_provider()
    if isinstance(tracer_provider, TracerProvider):
        for start in batches:
            processor = start()  # needs the meter provider to count drops
            tracer_provider.add_span_processor(processor)
            atexit.register(processor.shutdown)
    return SdkSetup(destination, policy)


def _configure_sdk(model: Any, place: str) -> None:
    """Set the providers up, without the exporters that cannot be created.

    The SDK stops at the first of them. Continue after it, which takes at most five calls.
    """
    from opentelemetry.configuration import configure_sdk  # noqa: PLC0415 - an extra of its own

    def configure() -> bool:
        configure_sdk(model)
        return True

    for _ in range(5):
        if construct(place, configure):
            return
        if model.tracer_provider and not isinstance(trace.get_tracer_provider(), TracerProvider):
            if model.tracer_provider.processors:  # our own processors need the provider
                model.tracer_provider.processors = []
            else:
                model.tracer_provider = None
        elif model.meter_provider and not has_meter_provider():
            model.tracer_provider = model.meter_provider = None
        else:
            model.tracer_provider = model.meter_provider = model.logger_provider = None


def _set_service_name(declared: ConfigFile, service_name: str) -> None:
    resource = declared.model.resource
    for attribute in (resource and resource.attributes) or []:
        if attribute.name == SERVICE_NAME:
            attribute.value = service_name


# --- standard variables -----------------------------------------------------------------------


def _exporter_names(signal: Signal) -> list[str] | None:
    """Return the exporters that the variables name, or None if the variables are not set.

    An endpoint alone means ``otlp``, as in the specification.
    """
    names = os.environ.get(f"OTEL_{signal}_EXPORTER", "").strip()
    if names:
        return [name.strip() for name in names.split(",") if name.strip().lower() != "none"]
    return ["otlp"] if endpoint(signal) else None


def endpoint(signal: Signal = "TRACES") -> str | None:
    """Return the OTLP endpoint that the standard variables name for a signal."""
    one, all_ = f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"
    return os.environ.get(one) or os.environ.get(all_) or None


def _from_environment(service_name: str) -> SdkSetup:
    resource = _resource(service_name)
    spans, measures = _exporter_names("TRACES"), _exporter_names("METRICS")
    made = (construct(name, partial(_metric_reader, name)) for name in measures or [])
    readers = [reader for reader in made if reader is not None]
    # Create the meter provider first. Providers shut down in reverse order, and the metrics must
    # include spans dropped during shutdown.
    if readers and not has_meter_provider():
        metrics.set_meter_provider(MeterProvider(readers, resource=resource))
    if spans is None:
        return _local_store(service_name)
    tracer_provider = TracerProvider(resource=resource)
    created = []
    for name in spans:
        exporter = construct(name, partial(_span_exporter, name))
        if exporter is not None:
            tracer_provider.add_span_processor(BoundedSpanProcessor(exporter, name))
            created.append(name)
    trace.set_tracer_provider(tracer_provider)
    return SdkSetup(
        ", ".join(_describe_exporter(name) for name in created) or "nowhere: OTEL_TRACES_EXPORTER"
    )


_REMEDIES: Final = {
    "EADDRINUSE": (
        "Each process needs a port of its own. Send metrics with OTEL_METRICS_EXPORTER=otlp, or "
        "let LiveKit serve those of all jobs: examples/agent_prometheus.py."
    ),
    **dict.fromkeys(
        ("EACCES", "EPERM", "EROFS", "ENOENT", "ENOTDIR", "EISDIR"),
        "Name a file in a folder that this process can write.",
    ),
}


def construct(name: str, make: Callable[[], T]) -> T | None:
    """Return a new exporter. If its construction fails, log the remedy and return None.

    Do not fail: a second job on the same machine may find the port of the first in use, and its
    caller needs an agent. The text of an exception is not logged, because it may hold a key.

    Raises:
        UsageError: if the configuration is invalid, which is the same in each process.
    """
    try:
        return make()
    except (UsageError, ModuleNotFoundError):
        raise
    except Exception as error:
        if type(error).__module__.startswith("opentelemetry.configuration"):
            raise
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if isinstance(number, int) else type(error).__name__
        logger.warning(
            "exporter %s is left out, because it cannot be created (%s). Replies are not affected. "
            "%s",
            name,
            reason,
            _REMEDIES.get(errno.errorcode.get(number or 0, ""), "Check the exporter's settings."),
        )
        return None


def _describe_exporter(name: str) -> str:
    target = endpoint("TRACES")
    if name != "otlp" or target is None:
        return name
    url = urlsplit(target)  # omit user name and password
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
    """Return the exporter name of the requested protocol.

    The default is ``http/protobuf``, as in the specification. ``opentelemetry-instrument`` with a
    distro defaults to gRPC.
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
    """Return this process's resource. ``OTEL_*`` variables override ``service_name``."""
    resource = Resource.create()
    if str(resource.attributes.get(SERVICE_NAME)).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: service_name}))
    return resource


# --- the local store --------------------------------------------------------------------------


def _local_store(service_name: str) -> SdkSetup:
    resource = _resource(service_name)
    path = new_store(str(resource.attributes[SERVICE_NAME]))
    try:
        exporter = StoreExporter(path)
    except OSError as error:
        # Do not fail: the store is only the default, and a container's disk is often read-only.
        logger.warning(
            "spans go nowhere: the local store %s cannot be written (%s); set "
            "OTEL_EXPORTER_OTLP_ENDPOINT, or XDG_STATE_HOME to a folder that can be",
            path,
            error.strerror,
        )
        return SdkSetup(f"nowhere: {path} cannot be written")
    tracer_provider = TracerProvider(resource=resource)
    tracer_provider.add_span_processor(store_processor(exporter))
    trace.set_tracer_provider(tracer_provider)
    return SdkSetup(str(path))


class StoreProviders(NamedTuple):
    """Providers with a local store."""

    tracer_provider: TracerProvider
    meter_provider: MeterProvider
    store: BoundedSpanProcessor
    """The processor of the local store alone."""


def store_providers(path: Path, service_name: str) -> StoreProviders:
    """Create providers that store spans in ``path``, and also send to the endpoints of ``OTEL_*``.

    The global providers stay as they are.

    Args:
        path: a file to append to. Its folder is created.
        service_name: ``service.name``, unless a variable sets it.

    Raises:
        ExportError: if the store cannot be written, or if the protocol is not ``http/protobuf``.
    """
    signals: tuple[Signal, ...] = ("TRACES", "METRICS")
    if any(endpoint(signal) and _protocol(signal) != "otlp_proto_http" for signal in signals):
        raise ExportError(
            "OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'; it must be 'http/protobuf' here, whose port is "
            "mostly 4318 (gRPC's is 4317)"
        )
    resource = _resource(service_name)
    try:
        exporter = StoreExporter(path)
    except OSError as error:
        raise ExportError(
            f"the store {path} cannot be written ({error.strerror}): name another with --store"
        ) from None
    readers = [_metric_reader("otlp")] if endpoint("METRICS") else []
    # Create the meter provider first. Providers shut down in reverse order, and the metrics must
    # include spans dropped during shutdown.
    meter_provider = MeterProvider(readers, resource=resource)
    tracer_provider = TracerProvider(resource=resource)
    store = store_processor(exporter, meter_provider)
    tracer_provider.add_span_processor(store)
    if endpoint("TRACES"):
        tracer_provider.add_span_processor(
            BoundedSpanProcessor(_span_exporter("otlp"), "otlp", meter_provider=meter_provider)
        )
    return StoreProviders(tracer_provider, meter_provider, store)


def has_meter_provider() -> bool:
    """Return whether a global meter provider is set. The API has no such function."""
    return type(metrics.get_meter_provider()).__name__ != "_ProxyMeterProvider"
