# SPDX-License-Identifier: Apache-2.0
"""Vmagent adds up what hundreds of processes count: exactly, and never too much after a SIGKILL."""

from __future__ import annotations

import contextlib
import json
import re
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field

import pytest
import yaml
from backends import servers
from backends.servers import EXPORTERS, Collector, Prometheus, VMAgent, free_ports, get, until
from dashboards.emitted import emitted

pytestmark = pytest.mark.real_time

PROCESSES = 500
OUTCOMES = ("succeeded", "exhausted")
ENVIRONMENTS = ("production", "staging")
REPLIES = "traced_retry_replies_total"


@dataclass
class Agent:
    """A synthetic process that counts replies."""

    number: int
    service: str
    counts: Counter = field(default_factory=Counter)

    @property
    def environment(self):
        """The environment, one for each half of the processes."""
        return ENVIRONMENTS[self.number % 2]

    def count(self, added):
        """Count that many replies of each outcome."""
        self.counts.update(dict.fromkeys(OUTCOMES, added))

    def metrics(self, began, now):
        """Return the process's OTLP metrics: counters, and the replies in flight."""
        resource = {
            "service.name": self.service,
            "service.instance.id": f"{self.service}-{self.number}",
            "deployment.environment.name": self.environment,
            "host.name": f"host-{self.number}",
            "process.pid": str(self.number),
        }
        times = {"startTimeUnixNano": str(began), "timeUnixNano": str(now)}
        provider = {"gen_ai.provider.name": "openai", "traced_retry.initiator": "agent"}
        counted = [
            {
                "attributes": _attributes({**provider, "traced_retry.outcome": outcome}),
                "asInt": str(self.counts[outcome]),
                **times,
            }
            for outcome in OUTCOMES
        ]
        in_flight = [{"attributes": _attributes(provider), "asInt": "1", **times}]
        cumulative = {"aggregationTemporality": 2}
        metrics = [
            {
                "name": "traced_retry.replies",
                "unit": "{reply}",
                "sum": {**cumulative, "isMonotonic": True, "dataPoints": counted},
            },
            {
                "name": "traced_retry.in_flight",
                "unit": "{reply}",
                "sum": {**cumulative, "isMonotonic": False, "dataPoints": in_flight},
            },
        ]
        return {
            "resource": {"attributes": _attributes(resource)},
            "scopeMetrics": [{"metrics": metrics}],
        }


def _attributes(of):
    return [{"key": key, "value": {"stringValue": value}} for key, value in of.items()]


