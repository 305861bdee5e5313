# SPDX-License-Identifier: Apache-2.0
"""The cost of the rules if 4,000 processes push their own metrics: each for itself, and added up.

Of each of 20 providers 200 processes push the metrics of one call every 15 s for six minutes. Each
push goes to two Prometheus servers: through a vmagent that passes it on, and through a vmagent with
exporters/vmagent/aggregation.yaml. Then each rule is evaluated once on both.

Times are CPU seconds of the servers, so that other programs on the machine hardly matter. Needed:
prometheus, and vmagent (python tools/backends/build.py vmagent).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

import yaml
from queries_fleet import PROCESSES, PROVIDERS, process, series

ROOT = Path(__file__).parents[1]
BACKENDS = Path(
    os.environ.get("TRACED_RETRY_BACKENDS") or Path.home() / ".cache/traced-retry/backends"
)
INTERVAL = 15
GAUGES = ("in_flight", "budget_remaining")
TICKS = os.sysconf("SC_CLK_TCK")


class Server:
    """A server on a free port; ended by its process id."""

    def __init__(self, command, port, ready):
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(  # noqa: S603 - our own commands
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(self.url + ready, timeout=5).close()  # noqa: S310 - ours
                return
            if time.monotonic() > deadline:
                sys.exit(f"{command[0]} did not start within 60 s")
            time.sleep(0.1)

    @property
    def cpu(self):
        """The CPU seconds that it has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    @property
    def memory(self):
        """The most memory that it has used, in GB."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024**2

    def close(self):
        """End the server."""
        self._process.terminate()
        self._process.wait()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(stack, folder, *, aggregated):
    """Start a Prometheus with a vmagent before it."""
    folder.mkdir()
    port, agent = free_port(), free_port()
    config = {
        "global": {"scrape_interval": f"{INTERVAL}s"},
        "scrape_configs": [
            {
                "job_name": "vmagent",
                "static_configs": [{"targets": [f"127.0.0.1:{agent}"]}],
                "metric_relabel_configs": [
                    {"action": "drop", "source_labels": ["__name__"], "regex": ".+"}
                ],
            }
        ],
    }
    (folder / "prometheus.yaml").write_text(json.dumps(config))
    prometheus = Server(
        [
            shutil.which("prometheus"),
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--web.enable-remote-write-receiver",
            "--query.timeout=20m",
        ],
        port,
        "/-/ready",
    )
    stack.callback(prometheus.close)
    options = []
    if aggregated:
        text = (ROOT / "exporters/vmagent/aggregation.yaml").read_text()
        (folder / "aggregation.yaml").write_text(text.replace("8429", str(agent)))
        options = [f"-streamAggr.config={folder / 'aggregation.yaml'}"]
    vmagent = Server(
        [
            str(BACKENDS / "bin/vmagent"),
            *options,
            "-remoteWrite.forcePromProto",
            f"-remoteWrite.url=http://127.0.0.1:{port}/api/v1/write",
            f"-remoteWrite.tmpDataPath={folder / 'vmagent'}",
            f"-httpListenAddr=127.0.0.1:{agent}",
        ],
        agent,
        "/-/ready",
    )
    stack.callback(vmagent.close)
    return prometheus, vmagent


def lines(processes):
    """Return the series of all processes: [(name and labels, value at the end of the call)]."""
    of = {True: process(retried=True), False: process(retried=False)}
    found = []
    for number in range(processes):
        provider = PROVIDERS[number % len(PROVIDERS)]
        own = {
            "gen_ai_provider_name": provider,
            "job": "agent",
            "instance": f"process-{number}",
            "deployment_environment_name": "production",
        }
        for name, labels, value in of[number % 5 == 0]:
            found.append((series(name, labels | own), value, name.endswith(GAUGES)))
    return found


def push(vmagent, text):
    request = urllib.request.Request(  # noqa: S310 - ours
        f"{vmagent.url}/api/v1/import/prometheus", text
    )
    urllib.request.urlopen(request, timeout=120).close()  # noqa: S310 - ours


def ask(prometheus, query):
    body = urllib.parse.urlencode({"query": query, "timeout": "20m"}).encode()
    with urllib.request.urlopen(  # noqa: S310 - ours
        f"{prometheus.url}/api/v1/query", body, timeout=1200
    ) as response:
        return json.load(response)["data"]["result"]


def number_of_series(prometheus):
    """Return the number of our series."""
    found = ask(prometheus, 'count({__name__=~"traced_retry_.+"})')
    return f"{float(found[0]['value'][1]):,.0f}"


def replies(prometheus):
    """Return the replies that Prometheus has, whichever process counted them."""
    found = ask(prometheus, 'sum(traced_retry_replies_total{traced_retry_operation=""})')
    return float(found[0]["value"][1]) if found else 0.0


def groups():
    """Yield the groups of the recording rules: (name, seconds between evaluations, rules)."""
    for name in ("recording", "rollup"):
        document = yaml.safe_load((ROOT / f"dashboards/prometheus/{name}.yaml").read_text())
        group = document["groups"][0]
        yield group["name"], group.get("interval", f"{INTERVAL}s"), group["rules"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=6, help="of pushes (default: 6)")
    default = PROCESSES * len(PROVIDERS)
    parser.add_argument("--processes", type=int, default=default, help=f"(default: {default:,})")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    sent = lines(options.processes)
    pushes = max(2, round(options.minutes * 60 / INTERVAL))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pairs = [start(stack, folder / name, aggregated=name == "b") for name in "ab"]
        began = time.monotonic()
        for number in range(pushes + 1):
            share = number / pushes
            text = "\n".join(
                f"{head}{value if gauge else round(value * share)}" for head, value, gauge in sent
            ).encode()
            for _, vmagent in pairs:
                push(vmagent, text)
            time.sleep(max(0, began + (number + 1) * INTERVAL - time.monotonic()))
        truth = sum(v for head, v, _ in sent if head.startswith("traced_retry_replies_total{"))
        deadline = time.monotonic() + 300
        while any(replies(each) != truth for each, _ in pairs) and time.monotonic() < deadline:
            time.sleep(1)
        rows = [
            ("series of traced_retry", [number_of_series(each) for each, _ in pairs]),
            ("replies, of " + f"{truth:,.0f}", [f"{replies(each):,.0f}" for each, _ in pairs]),
            ("Prometheus: CPU seconds of the pushes", [f"{each.cpu:.1f}" for each, _ in pairs]),
            ("vmagent: CPU seconds", [f"{each.cpu:.1f}" for _, each in pairs]),
        ]
        for name, interval, rules in groups():
            prices = []
            for prometheus, _ in pairs:
                before = prometheus.cpu
                for rule in rules:
                    ask(prometheus, rule["expr"])
                prices.append(f"{prometheus.cpu - before:.2f}")
            rows.append((f"{name}, due each {interval}: CPU seconds", prices))
        rows.append(("Prometheus: memory, GB", [f"{each.memory:.2f}" for each, _ in pairs]))
        rows.append(("vmagent: memory, GB", [f"{each.memory:.2f}" for _, each in pairs]))
    minutes = pushes * INTERVAL / 60
    print(f"{os.cpu_count()} CPUs, load {load:.1f} when this began.", end=" ")
    print(f"{options.processes:,} processes, {minutes:g} minutes.")
    print(f"{'':<54}{'each':>10}{'added up':>10}")
    for name, (each, added) in rows:
        print(f"{name:<54}{each:>10}{added:>10}")


if __name__ == "__main__":
    main()
