# SPDX-License-Identifier: Apache-2.0
"""The server side of exporters/ and the rules: each file is read by the server it is for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
import yaml
from backends import servers
from backends.servers import DASHBOARDS, EXPORTERS, command

from traced_retry import semconv
from traced_retry.doctor.exporters import run_checks

FOLDERS = ("jaeger", "collector", "prometheus", "alertmanager", "grafana", "vmagent", "kubernetes")
SERVER_SIDE = [
    *sorted(path for folder in FOLDERS for path in (EXPORTERS / folder).rglob("*.yaml")),
    EXPORTERS / "compose.yaml",
]


def check(*arguments, **options):
    """Run a server's own check of a file; what it says is the failure's text."""
    name, *rest = arguments
    done = subprocess.run(
        [command(name), *map(str, rest)], capture_output=True, text=True, check=False, **options
    )
    assert 0 == done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("overlay", [[], ["badger.yaml"]], ids=["memory", "badger"])
def test_jaeger_takes_its_configuration(overlay):
    """``jaeger validate``."""
    files = [EXPORTERS / "jaeger" / name for name in ["jaeger.yaml", *overlay]]
    check("jaeger", "validate", *(f"--config={file}" for file in files))


@pytest.mark.parametrize("secured", [False, True])
@pytest.mark.parametrize("name", ["collector.yaml", "load-balancer.yaml"])
def test_the_collector_takes_its_configuration(name, secured, tmp_path, monkeypatch):
    """``otelcol validate``, also with the lines for TLS, a token and headers."""
    text = (EXPORTERS / "collector" / name).read_text()
    if secured:
        text = text.replace("#: ", "")
        for variable in re.findall(r'"\$\{env:(\w+)\}', text):
            monkeypatch.setenv(variable, "set")
    (tmp_path / name).write_text(text)
    check("otelcol", "validate", f"--config={tmp_path / name}")


def test_prometheus_takes_its_configuration_and_rules(tmp_path):
    """``promtool check config``, with the rules where it looks for them."""
    shutil.copy(EXPORTERS / "prometheus/prometheus.yaml", tmp_path)
    shutil.copytree(DASHBOARDS / "prometheus", tmp_path / "rules")
    check("promtool", "check", "config", tmp_path / "prometheus.yaml")


def test_alertmanager_takes_its_configuration():
    """``amtool check-config``."""
    check("amtool", "check-config", EXPORTERS / "alertmanager/alertmanager.yaml")


@pytest.mark.parametrize("service", ["pagerduty", "slack", "opsgenie"])
def test_alertmanager_takes_the_receivers_of_a_service(service, tmp_path):
    """``amtool check-config`` of the shipped configuration with the receivers in place of ours."""
    config = yaml.safe_load((EXPORTERS / "alertmanager/alertmanager.yaml").read_text())
    path = EXPORTERS / f"alertmanager/receivers/{service}.yaml"
    examples = {receiver["name"] for receiver in config["receivers"]}
    config.update(yaml.safe_load(path.read_text()))
    (tmp_path / "alertmanager.yaml").write_text(json.dumps(config))

    assert examples == {receiver["name"] for receiver in config["receivers"]}
    check("amtool", "check-config", tmp_path / "alertmanager.yaml")


def test_check_passes_once_every_receiver_is_replaced(tmp_path):
    """`exporters check` fails for each example, and passes for a file that amtool accepts."""
    path = tmp_path / "alertmanager.yaml"
    config = yaml.safe_load((EXPORTERS / "alertmanager/alertmanager.yaml").read_text())
    path.write_text(json.dumps(config))
    assert ["fail"] * 3 == [found.status for found in run_checks(path)]

    slack = yaml.safe_load((EXPORTERS / "alertmanager/receivers/slack.yaml").read_text())
    config.update(slack)
    path.write_text(json.dumps(config))
    assert ["ok", "ok", "fail"] == [found.status for found in run_checks(path)]

    config["receivers"][-1]["webhook_configs"][0]["url"] = "https://hooks.example.org/mine"
    path.write_text(json.dumps(config))
    assert ["ok"] * 3 == [found.status for found in run_checks(path)]
    check("amtool", "check-config", path)


def test_alertmanager_starts_with_its_configuration(tmp_path):
    """The real one, on a free port."""
    (port,) = servers.free_ports(1)
    url = f"http://127.0.0.1:{port}"
    arguments = [
        f"--config.file={EXPORTERS / 'alertmanager/alertmanager.yaml'}",
        f"--storage.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    ]
    with servers.Process("prometheus-alertmanager", arguments, f"{url}/-/ready", tmp_path):
        status = servers.get(f"{url}/api/v2/status")

    assert "inhibit_rules" in status["config"]["original"]


@pytest.mark.parametrize("path", SERVER_SIDE, ids=lambda p: str(p.relative_to(EXPORTERS)))
def test_a_file_says_first_what_it_is(path):
    """`traced-retry exporters list` shows the first line of each."""
    first, second, *_ = path.read_text().splitlines()

    assert first.startswith("# ")
    assert first.endswith(".")
    assert "# SPDX-License-Identifier: Apache-2.0" == second


def spanmetrics(path, name):
    """The settings of the connector that counts spans."""
    return yaml.safe_load(path.read_text())["connectors"][name]


CONNECTORS = [("jaeger/jaeger.yaml", "spanmetrics"), ("collector/collector.yaml", "span_metrics")]


@pytest.mark.parametrize(("file", "name"), CONNECTORS)
def test_dimensions_and_buckets_are_ours(file, name):
    """As the agents' own metrics are counted, and by model and environment."""
    settings = spanmetrics(EXPORTERS / file, name)
    own = {
        semconv.PROVIDER,
        semconv.INITIATOR,
        semconv.OUTCOME,
        semconv.STOP_REASON,
        semconv.ACTION,
        semconv.RESULT,
        semconv.ERROR_TYPE,
        semconv.RECOVERABLE,
    }
    dimensions = [d["name"] for d in settings["dimensions"]]
    on_counts = [d["name"] for d in settings["calls_dimensions"]]
    buckets = settings["histogram"]["explicit"]["buckets"]

    resource = {"deployment.environment.name", "service.version"}
    assert own | {semconv.MODEL} | resource == {*dimensions, *on_counts}
    assert list(semconv.DURATION_BUCKETS) == [seconds(bucket) for bucket in buckets]


