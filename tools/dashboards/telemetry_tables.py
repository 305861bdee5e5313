# SPDX-License-Identifier: Apache-2.0
"""The tables of the telemetry contract: spans, outcomes and instruments.

The tables are measured, not written by hand: our own telemetry code records one reply of every
kind, and the tables list the attributes and types that reach the SDK.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, Final

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import Histogram, InMemoryMetricReader, Sum
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider

from traced_retry import semconv
from traced_retry.core import budget
from traced_retry.core.attempt import Attempt
from traced_retry.core.failure import failure
from traced_retry.core.request import Delivery
from traced_retry.core.telemetry import Target, Telemetry
from traced_retry.export.processor import BoundedSpanProcessor


def values(names: tuple[str, ...]) -> str:
    """Return names as a list in Markdown."""
    return ", ".join(f"`{name}`" for name in names)


MEANS: Final = {
    semconv.GEN_AI_OPERATION: f"`{semconv.GENERATE_CONTENT}`, as on LiveKit's own span",
    semconv.SPAN_KIND: "`CHAIN`. On a reply that was lost without a response: `LLM`",
    semconv.PROVIDER: "the name from the semantic conventions, or a lower-case name",
    semconv.INITIATOR: f"{values(semconv.INITIATORS)}: who started the reply",
    semconv.MODEL: "",
    semconv.SERVER_ADDRESS: "",
    semconv.SERVER_PORT: "",
    semconv.OUTCOME: "see below",
    semconv.ATTEMPTS: "number of attempts",
    semconv.DELAY_TOTAL: "sum of the waits between attempts, in seconds",
    semconv.STOP_REASON: "see below",
    semconv.ATTEMPT: "number of the attempt, from 1",
    semconv.ACTION: values(semconv.ACTIONS),
    semconv.DELAY: "real wait before the attempt, in seconds",
    semconv.LK_RETRY_COUNT: "number of the attempt, from 0, as on LiveKit's own attempts",
    semconv.RESULT: values(semconv.RESULTS),
    semconv.ERROR_TYPE: "bounded. On the reply: the type of the error raised to the agent",
    semconv.RECOVERABLE: "whether another attempt can help",
    semconv.DECISION: values(semconv.DECISIONS),
    semconv.ERROR_CODE: "the provider's exact code",
    semconv.NEXT_DELAY: "planned wait in seconds. A reconnect may make it longer",
    semconv.RESPONSE_ID: "the provider's id of the response",
    semconv.ANSWERED_ATTEMPT: "number of the earlier attempt whose request was answered",
    semconv.LK_SPEECH_ID: "the id of LiveKit's `SpeechHandle`, as on its `agent_turn` span",
}
UNLESS_ALWAYS: Final = {
    semconv.MODEL: "if known",
    semconv.SERVER_ADDRESS: "if known",
    semconv.SERVER_PORT: "if known",
    semconv.LK_RETRY_COUNT: "inside LiveKit",
    semconv.STOP_REASON: "unless it was heard",
    semconv.ERROR_TYPE: "if it failed",
    semconv.RECOVERABLE: "if it failed",
    semconv.DECISION: "if it failed",
    semconv.ERROR_CODE: "if it failed with a code",
    semconv.NEXT_DELAY: "if a retry follows",
    semconv.RESPONSE_ID: "once a response has begun and has one",
    semconv.ANSWERED_ATTEMPT: "if the answer was to an earlier request",
    semconv.LK_SPEECH_ID: "if there is one",
}
"""The condition of each optional attribute. A new attribute without an entry stops the build."""
OUTCOMES: Final[dict[semconv.Outcome, str]] = {
    "succeeded": "heard at the first attempt",
    "recovered": "heard after a retry",
    "exhausted": "a further attempt could help, but the limits were reached",
    "not_recoverable": "a further attempt could not help, or was not safe",
    "interrupted": "interrupted by the caller",
    "superseded": "dropped by the provider for a newer request",
}
TYPES: Final = {str: "string", int: "int", float: "double", bool: "boolean"}


class _Spans(SpanProcessor):
    """(name, attributes at the start, attributes at the end) of each span."""

    def __init__(self) -> None:
        self.found: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = []
        self._started: dict[int, Mapping[str, Any]] = {}

    def on_start(self, span: Span, parent_context: object = None) -> None:
        self._started[span.get_span_context().span_id] = dict(span.attributes or {})

    def on_end(self, span: ReadableSpan) -> None:
        started = self._started.pop(span.get_span_context().span_id)
        self.found.append((span.name, started, dict(span.attributes or {})))


class _Nowhere:
    reason = None

    def export(self, spans: object) -> None: ...
    def shutdown(self) -> None: ...


def _record(telemetry: Telemetry, target: Target) -> None:
    """Record a reply of every kind, with an attempt of every kind."""
    silent = failure(RuntimeError(), "timeout")
    coded = failure(RuntimeError(), "server_error", code="server_error")
    thens: tuple[semconv.Action | None, ...] = (None, *semconv.ACTIONS)
    for stop, result, failed, then in product(
        (None, *semconv.STOP_REASONS), semconv.RESULTS, (silent, coded), thens
    ):
        reply = telemetry.reply(target)
        reply.speech_id = "speech_1" if target.model else None
        reply.begin(0.0, 0.0)
        attempt = Attempt(1, "send", 0.0, 0.0, 0.0)
        reply.attempt_began(attempt)
        attempt.result, attempt.next_action, attempt.next_delay = result, then, 0.1
        attempt.failure = failed if result == "failed" else None
        if target.model:
            attempt.delivery = Delivery()
            attempt.delivery.response_id = "resp_1"
            attempt.delivery.answers_attempt = 1 if then == "hedge" else None
        reply.attempt_ended(attempt, 0.1)
        reply.waited(0.1)
        lost = stop is not None and semconv.OUTCOME_OF[stop] in ("exhausted", "not_recoverable")
        reply.end(stop, 0.2, failed if lost else None)
        reply.late()


def tables() -> dict[str, list[list[str]]]:
    """Return the rows of each table by its name, headings first."""
    logging.getLogger(semconv.SCOPE).disabled = True  # it would log each failed reply
    spans, reader = _Spans(), InMemoryMetricReader()
    tracers, meters = TracerProvider(), MeterProvider([reader])
    tracers.add_span_processor(spans)
    held = budget.RetryBudget(5.0)  # the gauge is reported while the budget exists
    held.open("openai", time.monotonic)
    dropping = BoundedSpanProcessor(_Nowhere(), "otlp", meter_provider=meters)
    for inside in (False, True):
        for target in (Target("openai"), Target("openai", "gpt-realtime", "127.0.0.1", 443)):
            _record(Telemetry(tracers, meters, in_livekit=inside), target)
    points = reader.get_metrics_data()
    dropping.shutdown()
    meters.shutdown()
    assert points is not None
    metrics = [m for r in points.resource_metrics for s in r.scope_metrics for m in s.metrics]
    return {
        "span generate_reply": _span(spans, semconv.SPAN_REPLY),
        "span generate_reply.attempt": _span(spans, semconv.SPAN_ATTEMPT),
        "outcomes": _outcomes(),
        "instruments": [
            ["instrument", "kind, unit", "what", "attributes"],
            *(_instrument(m) for m in sorted(metrics, key=_place)),
        ],
    }


def _span(spans: _Spans, name: str) -> list[list[str]]:
    recorded = [(start, end) for span, start, end in spans.found if span == name]
    types = {key: type(value) for _, end in recorded for key, value in end.items()}
    rows = []
    for key, kind in types.items():
        early = any(key in start for start, _ in recorded)
        when = "from the start" if early else "at the end"
        if not all(key in end for _, end in recorded):
            when += f", {UNLESS_ALWAYS[key]}"
        rows.append([f"`{key}`", TYPES[kind], when, MEANS[key]])
    # Attributes from the start come first. Within each part the order is that of the vocabulary.
    order = [f"`{key}`" for key in MEANS]
    rows.sort(key=lambda row: (row[2].startswith("at the end"), order.index(row[0])))
    return [["attribute", "type", "when", "what"], *rows]


def _outcomes() -> list[list[str]]:
    reasons = {
        outcome: tuple(s for s, of in semconv.OUTCOME_OF.items() if of == outcome)
        for outcome in semconv.OUTCOMES
    }
    rows = [[f"`{o}`", OUTCOMES[o], values(reasons[o])] for o in semconv.OUTCOMES]
    return [["outcome", "what", "stop reasons"], *rows]


def _place(metric: Any) -> int:
    """Return the position of the metric in the vocabulary."""
    return [v for n, v in vars(semconv).items() if n.startswith("METRIC_")].index(metric.name)


def _instrument(metric: Any) -> list[str]:
    kind = "gauge"
    if isinstance(metric.data, Histogram):
        kind = "histogram"
    elif isinstance(metric.data, Sum):
        kind = "counter" if metric.data.is_monotonic else "up-down counter"
    return [
        f"`{metric.name}`",
        f"{kind}, `{metric.unit}`",
        metric.description.rstrip("."),
        "; ".join(_attributes([point.attributes for point in metric.data.data_points])),
    ]


def _attributes(points: list[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the attributes of every point, then the optional ones by their condition."""
    names = dict.fromkeys(name for point in points for name in point)
    always = tuple(n for n in names if all(n in point for point in points))
    yield values(always)
    conditions = dict.fromkeys(UNLESS_ALWAYS[n] for n in names if n not in always)
    for condition in conditions:
        some = tuple(n for n in names if n not in always and UNLESS_ALWAYS[n] == condition)
        yield f"{condition}: {values(some)}"
