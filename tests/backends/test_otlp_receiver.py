# SPDX-License-Identifier: Apache-2.0
"""Prometheus 3's own OTLP receiver counts what the Collector's remote write counts.

Both paths get the same exports, with timestamps of the last ten minutes. Each rule then gives the
same values on both.
"""

from __future__ import annotations

import time
import urllib.request

import pytest
from backends import servers
from backends.servers import Collector, Prometheus, free_ports, get, until
from dashboards.emitted import play
from dashboards.reading import dashboards, panels, rules
from dashboards.traffic import Traffic
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource

from dashboards import promql
from traced_retry import semconv
from traced_retry.core.telemetry import Telemetry

pytestmark = pytest.mark.real_time

EXPORTS = 40
INTERVAL = 15
PROCESSES = 3


class Agent:
    """A process that counts replies with our telemetry."""

    def __init__(self, number):
        self._reader = InMemoryMetricReader()
        resource = {
            "service.name": "agents",
            "service.instance.id": f"process-{number}",
            "deployment.environment.name": ("production", "staging")[number % 2],
        }
        self._provider = MeterProvider([self._reader], Resource(resource))
        self._telemetry = Telemetry(meter_provider=self._provider)
        self._telemetry.initialize_counters("openai", semconv.ACTIONS)

    def play(self):
        """Count a reply of every kind."""
        play(self._telemetry)

    def export(self, at):
        """Return the OTLP metrics of now as if it were that time."""
        request = encode_metrics(self._reader.get_metrics_data())
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    for point in getattr(metric, metric.WhichOneof("data")).data_points:
                        point.time_unix_nano = int(at * 1e9)
                        point.start_time_unix_nano = 0
                        del point.exemplars[:]
        return request.SerializeToString()

    def close(self):
        """End the process."""
        self._provider.shutdown()


def post(url, body):
    """Send OTLP metrics."""
    request = urllib.request.Request(url, body, {"content-type": "application/x-protobuf"})
    urllib.request.urlopen(request, timeout=10).close()


def push(*urls, exports=EXPORTS):
    """Send the exports of three processes to each URL, and return the times of the first and last.

    A process counts in every fourth export, and the last one ends early.
    """
    agents = [Agent(number) for number in range(PROCESSES)]
    last = time.time() - 1
    first = last - (exports - 1) * INTERVAL
    try:
        for export in range(exports):
            for number, agent in enumerate(agents[: 2 if export > exports / 2 else PROCESSES]):
                if (export + number) % 4 == 3:
                    agent.play()
                body = agent.export(first + export * INTERVAL)
                for url in urls:
                    post(url, body)
    finally:
        for agent in agents:
            agent.close()
    return first, last


def prometheus3(folder, **options):
    """Return a Prometheus 3 with its OTLP receiver, to be started."""
    folder.mkdir()
    (unused,) = free_ports(1)
    return Prometheus(folder, program="prometheus3", otlp=True, **{"counts": unused, **options})


def drawn(prometheus, expression, first, last):
    """Return {labels: {time: value}} of the expression, each 15 s."""
    answer = get(
        f"{prometheus.url}/api/v1/query_range",
        query=expression,
        start=first,
        end=last,
        step=INTERVAL,
    )
    return {
        frozenset(series["metric"].items()): {float(at): float(of) for at, of in series["values"]}
        for series in answer["data"]["result"]
    }


def read(expression):
    """Return the names of the series that an expression reads."""
    return {selector.metric for selector in promql.selectors(promql.parse(expression))}


RECORDED = {rule["record"] for rule in rules() if "record" in rule}
FROM_AGENTS = {
    rule["record"]: rule["expr"]
    for rule in rules()
    if any(name.startswith("traced_retry_") for name in read(rule["expr"]))
}
"""The rules that read the agents' own series."""
UNUSED = {
    "provider:traced_retry_budget_remaining:min",
    "exporter:traced_retry_export_dropped:increase1m",
}
"""Of these, the rules without data here: no budget is set, and no span is dropped."""
DURATIONS = {name for name in FROM_AGENTS if "_seconds_" in name}


