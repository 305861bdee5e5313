# SPDX-License-Identifier: Apache-2.0
"""Our metrics in ``prometheus_client``'s multiprocess files; the scrape is in test_enable_jobs."""

from __future__ import annotations

import os
import subprocess
import sys

from support.fresh import fresh

CODE = """
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from opentelemetry import metrics
from traced_retry.export import prometheus
prometheus.install()
prometheus.install()
{code}
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def scraped(tmp_path, code):
    """What a scrape gives after ``code``, without the comments."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE.format(code=code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
    )
    assert "" == done.stderr
    return [line for line in done.stdout.splitlines() if line and not line.startswith("#")]


def test_names_units_and_labels(tmp_path):
    """As a Collector makes them of OTLP; a series per set of labels, also of other label names."""
    lines = scraped(
        tmp_path,
        """
meter = metrics.get_meter("traced_retry")
counter = meter.create_counter("traced_retry.replies", "{reply}", "Replies.")
counter.add(0, {"gen_ai.provider.name": "openai"})
counter.add(2, {"gen_ai.provider.name": "openai", "recoverable": True})
counter.add(-1, {"gen_ai.provider.name": "openai"})
meter.create_up_down_counter("traced_retry.in_flight", "{reply}").add(3)
meter.create_histogram(
    "traced_retry.delay", "s", explicit_bucket_boundaries_advisory=[0.5, 1.0]
).record(0.7, {"a": "b"})
metrics.get_meter("livekit-agents").create_counter("lk.x").add(1, {"job_id": "1"})
""",
    )

    assert [
        'traced_retry_delay_seconds_bucket{a="b",le="0.5"} 0.0',
        'traced_retry_delay_seconds_bucket{a="b",le="1.0"} 1.0',
        'traced_retry_delay_seconds_bucket{a="b",le="+Inf"} 1.0',
        'traced_retry_delay_seconds_count{a="b"} 1.0',
        'traced_retry_delay_seconds_sum{a="b"} 0.7',
        "traced_retry_in_flight 3.0",
        'traced_retry_replies_total{gen_ai_provider_name="openai"} 0.0',
        'traced_retry_replies_total{gen_ai_provider_name="openai",recoverable="true"} 2.0',
    ] == sorted(lines, key=lambda line: line.partition("{")[0])


def test_instruments_made_twice(tmp_path):
    """Neither overwrites what the other has counted."""
    lines = scraped(
        tmp_path,
        """
one, two = (metrics.get_meter("traced_retry").create_counter("n") for _ in range(2))
for counter in (one, two, one, two):
    counter.add(1)
""",
    )

    assert ["n_total 4.0"] == lines


def test_too_late():
    """prometheus_client decides when it is imported; the error says what to do."""
    ended = fresh(
        "from traced_retry.export import prometheus; prometheus.install()",
        PROMETHEUS_MULTIPROC_DIR="anything",
    )

    assert "ExportError: PROMETHEUS_MULTIPROC_DIR was not set when" in ended.error
    assert "AgentServer(prometheus_multiproc_dir=...)" in ended.error


def test_another_meter_provider():
    """It is not replaced."""
    ended = fresh("""
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from traced_retry.export import prometheus
metrics.set_meter_provider(MeterProvider())
prometheus.install()
""")

    assert "ExportError: the global meter provider is a MeterProvider" in ended.error