def seconds(text):
    """What "50ms" and "7.5s" mean."""
    return float(text[:-2]) / 1000 if text.endswith("ms") else float(text.removesuffix("s"))


def test_both_connectors_count_alike():
    """Whether Jaeger counts or a Collector, the series are the same."""
    one, other = (spanmetrics(EXPORTERS / file, name) for file, name in CONNECTORS)

    assert one == other


def test_the_filters_of_the_collector_leave_nothing_out():
    """What one of them drops is what the other keeps."""
    processors = yaml.safe_load((EXPORTERS / "collector/collector.yaml").read_text())["processors"]
    (only,) = processors["filter/only_retried"]["traces"]["span"]
    (rest,) = processors["filter/all_but_retried"]["traces"]["span"]

    assert only == f"not ( {rest})"


def test_the_sampler_names_every_outcome_but_success():
    """A new outcome is not forgotten there."""
    policies = yaml.safe_load((EXPORTERS / "collector/collector.yaml").read_text())["processors"]
    named = policies["tail_sampling"]["policies"][0]["string_attribute"]

    assert semconv.OUTCOME == named["key"]
    assert list(semconv.OUTCOMES[1:]) == named["values"]


def test_compose_mounts_files_that_are_there():
    """Each mounted file is there, and Docker creates no folder in place of a missing one."""
    compose = yaml.safe_load((EXPORTERS / "compose.yaml").read_text())
    mounted = [
        volume.split(":")[0]
        for service in compose["services"].values()
        for volume in service.get("volumes", [])
        if isinstance(volume, str) and volume.startswith("./")
    ]
    required = {
        volume["source"]
        for service in compose["services"].values()
        for volume in service.get("volumes", [])
        if isinstance(volume, dict) and volume["bind"] == {"create_host_path": False}
    }

    assert {"collector", "jaeger", "prometheus", "alertmanager", "grafana"} == {
        *compose["services"]
    }
    assert [] == [path for path in mounted if not (EXPORTERS / path).exists()]
    assert {"./dashboards/prometheus", "./dashboards/grafana"} == required


def test_compose_restarts_and_limits_every_service():
    """A server that ends is started again, and none takes the memory of the machine."""
    services = yaml.safe_load((EXPORTERS / "compose.yaml").read_text())["services"]

    assert {"unless-stopped"} == {service["restart"] for service in services.values()}
    assert all(service["mem_limit"] for service in services.values())


def test_service_monitor_scrapes_as_prometheus_yaml():
    """The operator's jobs and ports are those of the configuration without Kubernetes."""
    path = EXPORTERS / "kubernetes/service-monitor.yaml"
    service, monitor = yaml.safe_load_all(path.read_text())
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    scraped = {
        endpoint["relabelings"][0]["replacement"]: ports[endpoint["port"]]
        for endpoint in monitor["spec"]["endpoints"]
    }
    shipped = yaml.safe_load((EXPORTERS / "prometheus/prometheus.yaml").read_text())
    known = {
        job["job_name"]: int(job["static_configs"][0]["targets"][0].rpartition(":")[2])
        for job in shipped["scrape_configs"]
    }

    assert service["metadata"]["labels"] == monitor["spec"]["selector"]["matchLabels"]
    assert known == scraped


def test_compose_keeps_data_and_checks_health():
    """Each service has a volume, and a health check if its image has a program for it."""
    compose = yaml.safe_load((EXPORTERS / "compose.yaml").read_text())
    kept = {
        name
        for name, service in compose["services"].items()
        for volume in service["volumes"]
        if isinstance(volume, str) and volume.startswith(f"{name}:/")
    }
    checked = {name for name, service in compose["services"].items() if "healthcheck" in service}
    retention = "--storage.tsdb.retention.time=40d"

    assert {*compose["services"]} == kept == {*compose["volumes"]}
    assert {*compose["services"]} - {"collector", "jaeger"} == checked
    assert retention in compose["services"]["prometheus"]["command"]


def test_the_rules_arithmetic(tmp_path):
    """``promtool test rules``: see recording_test.yaml."""
    shutil.copy(DASHBOARDS / "prometheus/recording.yaml", tmp_path)
    shutil.copy(servers.ROOT / "tests/backends/recording_test.yaml", tmp_path)
    check("promtool", "test", "rules", tmp_path / "recording_test.yaml")


def test_a_missing_server_skips_and_says_how_to_get_it(monkeypatch):
    """Where it must not be missing, it fails."""
    monkeypatch.setattr(servers, "CACHE", servers.ROOT / "nowhere")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("TRACED_RETRY_REQUIRE_BACKENDS", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"python tools/backends/build\.py jaeger"):
        command("jaeger")
    monkeypatch.setenv("TRACED_RETRY_REQUIRE_BACKENDS", "1")
    with pytest.raises(pytest.fail.Exception, match="apt-get install prometheus"):
        command("promtool")
