# SPDX-License-Identifier: Apache-2.0
"""The Collector for a fleet keeps every reply that was not a clean success, and no clean call."""

from __future__ import annotations

from collections import Counter

import pytest
from backends.fleet import KILLED, PROVIDER, SERVICES, truth
from backends.servers import attributes

from traced_retry import semconv


@pytest.fixture(scope="module")
def kept(fleet):
    """Every span in Jaeger of the jobs that ended."""
    traces = [trace for name in SERVICES for trace in fleet.jaeger.traces(name).values()]
    return [span for spans in traces for span in spans]


def test_every_reply_that_was_not_a_clean_success_is_kept(fleet, kept):
    """With all attempts, although a call outlives the sampler's patience and 0 % are kept."""
    replies = [(span, attributes(span)) for span in kept if span["name"] == semconv.SPAN_REPLY]
    children = Counter(s["parentSpanId"] for s in kept if s["name"] == semconv.SPAN_ATTEMPT)
    expected = {pair: n for pair, n in truth(fleet.ended).items() if pair[1] != "succeeded"}

    actual = Counter((of[semconv.PROVIDER], of[semconv.OUTCOME]) for _, of in replies)
    attempts = {
        span["spanId"]: of[semconv.ATTEMPTS]
        for span, of in replies
        if of[semconv.OUTCOME] != "succeeded"
    }

    assert expected == {pair: n for pair, n in actual.items() if pair[1] != "succeeded"}
    assert attempts == {span: children[span] for span in attempts}


def test_no_span_is_stored_twice(kept):
    """The two ways through the Collector share no span."""
    assert len(kept) == len({(span["traceId"], span["spanId"]) for span in kept})


def test_clean_calls_are_not_kept(fleet, kept):
    """A call in which every reply was heard at once costs no storage where 0 % are kept."""
    clean = sum(set(played.truth()) == {"succeeded"} for played in fleet.ended)

    assert len(PROVIDER) * 5 == clean
    assert len(fleet.ended) - clean == len({span["traceId"] for span in kept})
    assert {} == fleet.jaeger.traces(KILLED)


@pytest.mark.parametrize(
    "series",
    [
        'traces_span_metrics_calls_total{span_name="generate_reply",traced_retry_outcome="exhausted"}',
        'traces_span_metrics_duration_seconds_bucket{span_name="generate_reply",traced_retry_outcome="exhausted"}',
        'traced_retry_replies_total{traced_retry_outcome="exhausted"}',
        'traced_retry_reply_duration_seconds_bucket{traced_retry_outcome="exhausted"}',
    ],
)
def test_an_exemplar_names_a_trace_that_jaeger_has(fleet, series):
    """On either path, on counts and on durations: from the graph to the very reply."""
    # One of value 0 is of the counter's start, in which nothing was exhausted.
    exemplars = fleet.prometheus.exemplars(series)
    assert exemplars
    for labels, exemplar in exemplars:
        ids = exemplar["labels"]
        trace = fleet.jaeger.trace(ids["trace_id"])
        (of,) = [attributes(span) for span in trace if span["spanId"] == ids["span_id"]]
        assert "exhausted" == of[semconv.OUTCOME]
        assert labels["gen_ai_provider_name"] == of[semconv.PROVIDER]