@dataclass
class Pipeline:
    """A Collector that writes to vmagent, which writes to Prometheus, which scrapes vmagent."""

    collector: Collector
    vmagent: VMAgent
    prometheus: Prometheus
    began: int = field(default_factory=time.time_ns)
    started: float = field(default_factory=time.monotonic)

    def push(self, agents):
        """Send the metrics of the processes once, in one request."""
        now = time.time_ns()
        body = {"resourceMetrics": [agent.metrics(self.began, now) for agent in agents]}
        request = urllib.request.Request(
            f"{self.collector.endpoint}/v1/metrics",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=30).close()

    def counted(self, service):
        """Return {(environment, outcome): replies} in Prometheus, restarts of vmagent included."""
        found = Counter()
        query = f'{REPLIES}{{service_name="{service}"}}[30m]'
        for series in get(f"{self.prometheus.url}/api/v1/query", query=query)["data"]["result"]:
            of, before = series["metric"], 0.0
            for _, text in series["values"]:
                value = float(text)
                found[of["deployment_environment_name"], of["traced_retry_outcome"]] += (
                    value - before if value >= before else value
                )
                before = value
        return found

    def received(self):
        """Return the number of data points that vmagent has received."""
        with urllib.request.urlopen(f"{self.vmagent.url}/metrics", timeout=5) as response:
            lines = response.read().decode().splitlines()
        name = 'vmagent_rows_inserted_total{type="promremotewrite"} '
        return sum(int(line.removeprefix(name)) for line in lines if line.startswith(name))

    def push_and_wait(self, agents):
        """Send the metrics, and return when vmagent has received them."""
        before = self.received()
        self.push(agents)
        until(lambda: self.received() >= before + 3 * len(agents), 60, "vmagent receiving them")

    def restart(self):
        """Kill vmagent and start it again."""
        self.vmagent.kill()
        self.vmagent.__enter__()
        self.started = time.monotonic()

    def wait_until_first_samples_count(self):
        """Wait until a process that vmagent does not know is a new one."""
        known = self.started + VMAgent.IGNORED + 1
        until(lambda: time.monotonic() > known, VMAgent.IGNORED + 5, "the first samples counting")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The servers, started once."""
    for name in ("otelcol", "vmagent", "prometheus"):
        servers.command(name)
    folder = tmp_path_factory.mktemp("vmagent")
    (port,) = free_ports(1)
    vmagent = VMAgent(folder, prometheus=f"http://127.0.0.1:{port}")
    collector = Collector(folder, traces="127.0.0.1:9", prometheus=vmagent.url)
    prometheus = Prometheus(folder, counts=collector.counts, port=port, vmagent=vmagent.port)
    with contextlib.ExitStack() as stack:
        for server in (prometheus, vmagent, collector):
            stack.enter_context(server)
        yield Pipeline(collector, vmagent, prometheus)


def truth(agents):
    """Return {(environment, outcome): replies} that the processes counted."""
    found = Counter()
    for agent in agents:
        for outcome, count in agent.counts.items():
            found[agent.environment, outcome] += count
    return found


def test_500_processes_are_counted_exactly(pipeline):
    """Processes that begin and end at different times add up to the truth, in one set of series."""
    agents = [Agent(number, "exact") for number in range(PROCESSES)]
    early, late = agents[: PROCESSES // 2], agents[PROCESSES // 2 :]
    pipeline.push_and_wait(early)  # zeros, which every agent sends first
    pipeline.wait_until_first_samples_count()
    for number in range(4):
        # Half of the processes begin later, with replies in their first export.
        alive = early if number < 2 else late
        for agent in alive:
            agent.count(1 + (agent.number + number) % 3)
        pipeline.push_and_wait(alive)

    expected = truth(agents)
    until(lambda: pipeline.counted("exact") == expected, 60, f"{expected} in Prometheus")
    series = f'{REPLIES}{{service_name="exact"}}'
    found = pipeline.prometheus.query(f"last_over_time({series}[30m])")
    # The recording rules take `increase` of these series, as of a process that is scraped.
    scraped = pipeline.prometheus.query(f"last_over_time({series}[30m]) and on (job, instance) up")
    in_flight = 'max(max_over_time(traced_retry_in_flight{service_name="exact"}[30m]))'

    assert len(OUTCOMES) * len(ENVIRONMENTS) == len(found)
    assert found == scraped
    assert [PROCESSES / 4] == list(pipeline.prometheus.query(in_flight).values())


def test_killed_vmagent_loses_two_exports_at_most_and_adds_none(pipeline):
    """After a SIGKILL and a restart no reply is counted twice, and only the last ones are lost."""
    agents = [Agent(number, "killed") for number in range(PROCESSES)]

    def export():
        for agent in agents:
            agent.count(1 + agent.number % 3)
        pipeline.push_and_wait(agents)
        return truth(agents)

    pipeline.push_and_wait(agents)
    export()
    before = export()
    until(lambda: pipeline.counted("killed") == before, 60, f"{before} in Prometheus")

    export()
    pipeline.restart()
    lost = export()
    export()
    expected = export()
    least = {pair: expected[pair] - (lost[pair] - before[pair]) for pair in expected}
    until(lambda: pipeline.counted("killed") >= Counter(least), 60, f"{least} in Prometheus")
    settled = time.monotonic() + 2 * VMAgent.INTERVAL + servers.SCRAPE
    until(lambda: time.monotonic() > settled, 10, "two more outputs")

    assert Counter(least) <= pipeline.counted("killed") <= expected


def test_labels_of_metrics_are_kept():
    """The aggregation keeps every label of our metrics; only those of a process are dropped."""
    rules = yaml.safe_load((EXPORTERS / "vmagent/aggregation.yaml").read_text())
    labels = {label for of in emitted().values() for label in of}

    for rule in rules:
        assert {label for label in labels if not label.startswith("otel_scope_")} <= {*rule["by"]}


def test_every_metric_is_aggregated():
    """Each metric of ours matches one rule."""
    rules = yaml.safe_load((EXPORTERS / "vmagent/aggregation.yaml").read_text())
    patterns = [re.sub(r'^\{__name__=~"(.+)"\}$', r"\1", rule["match"]) for rule in rules]
    matches = {
        name: sum(bool(re.fullmatch(pattern, name)) for pattern in patterns) for name in emitted()
    }

    assert dict.fromkeys(matches, 1) == matches
