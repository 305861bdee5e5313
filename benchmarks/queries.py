# SPDX-License-Identifier: Apache-2.0
"""What the dashboards' queries cost: each panel over thirty days, on a real Prometheus.

A made-up fleet of 20 providers (queries_fleet.py), in two parts. The recorded series, and the
counts from spans that some panels read, are there for all the days. Agents that count for
themselves are there for the last hours only: of each provider 200 processes at any time, each a
call of ten minutes that sends its metrics once a minute. When it ends another process, and so
other series, takes its place. Thirty days of that would be 17 million processes.

Each panel's queries are sent as Grafana would send them (1,000 points wide where the panel does not
say; all providers, on the provider dashboard one), one after the other, three times. Then over the
agents' hours, with and without recorded series: for "raw" each recorded name is replaced by what
its rule counts, taken over the panel's window at once. That is less work than the rules' own steps
would be.

Building took 25 minutes on two busy CPUs; what was built is kept in ~/.cache/traced-retry/queries,
1 GB. Needed: prometheus and promtool. Exit status 1 where a panel over all the days takes more than
a second (the median of the three), or finds nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass

from queries_fleet import DASHBOARDS, DAY, HOUR, LAST, NAME, PROVIDERS, RULES, build, seconds

LIMIT = 1.0
POINTS = 1_000
STEPS = {7.5: 5, 12.5: 10, 17.5: 15, 25: 20, 45: 30, 90: 60, 210: 120, 450: 300, 750: 600}
STEPS |= {1_050: 900, 1_500: 1_200, 2_700: 1_800, 5_400: 3_600, 9_000: 7_200, 16_200: 10_800}
"""How Grafana rounds the seconds between two points: {below: to}."""


# --- what Grafana would send ------------------------------------------------------------------


@dataclass
class Panel:
    """A panel, or what else asks Prometheus when a dashboard is opened."""

    board: str
    name: str
    provider: str
    queries: list[dict]
    points: int = POINTS


def panels():
    """All of them, and how the ``rollup`` variable is asked for: ([Panel], query)."""
    found, rollup = [], ""
    for path in sorted((DASHBOARDS / "grafana").glob("*.json")):
        board = json.loads(path.read_text())
        one = path.stem == "provider"
        for panel in itertools.chain(*(row.get("panels") or [row] for row in board["panels"])):
            queries = [each for each in panel.get("targets", []) if "expr" in each]
            # Of a repeated panel there is one for each provider.
            provider = PROVIDERS[0] if one or "repeat" in panel else ".*"
            name = f"{panel['id']} {panel['title']}".replace("$provider", "(one provider)")
            if queries:
                points = panel.get("maxDataPoints") or POINTS
                found.append(Panel(path.stem, name, provider, queries, points))
        for each in board["annotations"]["list"]:
            query = {"expr": each["expr"], "interval": each["step"]}
            found.append(Panel(path.stem, "annotations", ".*", [query]))
        for each in board.get("templating", {}).get("list", []):
            if each["name"] == "rollup":
                rollup = each["query"]["query"].removeprefix("query_result(")[:-1]
            elif each["type"] == "query":
                query = {"values": each["query"]["query"]}
                found.append(Panel(path.stem, f"variable {each['name']}", PROVIDERS[0], [query]))
    return found, rollup


def request(query, panel, rollup, start, end):
    """What Grafana sends for one of a panel's queries: (path, parameters)."""
    span, provider = end - start, panel.provider
    if "values" in query:
        metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", query["values"]).groups()
        match = (
            metric.replace("$provider", provider)
            .replace("$environment", ".*")
            .replace("$initiator", ".*")
        )
        return f"label/{label}/values", {"match[]": match, "start": start, "end": end}
    apart = seconds((query.get("interval") or "15s").replace("$rollup", rollup))
    rounded = next((step for below, step in STEPS.items() if span / panel.points < below), DAY)
    step = max(rounded, apart, -(-span // 11_000))
    interval = max(step + apart, 4 * apart)
    expression = query["expr"]
    for name, value in {
        "$__rate_interval_ms": f"{interval}000",
        "$__rate_interval": f"{interval}s",
        "$__range": f"{span}s",
        "$rollup": rollup,
        "$provider": provider,
        "$environment": ".*",
        "$initiator": ".*",
        "$model": ".*",
        "$code": ".*",
    }.items():
        expression = expression.replace(name, value)
    if query.get("instant"):
        return "query", {"query": expression, "time": end}
    start, end = start // step * step, end // step * step
    return "query_range", {"query": expression, "start": start, "end": end, "step": step}


# --- the same without recorded series ---------------------------------------------------------

OWN = r"(?<![:\w])(?:traces_span_metrics|traced_retry)_\w*?(?:total|bucket|sum|in_flight|remaining)"
BRACES = r"(?:\{([^}]*)\})?"


def definition(name, matchers, window=0):
    """What the rule of ``name`` counts, narrowed to what matches, over ``window`` seconds."""
    expression = RULES[name][0]["expr"]
    if finer := re.fullmatch(rf"sum_over_time\(({NAME})\[\w+\]\)", expression):
        return definition(finer[1], matchers, window)
    minute = re.fullmatch(r"15 \* sum_over_time\((.*)\[59s999ms:15s\]\)", expression, re.DOTALL)
    if minute:
        expression = minute[1]
    if window:
        expression = expression.replace("[5m]", f"[{window}s]").replace("/ 300", f"/ {window}")
        expression = expression.replace("offset 5m", f"offset {window}s")

    def both(its):
        return ", ".join(filter(None, [its, matchers]))

    expression = re.sub(
        rf"({OWN})\b{BRACES}", lambda own: f"{own[1]}{{{both(own[2])}}}", expression
    )
    return "({})".format(
        re.sub(
            rf"({NAME}){BRACES}",
            lambda inner: definition(inner[1], both(inner[2]), window),
            expression,
        )
    )


def raw(expression):
    """The query without recorded counts and gauges; ratios and constants stay."""

    def counted(match):
        window = seconds(match[3])
        return f"({window} * {definition(match[1], match[2], window)})"

    expression = re.sub(rf"sum_over_time\(({NAME}){BRACES}\[(\w+)\]\)", counted, expression)
    return re.sub(
        rf"((?:[a-z]+:)?traced_retry\w*:(?:\w+:)?(?:sum|min|count))\b{BRACES}",
        lambda gauge: definition(gauge[1], gauge[2]),
        expression,
    )


# --- asking -----------------------------------------------------------------------------------


class Prometheus:
    """A real one, on a free port of 127.0.0.1."""

    def __init__(self, folder, days, timeout):
        self.timeout = timeout
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.url = f"http://{address}/api/v1"
        (folder / "prometheus.yaml").write_text("global: {}\n")
        command = [
            shutil.which("prometheus"),
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--storage.tsdb.retention.time={days + 5}d",
            f"--query.timeout={timeout}s",
            f"--web.listen-address={address}",
        ]
        self.log = (folder / "prometheus.log").open("w")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)  # noqa: S603

    def __enter__(self):
        while self.ask("query", {"query": "vector(1)"})[2]:
            if self.process.poll() is not None:
                sys.exit(f"prometheus ended: see {self.log.name}")
            time.sleep(0.2)
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        self.log.close()

    def ask(self, path, parameters):
        """(seconds, what was found, what went wrong)."""
        url = f"{self.url}/{path}?{urllib.parse.urlencode(parameters)}"
        began = time.perf_counter()
        try:
            with urllib.request.urlopen(url, timeout=10 * self.timeout) as response:  # noqa: S310
                body = response.read()
        except urllib.error.HTTPError as error:
            # Until it is ready it answers in plain words.
            said = error.read().decode()
            wrong = json.loads(said)["error"] if said.startswith("{") else said
            return time.perf_counter() - began, [], wrong
        except OSError as error:
            return time.perf_counter() - began, [], str(error)
        took = time.perf_counter() - began
        data = json.loads(body)["data"]
        return took, data["result"] if isinstance(data, dict) else data, ""


def measured(server, panel, rollup, start, end, *, times=3, without=False):
    """A panel's queries one after the other, in seconds: (median, worst, what went wrong)."""
    resolution = "1m"
    if rollup:
        asked = {"query": rollup.replace("$__range_s", str(end - start)), "time": end}
        resolution = server.ask("query", asked)[1][0]["metric"]["rollup"]
    runs, wrong, found = [], "", []
    while len(runs) < times and not wrong:
        took = 0.0
        for query in panel.queries:
            path, parameters = request(query, panel, resolution, start, end)
            if without:
                parameters["query"] = raw(parameters["query"])
            one, answer, error = server.ask(path, parameters)
            took, found, wrong = took + one, found + answer, error
            if wrong:
                break
        runs.append(took)
    return statistics.median(runs), max(runs), wrong or ("" if found else "nothing found")


def without_rules(server, panel, rollup, end):
    """How long the raw series take, as told."""
    found = ""
    expressions = " ".join(query.get("expr", "") for query in panel.queries)
    if re.search(r":(increase\S+?\{|sum|min|count\b)", expressions):
        took, _, wrong = measured(server, panel, rollup, LAST, end, times=1, without=True)
        found = told(took, wrong, server.timeout)
    elif "traces_span" in expressions:
        found = "the same"
    print(f"{panel.board}: {panel.name}: raw: {found}", file=sys.stderr)
    return found


def price_of_rules(server, end):
    """What one evaluation costs of each rule that reads the raw series."""
    for name, (rule, *_) in RULES.items():
        if re.search(rf"{OWN}\b", rule["expr"]):
            took, _, wrong = server.ask("query", {"query": rule["expr"], "time": end})
            price = f"{told(took, wrong, server.timeout)}, every {rule['apart']} s"
            yield f"{f'rule {name}'[:76]:<78}{price:>20}"


def told(median, wrong, timeout):
    late = "timed out" in wrong or "deadline" in wrong
    return f"over {timeout} s" if late else wrong or f"{median * 1000:,.0f}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--days", type=int, default=30, help="of recorded series (default: 30)")
    need = "promtool needs 10 GB of memory for each and the disk 8 GB, for a while (default: 1)"
    parser.add_argument("--raw-hours", type=int, default=1, help=f"of the agents' series; {need}")
    late = "seconds after which a query is given up, and told as that (default: 20)"
    parser.add_argument("--timeout", type=int, default=20, help=late)
    options = parser.parse_args()
    days, hours = options.days, options.raw_hours
    for name in ("prometheus", "promtool"):
        if not shutil.which(name):
            parser.error(f"there is no {name} here; get it with: apt-get install prometheus")
    folder, end = build(days, hours), LAST + hours * HOUR
    asked, rollup = panels()
    began = f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} when this began."
    with Prometheus(folder, days, options.timeout) as server:
        long = [measured(server, each, rollup, end - days * DAY, end) for each in asked]
        short = [measured(server, each, rollup, LAST, end) for each in asked]
        # Afterwards, for what these leave in memory slows the others down.
        beside = [without_rules(server, each, rollup, end) for each in asked]
        rules = list(price_of_rules(server, end))
    print(
        f"{began} In milliseconds: recorded series over\n{days} days (at most {LIMIT * 1000:,.0f})"
        f" and over the agents' hours ({hours}), median and worst of three; raw series once.\n"
        f"{'':<56}{f'{days} d':>8}{'worst':>7}{f'{hours} h':>8}{'worst':>7}{f'raw {hours} h':>12}"
    )
    over = 0
    for panel, (took, worst, wrong), (soon, soon_worst, _), raw_ in zip(
        asked, long, short, beside, strict=True
    ):
        bad = wrong or took > LIMIT
        over += bool(bad)
        name = f"{panel.board}: {panel.name}"
        print(
            f"{name[:55]:<56}{told(took, wrong, options.timeout):>8}{worst * 1000:>7,.0f}"
            f"{soon * 1000:>8,.0f}{soon_worst * 1000:>7,.0f}{raw_:>12}{'  OVER' if bad else ''}"
        )
    for board in ("overview", "provider"):
        took = sum(one[0] for panel, one in zip(asked, long, strict=True) if panel.board == board)
        print(f"{f'{board}: all of these, one after the other':<56}{took * 1000:>8,.0f}")
    print("\n".join(rules))
    print(f"each in under {LIMIT:g} s over {days} days: {f'{over} BROKEN' if over else 'kept'}")
    sys.exit(bool(over))


if __name__ == "__main__":
    main()
