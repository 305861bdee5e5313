# SPDX-License-Identifier: Apache-2.0
"""An outage, a page, an end: real Prometheus, real Alertmanager, the shipped files.

Replies are told by our own telemetry and scraped. A minute of the rules takes a second here;
nothing else of them is changed.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
import urllib.request

import pytest
import yaml
from backends.servers import (
    DASHBOARDS,
    EXPORTERS,
    Collector,
    Process,
    command,
    free_ports,
    get,
    until,
)
from dashboards.reading import faster
from dashboards.traffic import Traffic

from traced_retry.monitoring import alerts

pytestmark = pytest.mark.real_time


class Webhook(http.server.ThreadingHTTPServer):
    """What Alertmanager sent: [(path, notification)]."""

    def __init__(self):
        self.got = []
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def groups(self, path, status):
        """The groups that were notified there with that status: {group: notifications}."""
        found = {}
        for where, sent in list(self.got):
            if where == path and sent["status"] == status:
                found.setdefault(json.dumps(sent["groupLabels"], sort_keys=True), []).append(sent)
        return found


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append((self.path, json.loads(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def alertmanager_config(hook):
    """The shipped configuration and inhibitions; only times and addresses are ours."""
    found = yaml.safe_load((EXPORTERS / "alertmanager/alertmanager.yaml").read_text())
    shipped = yaml.safe_load((DASHBOARDS / "alertmanager/inhibit.yaml").read_text())
    found["inhibit_rules"] = shipped["inhibit_rules"]
    found["route"].update(group_wait="1s", group_interval="2s")
    for route in found["route"]["routes"]:
        route.pop("group_wait", None)
    return addressed(found, hook)


def addressed(found, hook):
    """Return a configuration with receivers that send to the webhook on that port."""
    for receiver in found["receivers"]:
        for webhook in receiver["webhook_configs"]:
            webhook["url"] = webhook["url"].replace("127.0.0.1:9099", f"127.0.0.1:{hook}")
    return found


def alertmanager(tmp_path, config, port):
    """Return an Alertmanager with that configuration, to be started."""
    (tmp_path / "alertmanager.yaml").write_text(json.dumps(config))
    return Process(
        "prometheus-alertmanager",
        [
            f"--config.file={tmp_path / 'alertmanager.yaml'}",
            f"--storage.path={tmp_path / 'alertmanager'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--cluster.listen-address=",
        ],
        f"http://127.0.0.1:{port}/-/ready",
        tmp_path,
    )


@contextlib.contextmanager
def alerting(tmp_path, targets):
    """Start Prometheus and Alertmanager, and yield the webhook and the URLs of both.

    Args:
        tmp_path: a folder for their files.
        targets: the addresses of the job that has the counts from spans.
    """
    for name in ("prometheus", "prometheus-alertmanager"):
        command(name)
    port, manager = free_ports(2)
    hook = Webhook()
    (tmp_path / "rules").mkdir()
    for path in (DASHBOARDS / "prometheus").glob("*.yaml"):
        (tmp_path / "rules" / path.name).write_text(faster(path.read_text(), 60))
    shipped = yaml.safe_load((EXPORTERS / "prometheus/prometheus.yaml").read_text())
    shipped["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    shipped["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [
        f"127.0.0.1:{manager}"
    ]
    shipped["scrape_configs"] = [
        {"job_name": "traced-retry-spans", "static_configs": [{"targets": targets}]}
    ]
    (tmp_path / "prometheus.yaml").write_text(json.dumps(shipped))
    url = f"http://127.0.0.1:{port}"
    prometheus = Process(
        "prometheus",
        [
            f"--config.file={tmp_path / 'prometheus.yaml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--rules.alert.resend-delay=1s",
        ],
        f"{url}/-/ready",
        tmp_path,
    )
    config = alertmanager_config(hook.server_address[1])
    try:
        with alertmanager(tmp_path, config, manager), prometheus:
            yield hook, url, f"http://127.0.0.1:{manager}"
    finally:
        hook.shutdown()
        hook.server_close()


@pytest.fixture
def paging(tmp_path):
    """Traffic that is scraped, Prometheus and Alertmanager that run, and where pages arrive."""
    traffic = Traffic()
    try:
        with alerting(tmp_path, [f"127.0.0.1:{traffic.port}"]) as (hook, prometheus, manager):
            yield traffic, hook, prometheus, manager
    finally:
        traffic.close()


def firing(prometheus):
    """{(alert, provider)} that fire in Prometheus."""
    answer = get(f"{prometheus}/api/v1/alerts")
    return {
        (a["labels"]["alertname"], a["labels"].get("gen_ai_provider_name"))
        for a in answer["data"]["alerts"]
        if a["state"] == "firing"
    }


def value(prometheus, query):
    """The one value that a query gives; 0 without any."""
    found = get(f"{prometheus}/api/v1/query", query=query)["data"]["result"]
    return float(found[0]["value"][1]) if found else 0.0


def suppressed(manager):
    """{(alert, provider)} that Alertmanager holds back."""
    with urllib.request.urlopen(f"{manager}/api/v2/alerts", timeout=5) as response:
        alerts = json.load(response)
    return {
        (a["labels"]["alertname"], a["labels"].get("gen_ai_provider_name"))
        for a in alerts
        if a["status"]["inhibitedBy"]
    }


def test_one_provider_fails(paging):
    """One page for it, its ticket held back, none for its neighbour, resolved when over."""
    traffic, hook, prometheus, manager = paging
    page = json.dumps(
        {"alertname": alerts.LOST_REPLIES, "gen_ai_provider_name": "openai"}, sort_keys=True
    )
    healthy = {"openai": (None, 0.4), "gcp.gemini": (None, 0.4)}
    traffic.go(healthy, every=0.1)
    replies = f'sum(sum_over_time({alerts.REPLIES}{{gen_ai_provider_name="openai"}}[1m]))'
    until(lambda: value(prometheus, replies) > 30, 30, "enough replies for a ratio")
    traffic.go({**healthy, "openai": ("deadline", 20.0)}, every=0.1)

    until(lambda: hook.groups("/page", "firing"), 60, "the page")
    until(
        lambda: (alerts.LOST_REPLIES, "openai") in suppressed(manager),
        60,
        "the ticket's inhibition",
    )
    both = '{alertstate="firing", severity="critical", gen_ai_provider_name="openai"}'
    until(lambda: value(prometheus, f"count(ALERTS{both})") == 3, 60, "the long windows")
    first = hook.groups("/page", "firing")[page][0]

    assert {"openai"} == {a["labels"]["gen_ai_provider_name"] for a in first["alerts"]}
    assert "% of its replies in the last" in first["alerts"][0]["annotations"]["description"]
    assert first["alerts"][0]["annotations"]["dashboard_url"].endswith("var-provider=openai")

    traffic.go(healthy, every=0.1)
    until(lambda: page in hook.groups("/page", "resolved"), 120, "the page's end")

    # Time runs 60 times faster here, so the target may be absent for too long at the start.
    paged = {group for group in hook.groups("/page", "firing") if alerts.ABSENT not in group}
    assert {page} == paged
    # The slow form of the same alert may be a ticket by now, because its budget is spent.
    assert set() == {t for t in hook.groups("/ticket", "firing") if alerts.LOST_REPLIES not in t}
    assert (alerts.LOST_REPLIES, "gcp.gemini") not in firing(prometheus)


def test_several_providers_fail(paging):
    """Five at once: one page, theirs held back."""
    traffic, hook, _, manager = paging
    providers = [f"provider-{n}" for n in range(5)]
    traffic.go(dict.fromkeys(providers, ("max_attempts", 2.0)), every=0.1)

    until(lambda: hook.groups("/page", "firing"), 60, "the page")
    until(
        lambda: {(alerts.LOST_REPLIES, p) for p in providers} <= suppressed(manager),
        60,
        "the inhibition",
    )
    settled = time.monotonic() + 6
    until(lambda: time.monotonic() > settled, 10, "three group intervals")

    # A busy machine may miss scrapes for five seconds, which are five minutes here.
    pages = [page for page in hook.groups("/page", "firing") if alerts.ABSENT not in page]
    assert [json.dumps({"alertname": alerts.MANY})] == pages


def test_killed_collectors_are_reported(tmp_path):
    """One of five killed Collectors opens a ticket, five page, and a restart resolves both."""
    for name in ("otelcol", "prometheus", "prometheus-alertmanager"):
        command(name)
    collectors = []
    for number in range(5):
        folder = tmp_path / f"collector-{number}"
        folder.mkdir()
        collectors.append(Collector(folder, traces="127.0.0.1:9", prometheus="http://127.0.0.1:9"))
    targets = [f"127.0.0.1:{collector.counts}" for collector in collectors]
    up = 'sum(up{job="traced-retry-spans"})'
    ticket = json.dumps({"alertname": alerts.DEGRADED})
    page = json.dumps({"alertname": alerts.ABSENT})

    def notified(group, path, status):
        until(lambda: group in hook.groups(path, status), 60, f"{group} being {status}")

    with contextlib.ExitStack() as stack:
        for collector in collectors:
            stack.enter_context(collector)
        hook, prometheus, _ = stack.enter_context(alerting(tmp_path, targets))
        until(lambda: value(prometheus, up) == 5, 30, "five targets being up")
        # Time runs 60 times faster here, so the targets may be absent for too long at the start.
        only = {(alerts.WATCHDOG, None)}
        until(lambda: firing(prometheus) == only, 60, "the end of other alerts")
        hook.got.clear()

        collectors[0].kill()
        notified(ticket, "/ticket", "firing")
        (alert,) = hook.groups("/ticket", "firing")[ticket][0]["alerts"]
        assert "some_counts_down" == alert["labels"]["cause"]
        assert {} == hook.groups("/page", "firing")

        collectors[0].__enter__()
        notified(ticket, "/ticket", "resolved")

        for collector in collectors:
            collector.kill()
        notified(page, "/page", "firing")
        (alert,) = hook.groups("/page", "firing")[page][0]["alerts"]
        assert "counts_down" == alert["labels"]["cause"]

        for collector in collectors:
            collector.__enter__()
        notified(page, "/page", "resolved")


def test_page_arrives_while_group_of_another_environment_is_open(tmp_path):
    """Production fires after staging was notified, and is notified within 30 s as shipped."""
    command("prometheus-alertmanager")
    (port,), hook = free_ports(1), Webhook()
    config = yaml.safe_load((EXPORTERS / "alertmanager/alertmanager.yaml").read_text())
    addressed(config, hook.server_address[1])

    def fire(environment):
        labels = {
            "alertname": alerts.LOST_REPLIES,
            "gen_ai_provider_name": "openai",
            "severity": "critical",
            "deployment_environment_name": environment,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/v2/alerts",
            json.dumps([{"labels": labels}]).encode(),
            {"content-type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=5).close()

    def paged(environment):
        return any(environment in group for group in hook.groups("/page", "firing"))

    with alertmanager(tmp_path, config, port):
        fire("staging")
        until(lambda: paged("staging"), 30, "staging's page")
        fire("production")
        until(lambda: paged("production"), 30, "production's page")
    hook.shutdown()
    hook.server_close()
