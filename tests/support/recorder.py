# SPDX-License-Identifier: Apache-2.0
"""In-memory OpenTelemetry providers, read back as plain data."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 - before a provider, see _RESOURCE
from collections import Counter

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from traced_retry import semconv

_RESOURCE = Resource.get_empty()
"""Saves 20 ms, because the default resource is detected in a pool of threads.

Its detection also imports that pool. A provider that is created before the import deadlocks a
forked child: the SDK's fork handler uses the pool before the pool's own handler frees its lock.
"""


class _Open:
    """A span processor that counts the spans begun and not yet ended."""

    def __init__(self):
        self.count = 0
        self.at_start = []
        self.order = {}

    def on_start(self, span, parent_context=None):
        self.count += 1
        self.order[span.context.span_id] = len(self.order)
        self.at_start.append((span.name, dict(span.attributes)))

    def on_end(self, span):
        self.count -= 1

    def _on_ending(self, span):
        pass

    def shutdown(self):
        pass

    def force_flush(self, timeout_millis=0):
        return True


class Recorder:
    """Spans and metrics of one test."""

    def __init__(self):
        self._exporter = InMemorySpanExporter()
        self._open = _Open()
        self.tracer_provider = TracerProvider(resource=_RESOURCE, shutdown_on_exit=False)
        self.tracer_provider.add_span_processor(self._open)
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        self.meter_provider = MeterProvider([self._reader], _RESOURCE, shutdown_on_exit=False)

    @property
    def providers(self):
        """Keyword arguments for whatever takes providers."""
        return {"tracer_provider": self.tracer_provider, "meter_provider": self.meter_provider}

    @property
    def open_spans(self):
        """How many spans were begun and never ended."""
        return self._open.count

    @property
    def at_start(self):
        """``(name, attributes)`` of each span as a sampler saw it."""
        return self._open.at_start

    def spans(self, name=None):
        """The ended spans (of that name), in the order of their start."""
        spans = [s for s in self._exporter.get_finished_spans() if name in (None, s.name)]
        # Times are equal if the virtual clock did not move in between.
        return sorted(spans, key=lambda s: self._open.order[s.context.span_id])

    @property
    def replies(self):
        """The reply spans' attributes."""
        return [dict(s.attributes) for s in self.spans(semconv.SPAN_REPLY)]

    @property
    def attempts(self):
        """The attempt spans' attributes."""
        return [dict(s.attributes) for s in self.spans(semconv.SPAN_ATTEMPT)]

    def points(self, metric):
        """``{frozenset(attributes): value}``; of a histogram the value is ``(count, sum)``."""
        data = self._reader.get_metrics_data()
        found = {}
        for resource in data.resource_metrics if data else ():
            for scope in resource.scope_metrics:
                for m in scope.metrics:
                    if m.name == metric:
                        for p in m.data.data_points:
                            value = p.value if hasattr(p, "value") else (p.count, p.sum)
                            found[frozenset(p.attributes.items())] = value
        return found

    def exemplars(self, metric):
        """The exemplars of a metric's points."""
        data = self._reader.get_metrics_data()
        return [
            exemplar
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for m in scope.metrics
            if m.name == metric
            for point in m.data.data_points
            for exemplar in point.exemplars
        ]

    def counted(self, metric, *names):
        """A counter's non-zero values, summed by the values of these attributes."""
        totals = Counter()
        for attributes, value in self.points(metric).items():
            totals[tuple(dict(attributes).get(n) for n in names)] += value
        return {k if len(k) != 1 else k[0]: v for k, v in totals.items() if v}

    def metric_names(self):
        """The names of all instruments that have data."""
        data = self._reader.get_metrics_data()
        return {
            m.name
            for r in (data.resource_metrics if data else ())
            for s in r.scope_metrics
            for m in s.metrics
        }

    def shutdown(self):
        self.tracer_provider.shutdown()
        self.meter_provider.shutdown()
