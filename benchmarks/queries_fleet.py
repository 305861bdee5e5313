# SPDX-License-Identifier: Apache-2.0
"""The made-up fleet of ``queries.py``, as blocks of a Prometheus.

The recorded series are those that the dashboards read, with each combination of labels that a
provider can have, at the interval of their rules. A tenth of a busy one's values repeats; one of
failures is 0 most of the time. What a process counts is what our own telemetry counts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import yaml
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import CollectorRegistry

from traced_retry import semconv
from traced_retry.core.attempt import Attempt
from traced_retry.core.failure import failure
from traced_retry.core.telemetry import Target, Telemetry

DASHBOARDS = Path(__file__).parents[1] / "dashboards"
CACHE = Path.home() / ".cache/traced-retry/queries"
HOUR, DAY = 3_600, 86_400
BLOCK = 54 * HOUR
"""What Prometheus itself compacts to where it keeps thirty days."""
LAST = 9_000 * BLOCK
"""Seconds since 1970: where the days' blocks end and the agents' hours begin."""

PROCESSES, CALL, PUSH = 200, 600, 60
"""Of each provider so many processes at any time, each a call of so many seconds, which sends its
metrics so often."""
PROVIDERS = ["openai", *(f"provider-{number:02}" for number in range(2, 21))]
ENVIRONMENTS = ["production"]
MODELS = ["a-model", "another-model"]
BOUNDS = [*map(str, semconv.DURATION_BUCKETS), "+Inf"]
REPLIES = [("succeeded", ""), ("recovered", "")]
REPLIES += [(outcome, reason) for reason, outcome in semconv.OUTCOME_OF.items()]
ZEROED = ["timeout", "connection_lost", "server_error", "rate_limit_exceeded"]
"""Codes that a process begins at 0 for each action; of a request there are these too:"""
REQUESTS = ["engine_overloaded", "_OTHER"]
REFUSED = ["invalid_api_key", "insufficient_quota", "invalid_request_error"]


def attempts():
    """What an attempt's labels can be: (action, result, code, recoverable)."""
    for action, result in itertools.product(semconv.ACTIONS, semconv.RESULTS):
        if result != "failed":
            yield action, result, "", ""
            continue
        for code in ZEROED + REQUESTS * (action == "send"):
            yield action, result, code, "true"
        for code in REFUSED * (action == "send"):
            yield action, result, code, "false"


ATTEMPT = ("traced_retry_action", "traced_retry_result", "error_type", "traced_retry_recoverable")
AXES = [
    (("gen_ai_provider_name",), [(name,) for name in PROVIDERS]),
    (("deployment_environment_name",), [(name,) for name in ENVIRONMENTS]),
    (("gen_ai_request_model",), [(name,) for name in MODELS]),
    (("traced_retry_outcome", "traced_retry_stop_reason"), REPLIES),
    (ATTEMPT, list(attempts())),
    (("traced_retry_exporter",), [("otlp",), ("local_store",)]),
    (("traced_retry_drop_reason",), [(reason,) for reason in semconv.DROP_REASONS]),
    (("le",), [(bound,) for bound in BOUNDS]),
]


def combined(labels):
    """Every set of values that these labels can have together."""
    axes = []
    for names, values in AXES:
        kept = [at for at, name in enumerate(names) if name in labels]
        axes.append(dict.fromkeys(tuple((names[at], of[at]) for at in kept) for of in values))
    return [dict(itertools.chain(*each)) for each in itertools.product(*axes)]


# --- what is in the blocks --------------------------------------------------------------------