def test_receiver_counts_as_the_collector_does(tmp_path):
    """Every rule that reads the agents' series has the same values at every time on both paths."""
    for name in ("prometheus3", "otelcol"):
        servers.command(name)
    with prometheus3(tmp_path / "direct") as direct, prometheus3(tmp_path / "through") as through:
        collector = Collector(tmp_path, traces="127.0.0.1:9", prometheus=through.url)
        with collector:
            first, last = push(direct.otlp, f"{collector.endpoint}/v1/metrics")
            samples = "sum(count_over_time(traced_retry_replies_total[30m]))"
            until(lambda: through.query(samples) == direct.query(samples), 30, "equal samples")
        found, expected = (
            {name: drawn(server, expr, first, last) for name, expr in FROM_AGENTS.items()}
            for server in (direct, through)
        )

    assert expected == found
    assert {name for name, of in found.items() if not of} == UNUSED
    assert {"production", "staging"} == {
        dict(labels)["deployment_environment_name"]
        for labels in found["provider:traced_retry_replies:rate5m"]
    }


def test_other_rules_and_panels_read_recorded_series():
    """So that they, too, are the same on both paths."""
    others = [rule["expr"] for rule in rules() if rule.get("record") not in FROM_AGENTS]
    asked = [
        target["expr"]
        for board in dashboards().values()
        for panel in panels(board)
        for target in panel.get("targets", [])
        if "expr" in target and "@ 0" not in target["expr"]  # for its exemplars alone
    ]
    named = {name for expr in [*others, *asked] for name in read(expr)}

    assert [] == [name for name in named - RECORDED if name.startswith("traced_retry_")]


PROMOTED = "  promote_resource_attributes:"


@pytest.mark.parametrize(
    ("setting", "empty"),
    [
        ("translation_strategy: UnderscoreEscapingWithSuffixes", UNUSED),
        (
            "translation_strategy: UnderscoreEscapingWithoutSuffixes",
            {*FROM_AGENTS} - {"provider:traced_retry_in_flight:sum"},
        ),
        ("translation_strategy: NoUTF8EscapingWithSuffixes", {*FROM_AGENTS}),
        ("translation_strategy: NoTranslation", {*FROM_AGENTS}),
        ("convert_histograms_to_nhcb: true", DURATIONS | UNUSED),
    ],
)
def test_setting_of_the_receiver_empties_rules(setting, empty, tmp_path):
    """The table in the docs has these settings and their effects."""
    config = ((PROMOTED, f"  {setting}\n{PROMOTED}"),)
    with prometheus3(tmp_path / "prometheus", config=config) as prometheus:
        first, last = push(prometheus.otlp, exports=8)
        found = {n: drawn(prometheus, expr, first, last) for n, expr in FROM_AGENTS.items()}

    assert empty == {name for name, of in found.items() if not of}


def test_conversion_of_scraped_histograms_empties_durations(tmp_path):
    """The setting leaves the counts and no bucket of a job, and false in a job keeps them."""
    globally, job = "  scrape_interval:", "  - job_name: collector\n"
    setting = "convert_classic_histograms_to_nhcb"
    config = (
        (globally, f"  {setting}: true\n{globally}"),
        (job, f"{job}    {setting}: false\n"),
    )
    traffic = Traffic()
    traffic.go({"openai": (None, 0.4)}, every=0.1)
    both = {"traced-retry-spans", "collector"}

    def jobs(series):
        return {dict(labels)["job"] for labels in prometheus.query(f"count by (job) ({series})")}

    try:
        folder = tmp_path / "prometheus"
        with prometheus3(
            folder, config=config, counts=traffic.port, itself=traffic.port
        ) as prometheus:
            until(lambda: jobs("traced_retry_replies_total") == both, 20, "the first scrapes")
            buckets = jobs("traced_retry_reply_duration_seconds_bucket")
    finally:
        traffic.close()

    assert {"collector"} == buckets
