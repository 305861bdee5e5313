# SPDX-License-Identifier: Apache-2.0
"""Retries as one finds them in a real Jaeger, before and after it is restarted."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from backends.agent import Job
from backends.fleet import play, truth
from backends.reading import from_spans, settle
from backends.servers import ROOT, Jaeger, Prometheus, attributes, command

from traced_retry import semconv

SERVICE = "support"
EXAMPLE = "example"
CALLS = [
    (Job("openai", 2), "ok,error:server_error,ok"),
    (Job("openai"), "error:rate_limit_exceeded"),
    (Job("ultravox", patience=0.5), "silence"),
]
CODE = "rate_limit_exceeded"


@pytest.fixture(scope="module")
def jaegers(tmp_path_factory):
    """Three calls into a Jaeger with badger, which Prometheus scrapes; then the same one anew.

    Both are asked the same, and the first is gone by then: what each found, and what was counted.
    """
    for name in ("jaeger", "prometheus"):
        command(name)
    folder = tmp_path_factory.mktemp("jaeger")
    found = {}
    with contextlib.ExitStack() as stack:
        jaeger = stack.enter_context(Jaeger(folder, badger=folder / "badger"))
        prometheus = stack.enter_context(Prometheus(folder, counts=jaeger.counts))
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": jaeger.endpoint,
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_SERVICE_NAME": SERVICE,
        }
        with example_agent(environment):
            played = play([(replace(job, environment=environment), s) for job, s in CALLS])
        settle(prometheus, SERVICE)
        counted = from_spans(prometheus, SERVICE)
        found["first"] = Found(jaeger)
    with Jaeger(folder, badger=folder / "badger") as jaeger:
        found["restarted"] = Found(jaeger)
    return found, truth(played), counted


@contextlib.contextmanager
def example_agent(environment):
    """Meanwhile: examples/agent.py in LiveKit's own worker and job process, for one reply."""
    run_agent = ROOT / "tests" / "support" / "run_agent.py"
    with subprocess.Popen(
        [sys.executable, run_agent, ROOT / "examples/agent.py", "--script", "rate_limit:0.1,ok"],
        env={**os.environ, **environment, "OTEL_SERVICE_NAME": EXAMPLE},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        yield
        assert 0 == process.wait(120)


class Found:
    """What one Jaeger answered."""

    def __init__(self, jaeger):
        self.traces = jaeger.traces(SERVICE)
        self.example = jaeger.traces(EXAMPLE)
        self.by_operation = jaeger.traces(SERVICE, semconv.SPAN_REPLY)
        self.exhausted = jaeger.search(SERVICE, **{semconv.OUTCOME: "exhausted"})
        self.by_provider = jaeger.search(SERVICE, **{semconv.PROVIDER: "ultravox"})
        self.by_code = jaeger.search(SERVICE, **{semconv.ERROR_CODE: CODE})
        self.nothing = jaeger.search(SERVICE, **{semconv.OUTCOME: "superseded"})


@pytest.fixture(params=["first", "restarted"])
def found(request, jaegers):
    """What the first Jaeger found, then what the one restarted on its files found."""
    return jaegers[0][request.param]


def having(traces, name, value):
    """The ids of those traces that have a span with that attribute."""
    return {
        trace
        for trace, spans in traces.items()
        if any(attributes(span).get(name) == value for span in spans)
    }


def test_found_by_outcome_provider_and_code(found):
    """The searches of the person on call find these traces and no others."""
    assert 3 == len(found.traces)
    assert found.traces.keys() == found.by_operation.keys()
    assert (2, 1, 1) == (len(found.exhausted), len(found.by_provider), len(found.by_code))
    assert found.exhausted == having(found.traces, semconv.OUTCOME, "exhausted")
    assert found.by_provider == having(found.traces, semconv.PROVIDER, "ultravox")
    assert found.by_code == having(found.traces, semconv.ERROR_CODE, CODE)
    assert set() == found.nothing


def test_the_example_agents_retry_is_there(found):
    """As a user starts it: its reply, found at the second try, and the job's very last spans."""
    spans = [span for spans in found.example.values() for span in spans]
    (reply,) = [span for span in spans if span["name"] == semconv.SPAN_REPLY]
    attempts = [span for span in spans if span["name"] == semconv.SPAN_ATTEMPT]

    assert "recovered" == attributes(reply)[semconv.OUTCOME]
    assert [reply["spanId"]] * 2 == [span["parentSpanId"] for span in attempts]
    assert {"agent_session", "job_shutdown"} <= {span["name"] for span in spans}


def test_attempts_are_in_order_inside_their_reply_inside_livekits_spans(found):
    """Each attempt lies within its reply and after the one before; LiveKit's spans are around."""
    for spans in found.traces.values():
        by_id = {span["spanId"]: span for span in spans}
        for reply in (s for s in spans if s["name"] == semconv.SPAN_REPLY):
            attempts = [s for s in spans if s.get("parentSpanId") == reply["spanId"]]
            numbers = [attributes(s)[semconv.ATTEMPT] for s in attempts]
            assert list(range(1, attributes(reply)[semconv.ATTEMPTS] + 1)) == numbers
            edges = [nanoseconds(s) for s in attempts]
            assert all(before[1] <= after[0] for before, after in itertools.pairwise(edges))
            assert nanoseconds(reply)[0] <= edges[0][0]
            assert edges[-1][1] <= nanoseconds(reply)[1]
            above = []
            while parent := by_id.get((above[-1] if above else reply).get("parentSpanId")):
                above.append(parent)
            assert "agent_session" == above[-1]["name"]


def nanoseconds(span):
    """Start and end, Unix time."""
    return int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"])


def test_the_restarted_one_has_the_same(jaegers):
    """Badger gives back what it was given."""
    first, restarted = jaegers[0]["first"], jaegers[0]["restarted"]

    assert sorted(ids(first.traces)) == sorted(ids(restarted.traces))


def ids(traces):
    """(trace, span, parent, name, start, end) of every span."""
    return [
        (trace, s["spanId"], s.get("parentSpanId", ""), s["name"], *nanoseconds(s))
        for trace, spans in traces.items()
        for s in spans
    ]


def test_jaeger_alone_counts_exactly(jaegers):
    """Its own spanmetrics connector, scraped: the increase is what the simulators counted."""
    _, expected, counted = jaegers

    assert dict(expected) == pytest.approx(counted, abs=1e-9)
