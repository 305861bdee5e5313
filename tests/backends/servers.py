# SPDX-License-Identifier: Apache-2.0
"""Real servers on free ports of 127.0.0.1, started with the files that we ship."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
EXPORTERS = ROOT / "exporters"
DASHBOARDS = ROOT / "dashboards"
BACKENDS = os.environ.get("TRACED_RETRY_BACKENDS", "")
"""The folder that tools/backends/build.py fills. With ``none`` no server is found, even on PATH."""
CACHE = Path(BACKENDS or Path.home() / ".cache/traced-retry/backends")

_BUILD = "python tools/backends/build.py"
_APT = "apt-get install prometheus prometheus-alertmanager"
HOW = {
    "jaeger": f"{_BUILD} jaeger",
    "otelcol": f"{_BUILD} otelcol",
    "prometheus3": f"{_BUILD} prometheus3",
    "promtool3": f"{_BUILD} promtool3",
    "vmagent": f"{_BUILD} vmagent",
    "vmalert-tool": f"{_BUILD} vmalert-tool",
    "prometheus": _APT,
    "promtool": _APT,
    "prometheus-alertmanager": _APT,
    "amtool": _APT,
}
"""The command that installs each program."""

SCRAPE = 1.0
"""Seconds between two scrapes in the tests; 15 in the file we ship."""
FLUSH = 5.0
"""Seconds between two flushes of spanmetrics in the tests; 30 in the file we ship."""


def command(name):
    """Return the path of a server's command.

    If there is none, skip the test, or fail it if TRACED_RETRY_REQUIRE_BACKENDS is 1.
    """
    if found := found_command(name):
        return found
    message = f"there is no {name} here; get it with: {HOW[name]}"
    if os.environ.get("TRACED_RETRY_REQUIRE_BACKENDS") == "1":
        pytest.fail(message, pytrace=False)
    return pytest.skip(message)


def found_command(name):
    """Return the path of a server's command, or None."""
    path = f"{CACHE / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return None if BACKENDS == "none" else shutil.which(name, path=path)


def free_ports(count):
    """Return ports that were free a moment ago, all different.

    They lie below the range from which Linux and macOS choose the port of a client or of a server
    on port 0. Otherwise, another test could take such a port before the server starts. They do not
    depend on the tests' random seed, which is the same in each process that runs tests.
    """
    found = []
    while len(found) < count:
        port = secrets.choice(range(10_000, 32_000))
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("127.0.0.1", port))
            if port not in found:
                found.append(port)
    return found


