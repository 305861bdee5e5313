# SPDX-License-Identifier: Apache-2.0
"""What traced_retry emits, by its own code and OpenTelemetry's Prometheus exporter."""

from __future__ import annotations

import time

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import REGISTRY
from support.attempts import record_attempt

from traced_retry import semconv
from traced_retry.core import budget
from traced_retry.core.failure import failure
from traced_retry.core.telemetry import Target, Telemetry
from traced_retry.export.processor import BoundedSpanProcessor


class _Nowhere:
    reason = None

    def export(self, spans):
        return None

    def shutdown(self):
        return None


def emitted():
    """{metric: {label: values}} after one reply of every kind; names as Prometheus has them."""
    reader = PrometheusMetricReader()
    provider = MeterProvider([reader])
    try:
        telemetry = Telemetry(meter_provider=provider)
        bucket = budget.RetryBudget(5.0)
        bucket.open("openai", time.monotonic)
        play(telemetry)
        BoundedSpanProcessor(_Nowhere(), "otlp", meter_provider=provider).shutdown()
        found = {}
        for family in REGISTRY.collect():
            for sample in family.samples:
                labels = found.setdefault(sample.name, {})
                for label, value in sample.labels.items():
                    labels.setdefault(label, set()).add(value)
        return {name: of for name, of in found.items() if name.startswith("traced_retry")}
    finally:
        provider.shutdown()


def play(telemetry):
    """Record one reply of every kind."""
    target = Target("openai", "gpt-realtime")
    telemetry.initialize_counters("openai", semconv.ACTIONS)
    failed = failure(RuntimeError(), "timeout")
    said = telemetry.reply(Target("openai", say=True))
    said.begin(0.0, 0.0)
    record_attempt(said, "failed", 0.1, failed)
    said.waited(0.1)
    said.end("deadline", 0.2, failed)
    said.late()
    for stop in (None, *semconv.STOP_REASONS):
        for action in semconv.ACTIONS:
            for result in semconv.RESULTS:
                reply = telemetry.reply(target)
                reply.begin(0.0, 0.0)
                failure_of = failed if result == "failed" else None
                record_attempt(reply, result, 0.1, failure_of, action=action)
                reply.waited(0.1)
                reply.end(stop, 0.2, None)
                reply.late()
