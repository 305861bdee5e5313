# SPDX-License-Identifier: Apache-2.0
"""Metrics of job processes on LiveKit's own ``/metrics``, for Prometheus to scrape.

LiveKit serves the files that ``prometheus_client`` finds in ``PROMETHEUS_MULTIPROC_DIR``. Each
process writes its file with every count, so that a killed process loses no count. The files stay
when the process ends, so that sums never fall. OpenTelemetry's Prometheus reader does not write
such files, and job processes are not scraped. This module is therefore a meter provider with
instruments of ``prometheus_client``.

Names, units and labels are those that a Collector makes of OTLP. There are no exemplars: they do
not exist in multiprocess mode. Observable instruments and gauges are not kept.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from opentelemetry import metrics
from opentelemetry.context import Context
from opentelemetry.util.types import Attributes
from prometheus_client import Counter, Gauge, Histogram, values

from traced_retry import semconv
from traced_retry.core.telemetry import Telemetry
from traced_retry.errors import ExportError

_UNITS: Final = {"s": "seconds", "ms": "milliseconds", "By": "bytes"}

_OTEL_BUCKETS: Final = (0, 5, 10, 25, 50, 75, 100, 250, 500, 750, 1000, 2500, 5000, 7500, 10000)
"""The SDK's buckets, for an instrument that advises no others."""


def set_up(*providers: str) -> Callable[[object], None]:
    """Return a ``setup_fnc`` for ``AgentServer`` that calls :func:`install` in every job process.

    Args:
        providers: the providers of your agents, as in ``gen_ai.provider.name``. Each process starts
            with their counters at 0, because Prometheus sees no increase in a series that it first
            sees above 0.
    """
    return functools.partial(_set_up, providers)


def _set_up(providers: tuple[str, ...], _process: object) -> None:
    install()
    telemetry = Telemetry()
    for provider in providers:
        telemetry.initialize_counters(provider, semconv.ACTIONS)


def install() -> None:
    """Make LiveKit's ``/metrics`` show this process's metrics. You can call it again.

    Raises:
        ExportError: if ``prometheus_client`` is not in multiprocess mode, or if another global
            meter provider is set.
    """
    current = metrics.get_meter_provider()
    if isinstance(current, PrometheusMeterProvider):
        return
    if type(current).__name__ != "_ProxyMeterProvider":
        raise ExportError(
            f"the global meter provider is a {type(current).__name__}; metrics go there already"
        )
    metrics.set_meter_provider(PrometheusMeterProvider())


class PrometheusMeterProvider(metrics.MeterProvider):
    """Meter provider for ``prometheus_client`` that keeps only traced-retry's metrics.

    Raises:
        ExportError: if ``prometheus_client`` is not in multiprocess mode here.
    """

    def __init__(self) -> None:
        if not getattr(values.ValueClass, "_multiprocess", False):
            raise ExportError(
                "PROMETHEUS_MULTIPROC_DIR was not set when this process began: give "
                "AgentServer(prometheus_multiproc_dir=...), or set it before the agent starts"
            )

    def get_meter(
        self,
        name: str,
        version: str | None = None,
        schema_url: str | None = None,
        attributes: Attributes = None,
    ) -> metrics.Meter:
        """Return a meter for traced-retry, and a no-op meter for other scopes.

        LiveKit's own metrics carry job and room ids: each call would add permanent series.
        """
        ours = name == semconv.SCOPE
        return (_Meter if ours else metrics.NoOpMeter)(name, version, schema_url)

    def force_flush(self, timeout_millis: float = 0) -> bool:
        """Do nothing: each count is written at once."""
        return True

    def shutdown(self, timeout_millis: float = 0) -> None:
        """Do nothing."""


class _Meter(metrics.NoOpMeter):
    def create_counter(self, name: str, unit: str = "", description: str = "") -> metrics.Counter:
        return _Counter(name, unit, description)

    def create_up_down_counter(
        self, name: str, unit: str = "", description: str = ""
    ) -> metrics.UpDownCounter:
        return _UpDownCounter(name, unit, description)

    def create_histogram(
        self,
        name: str,
        unit: str = "",
        description: str = "",
        *,
        explicit_bucket_boundaries_advisory: Sequence[float] | None = None,
    ) -> metrics.Histogram:
        return _Histogram(name, unit, description, explicit_bucket_boundaries_advisory)


class _Counter(metrics.NoOpCounter):
    def __init__(self, name: str, unit: str, description: str) -> None:
        super().__init__(name, unit, description)
        self._of = _family(Counter, name, unit, description)

    def add(
        self,
        amount: float,
        attributes: Attributes | None = None,
        context: Context | None = None,
    ) -> None:
        if amount >= 0:
            self._of(attributes).inc(amount)


class _UpDownCounter(metrics.NoOpUpDownCounter):
    def __init__(self, name: str, unit: str, description: str) -> None:
        super().__init__(name, unit, description)
        self._of = _family(Gauge, name, unit, description, multiprocess_mode="livesum")

    def add(
        self,
        amount: float,
        attributes: Attributes | None = None,
        context: Context | None = None,
    ) -> None:
        self._of(attributes).inc(amount)


class _Histogram(metrics.NoOpHistogram):
    def __init__(
        self, name: str, unit: str, description: str, buckets: Sequence[float] | None
    ) -> None:
        super().__init__(name, unit, description)
        self._of = _family(Histogram, name, unit, description, buckets=buckets or _OTEL_BUCKETS)

    def record(
        self,
        amount: float,
        attributes: Attributes | None = None,
        context: Context | None = None,
    ) -> None:
        self._of(attributes).observe(amount)


_made: dict[tuple[str, tuple[str, ...]], Any] = {}
"""By name and label names. One object per series and process: a second one would overwrite what
the first has counted."""
_making = threading.Lock()


def _family(
    kind: Callable[..., Any], name: str, unit: str, description: str, **options: object
) -> Callable[[Attributes | None], Any]:
    """Return a function that maps attributes to a series.

    Each set of label names is an object of its own, because ``prometheus_client`` needs all names
    at creation. A scrape combines their series.
    """
    full = _word(f"{name}.{_UNITS.get(unit, '')}".rstrip("."))

    def of(attributes: Attributes | None) -> Any:
        labels = {_word(key): _text(value) for key, value in (attributes or {}).items()}
        names = tuple(sorted(labels))
        with _making:
            metric = _made.get((full, names))
            if metric is None:
                metric = kind(full, description or full, names, registry=None, **options)
                _made[full, names] = metric
        return metric.labels(**labels) if labels else metric

    return of


def _word(name: str) -> str:
    return re.sub(r"\W|^(?=\d)", "_", name, flags=re.ASCII)


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