def until(condition, seconds=20.0, what="it"):
    """Return the first true result of ``condition``. Fail after ``seconds`` without one."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not come true within {seconds} s")
        time.sleep(0.05)
    return found


def get(url, **parameters):
    """Return the JSON that answers a GET, or None for 404."""
    if parameters:
        url += "?" + urllib.parse.urlencode(parameters)
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def _answers(url):
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except OSError:
        return False


@dataclass
class Process:
    """A running server, which is ended by its process id."""

    name: str
    arguments: list[str]
    ready: str
    """A URL that is answered with 200 once the server is ready."""
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __enter__(self):
        program = command(self.name)  # may skip the test, so it comes before any resource
        with (self.folder / f"{self.name}.log").open("ab") as log:  # the server has its own copy
            self._process = subprocess.Popen(
                [program, *self.arguments],
                cwd=self.folder,
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            until(self._is_ready, what=f"{self.name} being ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def kill(self):
        """End the server with a SIGKILL. It can be started again."""
        self._process.kill()
        self._process.wait()

    def reload(self):
        """Have the server read its configuration again."""
        self._process.send_signal(signal.SIGHUP)

    def _is_ready(self):
        if self._process.poll() is not None:
            log = (self.folder / f"{self.name}.log").read_text(errors="replace")
            pytest.fail(f"{self.name} ended at its start:\n{log[-3000:]}", pytrace=False)
        return _answers(self.ready)


class _Server:
    """A server whose constructor sets ``_process``."""

    def __enter__(self):
        self._process.__enter__()
        return self

    def __exit__(self, *_):
        self._process.__exit__()


class Jaeger(_Server):
    """Jaeger with the shipped configuration. Traces are in memory, or on disk with ``badger``."""

    def __init__(self, folder, *, badger=None, prometheus="http://127.0.0.1:9"):
        names = ("OTLP_GRPC", "OTLP_HTTP", "UI", "GRPC", "HEALTH", "INTERNAL")
        *ports, self.counts = free_ports(len(names) + 1)
        ports = dict(zip(names, ports, strict=True))
        self.endpoint = f"http://127.0.0.1:{ports['OTLP_HTTP']}"
        self.grpc = f"127.0.0.1:{ports['OTLP_GRPC']}"
        self.url = f"http://127.0.0.1:{ports['UI']}"
        arguments = ["--config", str(EXPORTERS / "jaeger/jaeger.yaml")]
        if badger is not None:
            arguments += ["--config", str(EXPORTERS / "jaeger/badger.yaml")]
        self._process = Process(
            "jaeger",
            arguments,
            f"http://127.0.0.1:{ports['HEALTH']}/status",
            folder,
            {
                **{f"JAEGER_{name}_PORT": str(port) for name, port in ports.items()},
                "SPANMETRICS_PORT": str(self.counts),
                "SPANMETRICS_FLUSH": f"{FLUSH}s",
                "JAEGER_BADGER": str(badger),
                "PROMETHEUS_URL": prometheus,
            },
        )

    def traces(self, service, operation=""):
        """Return the traces of the service with a span named ``operation``, by trace id.

        A trace is a list of OTLP-JSON spans in the order of their start. The search by attributes
        needs the /api/v3 of a newer Jaeger than 2.13, so the caller filters by them.
        """
        now = time.time()
        answer = get(
            f"{self.url}/api/v3/traces",
            **{
                "query.service_name": service,
                "query.operation_name": operation,
                "query.start_time_min": _rfc3339(now - 3600),
                "query.start_time_max": _rfc3339(now + 60),
                "query.num_traces": 10000,
            },
        )
        found = {}
        for span in _spans(answer):
            found.setdefault(span["traceId"], []).append(span)
        return {
            trace: sorted(spans, key=lambda s: int(s["startTimeUnixNano"]))
            for trace, spans in found.items()
        }

    def trace(self, trace_id):
        """Return the spans of one trace, or [] if Jaeger does not have it."""
        return _spans(get(f"{self.url}/api/v3/traces/{trace_id}"))

    def search(self, service, **tags):
        """Return ids of traces with a span that has all these tags, as the UI finds them."""
        answer = get(f"{self.url}/api/traces", service=service, tags=json.dumps(tags), limit=10000)
        return {trace["traceID"] for trace in (answer or {}).get("data", [])}


def _rfc3339(seconds):
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _spans(answer):
    resources = ((answer or {}).get("result") or {}).get("resourceSpans", [])
    return [
        span
        for resource in resources
        for scope in resource.get("scopeSpans", [])
        for span in scope.get("spans", [])
    ]


def attributes(span):
    """Return the attributes of a span as plain data."""
    return {a["key"]: _plain(a["value"]) for a in span.get("attributes", [])}


def _plain(value):
    ((kind, content),) = value.items()
    return int(content) if kind == "intValue" else content


class Prometheus(_Server):
    """Prometheus with the shipped configuration and recording rules.

    Args:
        folder: for its files.
        counts: the port of the server that counts spans.
        itself: the port of the Collector's own metrics, if there is a Collector.
        port: the port of Prometheus.
        program: the command, ``prometheus`` or ``prometheus3``.
        vmagent: the port of a vmagent, if it is scraped.
        evaluation: seconds between two evaluations of the rules; 15 in the file we ship.
        otlp: whether its own OTLP receiver is on.
        config: changes of the shipped configuration, each (text, its replacement).
    """

    def __init__(
        self,
        folder,
        *,
        counts,
        itself=None,
        port=None,
        program="prometheus",
        vmagent=None,
        evaluation=SCRAPE,
        otlp=False,
        config=(),
    ):
        port = port or free_ports(1)[0]
        self.url = f"http://127.0.0.1:{port}"
        self.otlp = f"{self.url}/api/v1/otlp/v1/metrics"
        self._folder = folder
        text = (EXPORTERS / "prometheus/prometheus.yaml").read_text()
        for shipped, ours in (
            ("127.0.0.1:8889", f"127.0.0.1:{counts}"),
            ("127.0.0.1:8887", f"127.0.0.1:{itself or 8887}"),
            ("scrape_interval: 15s", f"scrape_interval: {SCRAPE:.0f}s"),
            ("evaluation_interval: 15s", f"evaluation_interval: {evaluation * 1000:.0f}ms"),
        ):
            assert shipped in text
            text = text.replace(shipped, ours)
        if vmagent:
            commented = re.search(r"( *# .*vmagent\n)(?: *# .*\n){2}", text)[0]
            used = commented.replace("# ", "", 3).replace("8429", str(vmagent))
            text = text.replace(commented, used)
        if otlp:
            commented = re.search(r"# otlp:\n(?:#  .*\n)+", text)[0]
            text = text.replace(commented, re.sub(r"(?m)^# ", "", commented))
        for before, after in config:
            assert before in text
            text = text.replace(before, after)
        self._config = folder / "prometheus.yaml"
        self._config.write_text(text)
        shutil.copytree(DASHBOARDS / "prometheus", folder / "rules")
        self._process = Process(
            program,
            [
                f"--config.file={self._config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--web.enable-remote-write-receiver",
                "--enable-feature=exemplar-storage",
                *(["--web.enable-otlp-receiver"] if otlp else []),
            ],
            f"{self.url}/-/ready",
            folder,
        )

    def stop_rules(self):
        """Evaluate no rule from now on, so that queries of the past have the whole machine."""
        text = self._config.read_text()
        self._config.write_text(text.replace("rules/*.yaml", "no-rules/*.yaml"))
        self._process.reload()
        rules = f"{self.url}/api/v1/rules"
        until(lambda: not get(rules)["data"]["groups"], what="the rules being stopped")

    def query(self, expression, at=None):
        """Return the result of the expression: {labels as a frozenset of pairs: value}."""
        parameters = {"query": expression, **({} if at is None else {"time": f"{at:.3f}"})}
        answer = get(f"{self.url}/api/v1/query", **parameters)
        assert answer["status"] == "success"
        return {
            frozenset(series["metric"].items()): float(series["value"][1])
            for series in answer["data"]["result"]
        }

    def exemplars(self, expression, seconds=3600):
        """Return the exemplars of the series, each as (labels of the series, exemplar)."""
        now = time.time()
        answer = get(
            f"{self.url}/api/v1/query_exemplars", query=expression, start=now - seconds, end=now
        )
        return [
            (series["seriesLabels"], exemplar)
            for series in answer["data"]
            for exemplar in series["exemplars"]
        ]


class Collector(_Server):
    """The Collector for a fleet with the shipped configuration; clean calls are not kept.

    Args:
        folder: for its files.
        traces: the address of Jaeger.
        prometheus: the URL of the server that it writes the agents' own metrics to.
        others: the URLs of more such servers.
        config: another configuration.
        environment: more variables.
    """

    def __init__(self, folder, *, traces, prometheus, others=(), config=None, environment=None):
        names = ("OTLP_GRPC", "OTLP_HTTP", "HEALTH", "INTERNAL")
        *ports, self.counts = free_ports(len(names) + 1)
        ports = dict(zip(names, ports, strict=True))
        self.endpoint = f"http://127.0.0.1:{ports['OTLP_HTTP']}"
        self.itself = ports["INTERNAL"]
        config = config or EXPORTERS / "collector/collector.yaml"
        arguments = ["--config", str(config)]
        if others:
            shipped = yaml.safe_load(config.read_text())
            write = shipped["exporters"]["prometheus_remote_write"]
            more = {
                f"prometheus_remote_write/{n}": {**write, "endpoint": f"{url}/api/v1/write"}
                for n, url in enumerate(others)
            }
            metrics = {"exporters": ["prometheus_remote_write", *more]}
            overlay = {"exporters": more, "service": {"pipelines": {"metrics": metrics}}}
            (folder / "others.json").write_text(json.dumps(overlay))
            arguments += ["--config", str(folder / "others.json")]
        self._process = Process(
            "otelcol",
            arguments,
            f"http://127.0.0.1:{ports['HEALTH']}/status",
            folder,
            {
                **{f"COLLECTOR_{name}_PORT": str(port) for name, port in ports.items()},
                "SPANMETRICS_PORT": str(self.counts),
                "SPANMETRICS_FLUSH": f"{FLUSH}s",
                "DECISION_WAIT": "1s",
                "KEEP_PERCENT": "0",
                "COLLECTOR_QUEUE": str(folder / f"queue-{self.itself}"),
                "TRACES_ENDPOINT": traces,
                "PROMETHEUS_URL": prometheus,
                **(environment or {}),
            },
        )

    def kill(self):
        """End the Collector with a SIGKILL. It can be started again, with the same ports."""
        self._process.kill()


class VMAgent(_Server):
    """Vmagent with the shipped aggregation; it writes to Prometheus each second."""

    INTERVAL = 1
    """Seconds between two outputs; 15 in the file we ship."""
    IGNORED = 3
    """Seconds in which a first sample is no increase; 30 in the file we ship."""

    def __init__(self, folder, *, prometheus):
        (self.port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        text = (EXPORTERS / "vmagent/aggregation.yaml").read_text()
        for shipped, ours in (
            ("127.0.0.1:8429", f"127.0.0.1:{self.port}"),
            ("interval: 15s", f"interval: {self.INTERVAL}s"),
            ("ignore_first_sample_interval: 30s", f"ignore_first_sample_interval: {self.IGNORED}s"),
        ):
            assert shipped in text
            text = text.replace(shipped, ours)
        (folder / "aggregation.yaml").write_text(text)
        self._process = Process(
            "vmagent",
            [
                f"-streamAggr.config={folder / 'aggregation.yaml'}",
                "-remoteWrite.forcePromProto",
                f"-remoteWrite.url={prometheus}/api/v1/write",
                f"-remoteWrite.tmpDataPath={folder / 'vmagent'}",
                f"-httpListenAddr=127.0.0.1:{self.port}",
            ],
            f"{self.url}/-/ready",
            folder,
        )

    def kill(self):
        """End vmagent with a SIGKILL. It can be started again, on the same port."""
        self._process.kill()