def read_rules():
    """{recorded name: its rules}, each with the seconds between two samples."""
    found = {}
    for path in sorted((DASHBOARDS / "prometheus").glob("*.yaml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            apart = seconds(group.get("interval", "15s"))
            for rule in group["rules"]:
                if "record" in rule:
                    found.setdefault(rule["record"], []).append(rule | {"apart": apart})
    return found


def seconds(text):
    return int(text[:-1]) * {"s": 1, "m": 60, "h": HOUR, "d": DAY}[text[-1]]


RULES = read_rules()
NAME = r"\b(?:[a-z]+:)?traced_retry\w*:\w+(?::\w+)?"


def labels_of(name):
    """The labels of a recorded series: those its rule keeps, of those there were to keep."""
    expression = RULES[name][0]["expr"]
    found = re.search(r" by \(([^)]*)\)", expression)
    kept = set(re.split(r",\s*", found[1])) if found else None
    for inner in re.findall(NAME, expression):
        kept = labels_of(inner) if kept is None else labels_of(inner) & kept
    return kept or set()


_rng = random.Random(6)
BUSY = [f"{_rng.randrange(1, 400) / 5:g}" for _ in range(4 * DAY)]
FAILURES = []
while len(FAILURES) < 4 * DAY:  # What is averaged over five minutes is in five samples.
    FAILURES += [f"{_rng.randrange(1, 4) / 5:g}" if _rng.random() < 0.02 else "0"] * 5
COUNT = list(itertools.accumulate(_rng.choices((0, 1, 2, 9), k=DAY)))
COUNT_OF_FAILURES = list(itertools.accumulate(_rng.choices((0, 1), (50, 1), k=DAY)))


def failed(labels):
    names = ("traced_retry_outcome", "traced_retry_result", "traced_retry_drop_reason")
    return any(labels.get(name, "succeeded") != "succeeded" for name in names)


def recorded():
    """What the dashboards read of what the rules record: (name, labels, seconds apart, values)."""
    read = "".join(path.read_text() for path in (DASHBOARDS / "grafana").glob("*.json"))
    # One query asks for these by a pattern.
    of_pattern = {name for name in RULES if name.startswith("provider:traced_retry_lost:")}
    asked = tuple(of_pattern | set(re.findall(NAME, read)))
    # In front of a variable there is but the beginning of a name.
    for name in sorted(name for name in RULES if name.startswith(asked)):
        for rule in RULES[name]:
            if rule["expr"].startswith("vector("):
                values = [rule["expr"][len("vector(") : -1]] * DAY
                yield name, rule.get("labels", {}), rule["apart"], values
                continue
            for labels in combined(labels_of(name)):
                yield name, labels, rule["apart"], FAILURES if failed(labels) else BUSY
    for job in ("traced-retry-spans", "collector", "livekit-workers"):
        yield "up", {"job": job, "instance": "127.0.0.1:8889"}, 15, ["1"] * DAY


def from_spans(*, everything):
    """Counts from spans; only the raw queries need those of attempts, and histograms."""
    both = {"gen_ai_provider_name", "deployment_environment_name"}
    of_reply = both | {"traced_retry_outcome"}
    of_attempt = both | set(ATTEMPT) - {"traced_retry_recoverable"}
    calls, seconds_ = "traces_span_metrics_calls_total", "traces_span_metrics_duration_seconds"
    reply, attempt = "generate_reply", "generate_reply.attempt"
    wanted = [(calls, reply, of_reply | {"gen_ai_request_model", "traced_retry_stop_reason"})]
    if everything:
        more = {"gen_ai_request_model", "traced_retry_recoverable"}
        wanted.append((calls, attempt, of_attempt | more))
        for span, labels in ((reply, of_reply), (attempt, of_attempt)):
            wanted.append((f"{seconds_}_bucket", span, labels | {"le"}))
            wanted.append((f"{seconds_}_sum", span, labels))
    target = {"job": "traced-retry-spans", "instance": "127.0.0.1:8889", "service_name": "agent"}
    for name, span, names in wanted:
        of_span = target | {"span_name": span, "status_code": "STATUS_CODE_UNSET"}
        for labels in combined(names):
            yield name, of_span | labels, 15, COUNT_OF_FAILURES if failed(labels) else COUNT


def process(*, retried):
    """What a call of ten replies counts, by our own telemetry: [(name, labels, value at its end)].

    Args:
        retried: whether the first of them needs a second attempt.
    """
    registry = CollectorRegistry()
    meters = MeterProvider([PrometheusMetricReader(registry=registry)])
    telemetry = Telemetry(meter_provider=meters)
    telemetry.initialize_counters("openai", semconv.ACTIONS)
    for number in range(10):
        second = retried and number == 0
        reply = telemetry.reply(Target("openai", MODELS[0]))
        reply.begin(0.0, 0.0)
        if second:
            lost = Attempt(1, "send", 0.0, 0.0, 0.0)
            reply.attempt_began(lost)
            lost.result, lost.failure = "failed", failure(RuntimeError(), "timeout")
            reply.attempt_ended(lost, 0.4)
            reply.waited(0.1)
        heard = Attempt(1 + second, "send", 0.1 * second, 0.0, 0.0)
        reply.attempt_began(heard)
        reply.attempt_ended(heard, 0.4)
        reply.end(None, 0.4 + 0.5 * second, None)
    samples = [sample for family in registry.collect() for sample in family.samples]
    meters.shutdown()
    found = [(each.name, each.labels, each.value) for each in samples if "traced" in each.name]
    # Of the whole process; it is asked for these by callbacks.
    provider = {"gen_ai_provider_name": "openai"}
    found.append(("traced_retry_budget_remaining", provider, 5.0))
    found.append(("traced_retry_export_dropped_total", {"traced_retry_exporter": "otlp"}, 0.0))
    return found


# --- writing them -----------------------------------------------------------------------------


def series(name, labels):
    inside = ",".join(f'{label}="{value}"' for label, value in labels.items() if value)
    return f"{name}{{{inside}}} "


def write_block(folder, start, end, *, agents=False):
    """The block of [start, end), first as text; with ``agents`` those who count for themselves."""
    rng = random.Random(start)
    text = folder / f"{start}.txt"
    count = 0
    with text.open("w", encoding="ascii") as file:
        for name, labels, apart, values in itertools.chain(
            recorded(), from_spans(everything=agents)
        ):
            stamps = [f" {at}\n" for at in range(start, end, apart)]
            first = rng.randrange(len(values) - len(stamps))
            some = values[first : first + len(stamps)]
            if name.startswith("traces_"):
                base = (start - LAST) * 10 + 10**9  # From block to block it grows.
                some = [str(base + some[at // 2]) for at in range(len(stamps))]  # Flushed: 30 s
            head = series(name, labels)
            file.write("".join([head + v + at for v, at in zip(some, stamps, strict=True)]))
            count += 1
        for provider in PROVIDERS:  # An hour of an alert each day
            labels = {"alertname": "TracedRetryExhaustionBurn", "alertstate": "firing"}
            head = series("ALERTS", labels | {"gen_ai_provider_name": provider})
            for at in range(start, end, 15):
                if at % DAY < HOUR:
                    file.write(f"{head}1 {at}\n")
            count += 1
        if agents:
            count += write_processes(file, start, end)
        file.write("# EOF\n")
    promtool(text, folder / "data", 2 if agents else BLOCK // HOUR)
    text.unlink()
    return count


def write_processes(file, start, end):
    """The agents' own series; their calls begin evenly over the time that one takes."""
    clean, retried = process(retried=False), process(retried=True)
    count = 0
    for number, provider in itertools.product(range(PROCESSES), PROVIDERS):
        for call, began in enumerate(range(start - number * CALL // PROCESSES, end, CALL)):
            pushed = [at for at in range(began + PUSH, began + CALL + 1, PUSH) if start <= at < end]
            own = {
                "gen_ai_provider_name": provider,
                "job": "agent",
                "instance": f"{provider}-{number}-{call}",
                "deployment_environment_name": ENVIRONMENTS[0],
            }
            # One reply in fifty of ten a call is not heard at once.
            for name, labels, last in clean if (number + call) % 5 else retried:
                head = series(name, labels | own)
                gauge = name.endswith(("in_flight", "remaining"))
                grown = [last if gauge else last * (at - began) / CALL for at in pushed]
                file.write(
                    "".join(f"{head}{v:g} {at}\n" for v, at in zip(grown, pushed, strict=True))
                )
                count += bool(pushed)
    return count


def promtool(text, target, hours):
    longest = f"--max-block-duration={hours}h"
    command = [shutil.which("promtool"), "tsdb", "create-blocks-from", longest, "openmetrics"]
    made = subprocess.run(  # noqa: S603 - promtool, as found on the path
        [*command, text, target], capture_output=True, text=True, check=False
    )
    if made.returncode:
        sys.exit(f"promtool: {made.stderr}")


def build(days, hours):
    """The folder whose ``data`` has the blocks; made if it is not there yet.

    Args:
        days: how many of recorded series, the hours included.
        hours: how many of the agents' own.
    """
    told = json.dumps([days, hours, Path(__file__).read_text(), RULES], sort_keys=True)
    folder = CACHE / hashlib.sha256(told.encode()).hexdigest()[:12]
    if (folder / "done").exists():
        return folder
    shutil.rmtree(CACHE, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    start, end = LAST + hours * HOUR - days * DAY, LAST + hours * HOUR
    edges = [start, *range(start // BLOCK * BLOCK + BLOCK, LAST + 1, BLOCK)]
    began = time.monotonic()
    with ProcessPoolExecutor(2) as pool:
        jobs = [pool.submit(write_block, folder, LAST, end, agents=True)]
        jobs += [pool.submit(write_block, folder, *of) for of in itertools.pairwise(edges)]
        for number, job in enumerate(jobs, 1):
            note = f"block {number} of {len(jobs)}: {job.result():,} series"
            print(f"{note}, {time.monotonic() - began:.0f} s", file=sys.stderr)
    (folder / "done").touch()
    return folder
