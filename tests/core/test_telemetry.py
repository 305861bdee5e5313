# SPDX-License-Identifier: Apache-2.0
"""The telemetry contract: the exact attributes of each span and instrument, for each outcome."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from itertools import pairwise
from typing import NamedTuple

import pytest
from opentelemetry import context, trace
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON
from opentelemetry.trace import SpanKind, StatusCode
from support.scripted import HANG, SUPERSEDED, ProviderError, Scripted

from traced_retry import RetryPolicy, __version__, semconv
from traced_retry.core import telemetry as core_telemetry
from traced_retry.core.loop import Reply
from traced_retry.core.request import CallRequest
from traced_retry.core.telemetry import Target, Telemetry

TARGET = Target("openai", "gpt-realtime", "api.openai.com", 443)
KNOWN = {
    "openinference.span.kind": "CHAIN",
    "gen_ai.operation.name": "generate_content",
    "gen_ai.provider.name": "openai",
    "traced_retry.initiator": "agent",
    "gen_ai.request.model": "gpt-realtime",
    "server.address": "api.openai.com",
    "server.port": 443,
}


def ask(recorder, *steps, cancel_after=None, in_livekit=False, **policy):
    """Ask for one reply; ``cancel_after`` seconds it is cancelled."""
    script = Scripted(*steps)
    telemetry = Telemetry(**recorder.providers, in_livekit=in_livekit)
    reply = Reply(
        CallRequest(script.future),
        RetryPolicy(**{"base_delay": 1.0, **policy}),
        telemetry.reply(TARGET),
        jitter=lambda bound: bound,
    ).start()
    if cancel_after is not None:
        asyncio.get_running_loop().call_later(cancel_after, reply.cancel)
    return reply


async def ended(reply):
    """Wait for the reply, whatever becomes of it."""
    await asyncio.wait({reply})
    if not reply.cancelled():
        reply.exception()


def failed(code, error_type, *, recoverable=True, **more):
    """What a failed attempt's span says about its failure."""
    said = {
        "traced_retry.result": "failed",
        "error.type": error_type,
        "traced_retry.recoverable": recoverable,
        **more,
    }
    return said if code is None else {**said, "traced_retry.error_code": code}


RATE_LIMIT = ProviderError("rate_limit_exceeded")


class Case(NamedTuple):
    """One reply, and the attributes that its spans have beside the known ones."""

    steps: list
    options: dict
    attempts: list[dict]
    reply: dict
    status: StatusCode


CASES = {
    "success": Case(
        ["hello"],
        {},
        [{"traced_retry.delay": 0.0, "traced_retry.result": "succeeded"}],
        {
            "traced_retry.outcome": "succeeded",
            "traced_retry.attempts": 1,
            "traced_retry.delay.total": 0.0,
        },
        StatusCode.UNSET,
    ),
    "recovery": Case(
        [RATE_LIMIT, "hello"],
        {},
        [
            {
                "traced_retry.delay": 0.0,
                "traced_retry.decision": "retry",
                "traced_retry.next_delay": 1.0,
                **failed("rate_limit_exceeded", "rate_limit_exceeded"),
            },
            {"traced_retry.delay": 1.0, "traced_retry.result": "succeeded"},
        ],
        {
            "traced_retry.outcome": "recovered",
            "traced_retry.attempts": 2,
            "traced_retry.delay.total": 1.0,
        },
        StatusCode.UNSET,
    ),
    "exhaustion": Case(
        [ProviderError("brand_new_code")],
        {"max_retries": 1},
        [
            {
                "traced_retry.delay": 0.0,
                "traced_retry.decision": "retry",
                "traced_retry.next_delay": 1.0,
                **failed("brand_new_code", "_OTHER"),
            },
            {
                "traced_retry.delay": 1.0,
                "traced_retry.decision": "stop",
                **failed("brand_new_code", "_OTHER"),
            },
        ],
        {
            "traced_retry.outcome": "exhausted",
            "traced_retry.stop_reason": "max_attempts",
            "traced_retry.attempts": 2,
            "traced_retry.delay.total": 1.0,
            "error.type": "_OTHER",
        },
        StatusCode.ERROR,
    ),
    "deadline": Case(
        [HANG],
        {},
        [
            {
                "traced_retry.delay": 0.0,
                "traced_retry.decision": "stop",
                **failed(None, "timeout"),
            }
        ],
        {
            "traced_retry.outcome": "exhausted",
            "traced_retry.stop_reason": "deadline",
            "traced_retry.attempts": 1,
            "traced_retry.delay.total": 0.0,
            "error.type": "timeout",
        },
        StatusCode.ERROR,
    ),
    "not recoverable": Case(
        [ProviderError("insufficient_quota")],
        {},
        [
            {
                "traced_retry.delay": 0.0,
                "traced_retry.decision": "stop",
                **failed("insufficient_quota", "insufficient_quota", recoverable=False),
            }
        ],
        {
            "traced_retry.outcome": "not_recoverable",
            "traced_retry.stop_reason": "not_recoverable",
            "traced_retry.attempts": 1,
            "traced_retry.delay.total": 0.0,
            "error.type": "insufficient_quota",
        },
        StatusCode.ERROR,
    ),
    "interrupted in the attempt": Case(
        [HANG],
        {"cancel_after": 2.0},
        [{"traced_retry.delay": 0.0, "traced_retry.result": "interrupted"}],
        {
            "traced_retry.outcome": "interrupted",
            "traced_retry.stop_reason": "interrupted",
            "traced_retry.attempts": 1,
            "traced_retry.delay.total": 0.0,
        },
        StatusCode.UNSET,
    ),
    "interrupted in the wait": Case(
        [RATE_LIMIT],
        {"cancel_after": 0.25},
        [
            {
                "traced_retry.delay": 0.0,
                "traced_retry.decision": "retry",
                "traced_retry.next_delay": 1.0,
                **failed("rate_limit_exceeded", "rate_limit_exceeded"),
            }
        ],
        {
            "traced_retry.outcome": "interrupted",
            "traced_retry.stop_reason": "interrupted",
            "traced_retry.attempts": 1,
            "traced_retry.delay.total": 0.25,
        },
        StatusCode.UNSET,
    ),
    "superseded": Case(
        [SUPERSEDED],
        {},
        [{"traced_retry.delay": 0.0, "traced_retry.result": "superseded"}],
        {
            "traced_retry.outcome": "superseded",
            "traced_retry.stop_reason": "superseded",
            "traced_retry.attempts": 1,
            "traced_retry.delay.total": 0.0,
        },
        StatusCode.UNSET,
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
async def case(request, recorder):
    """Run one reply of each kind to its end."""
    await ended(ask(recorder, *request.param.steps, **request.param.options))
    return request.param


class TestSpans:
    async def test_attempt_spans_have_exact_attributes(self, case, recorder):
        """Each attempt's span has exactly the attributes of the contract."""
        expected = [
            {
                **KNOWN,
                "traced_retry.attempt": n,
                "traced_retry.action": "send",
                **attempt,
            }
            for n, attempt in enumerate(case.attempts, 1)
        ]

        assert expected == recorder.attempts

    async def test_reply_span_has_exact_attributes(self, case, recorder):
        """The reply's span has exactly the attributes of the contract."""
        heard = case.reply["traced_retry.outcome"] in ("succeeded", "recovered")
        kind = {"openinference.span.kind": "CHAIN" if heard else "LLM"}
        assert [{**KNOWN, **kind, **case.reply}] == recorder.replies

    async def test_only_failed_spans_have_error_status(self, case, recorder):
        """A recovered or interrupted reply is no error, and each failed attempt is one."""
        (reply,) = recorder.spans("generate_reply")
        statuses = {
            (s.attributes["traced_retry.result"] == "failed", s.status.status_code)
            for s in recorder.spans("generate_reply.attempt")
        }

        assert case.status == reply.status.status_code
        assert statuses <= {(True, StatusCode.ERROR), (False, StatusCode.UNSET)}
        assert not any(s.status.description or s.events for s in recorder.spans())

    async def test_attempts_are_client_children_of_internal_reply(self, case, recorder):
        """Attempts are CLIENT children of the INTERNAL reply, in order, and all have ended."""
        reply, *attempts = recorder.spans()

        assert ("generate_reply", SpanKind.INTERNAL) == (reply.name, reply.kind)
        assert {("generate_reply.attempt", SpanKind.CLIENT, reply.context.span_id)} == {
            (a.name, a.kind, a.parent.span_id) for a in attempts
        }
        assert all(a.end_time <= b.start_time for a, b in pairwise(attempts))
        assert 0 == recorder.open_spans

    async def test_samplers_see_known_attributes(self, case, recorder):
        """The attributes that are known at the start are given to the sampler."""
        (name, at_start), (_, first), *_ = recorder.at_start

        assert ("generate_reply", KNOWN) == (name, at_start)
        assert {
            **KNOWN,
            "traced_retry.attempt": 1,
            "traced_retry.action": "send",
            "traced_retry.delay": 0.0,
        } == first

    async def test_attempt_has_livekit_retry_count(self, recorder):
        """Within LiveKit an attempt is also counted from 0, as its LLM and TTS attempts are."""
        await ask(recorder, RATE_LIMIT, "hello", in_livekit=True)

        assert [0, 1] == [a["lk.retry_count"] for a in recorder.attempts]

    async def test_reply_span_is_child_of_current_span(self, recorder):
        """The reply's span is a child of the current span and leaves it current."""
        tracer = recorder.tracer_provider.get_tracer("agent")
        with tracer.start_as_current_span("agent_session") as session:
            reply = ask(recorder, RATE_LIMIT, "hello")
            assert session is trace.get_current_span()
        await reply

        assert session.context.span_id == recorder.spans("generate_reply")[0].parent.span_id

    async def test_attempt_span_is_current_during_call(self, recorder):
        """Spans of the plugin are children of the attempt."""
        seen = []

        async def asks():
            seen.append(trace.get_current_span())
            await asyncio.sleep(0.1)
            seen.append(trace.get_current_span())

        telemetry = Telemetry(**recorder.providers)
        await Reply(CallRequest(asks), RetryPolicy(), telemetry.reply(TARGET)).start()

        assert ["generate_reply.attempt"] * 2 == [s.name for s in seen]

    async def test_spans_have_own_scope_and_schema(self, recorder):
        """Spans carry the name of our tracer and its schema URL."""
        await ask(recorder, "hello")
        scope = recorder.spans()[0].instrumentation_scope

        assert ("traced_retry", semconv.SCHEMA_URL) == (scope.name, scope.schema_url)
        assert scope.version


EXPECTED_COUNTS = {
    "success": ({("send", "succeeded", None, None): 1}, ("succeeded", None)),
    "recovery": (
        {
            ("send", "failed", "rate_limit_exceeded", True): 1,
            ("send", "succeeded", None, None): 1,
        },
        ("recovered", None),
    ),
    "exhaustion": (
        {("send", "failed", "_OTHER", True): 2},
        ("exhausted", "max_attempts"),
    ),
    "deadline": ({("send", "failed", "timeout", True): 1}, ("exhausted", "deadline")),
    "not recoverable": (
        {("send", "failed", "insufficient_quota", False): 1},
        ("not_recoverable", "not_recoverable"),
    ),
    "interrupted in the attempt": (
        {("send", "interrupted", None, None): 1},
        ("interrupted", "interrupted"),
    ),
    "interrupted in the wait": (
        {("send", "failed", "rate_limit_exceeded", True): 1},
        ("interrupted", "interrupted"),
    ),
    "superseded": (
        {("send", "superseded", None, None): 1},
        ("superseded", "superseded"),
    ),
}


def exactly(initiator="agent", **attributes):
    """Return metric attributes as the recorder shows them, without those that are None."""
    attributes["initiator"] = initiator
    names = {
        "provider": semconv.PROVIDER,
        "initiator": semconv.INITIATOR,
        "action": semconv.ACTION,
        "result": semconv.RESULT,
        "error_type": semconv.ERROR_TYPE,
        "recoverable": semconv.RECOVERABLE,
        "outcome": semconv.OUTCOME,
        "stop_reason": semconv.STOP_REASON,
    }
    return frozenset((names[k], v) for k, v in attributes.items() if v is not None)


class TestTimes:
    @pytest.mark.parametrize("ago", [None, 3.0])
    async def test_span_covers_the_time_since_the_beginning(self, ago, recorder):
        """A reply of the provider began before it is seen. The span has the system's time."""
        await asyncio.sleep(100)
        loop, failed_replies = asyncio.get_running_loop(), []
        opened = time.time_ns()
        reply = Reply(
            CallRequest(Scripted((2.0, ProviderError("invalid_api_key"))).future),
            RetryPolicy(),
            Telemetry(**recorder.providers).reply(TARGET),
            on_failed=failed_replies.append,
        ).start(began=None if ago is None else loop.time() - ago)
        await ended(reply)
        span = recorder.spans()[0]
        seconds = 2.0 + (ago or 0.0)

        assert -(ago or 0.0) == pytest.approx((span.start_time - opened) / 1e9, abs=1.0)
        assert seconds == pytest.approx((span.end_time - span.start_time) / 1e9, abs=1e-6)
        assert [seconds] == [failed.seconds for failed in failed_replies]
        assert [(1, seconds)] == list(recorder.points("traced_retry.reply.duration").values())


class TestMetrics:
    @pytest.mark.parametrize("name", CASES)
    async def test_counters_have_exact_attributes_and_sums(self, name, recorder):
        """Each counter has exactly the attributes of the contract, and the right sums."""
        steps, options, *_ = CASES[name]
        await ended(ask(recorder, *steps, **options))
        attempts, (outcome, stop_reason) = EXPECTED_COUNTS[name]

        assert {
            exactly(
                provider="openai", action=action, result=result, error_type=why, recoverable=again
            ): count
            for (action, result, why, again), count in attempts.items()
        } == recorder.points("traced_retry.attempts")
        assert {
            exactly(provider="openai", outcome=outcome, stop_reason=stop_reason): 1
        } == recorder.points("traced_retry.replies")

    async def test_durations_are_in_seconds(self, recorder):
        """Histograms hold seconds for attempt, reply and the wait between attempts."""
        await ask(recorder, (0.5, RATE_LIMIT), (0.25, "hello"))

        assert {
            exactly(
                provider="openai",
                action="send",
                result="failed",
                error_type="rate_limit_exceeded",
            ): (1, 0.5),
            exactly(provider="openai", action="send", result="succeeded"): (1, 0.25),
        } == recorder.points("traced_retry.attempt.duration")
        assert {exactly(provider="openai", outcome="recovered"): (1, 1.75)} == recorder.points(
            "traced_retry.reply.duration"
        )
        assert {exactly(provider="openai"): (1, 1.0)} == recorder.points("traced_retry.delay")

    async def test_in_flight_is_one_only_during_reply(self, recorder):
        """The gauge is one while a reply runs, and none afterwards."""
        reply = ask(recorder, HANG)
        assert {exactly(provider="openai"): 1} == recorder.points("traced_retry.in_flight")
        reply.cancel()
        await ended(reply)

        assert {exactly(provider="openai"): 0} == recorder.points("traced_retry.in_flight")

    async def test_instruments_have_names_units_and_kinds(self, recorder):
        """Every instrument has its name, unit, kind and a description."""
        await ask(recorder, RATE_LIMIT, "hello")
        trace = Telemetry(**recorder.providers).reply(TARGET)
        trace.begin(0.0, 0.0)
        trace.late()
        (resource,) = recorder._reader.get_metrics_data().resource_metrics
        (scope,) = resource.scope_metrics
        seconds = ("s", "Histogram", None, semconv.DURATION_BUCKETS)

        assert {
            "traced_retry.attempts": ("{attempt}", "Sum", True, None),
            "traced_retry.replies": ("{reply}", "Sum", True, None),
            "traced_retry.attempt.duration": seconds,
            "traced_retry.reply.duration": seconds,
            "traced_retry.delay": seconds,
            "traced_retry.in_flight": ("{reply}", "Sum", False, None),
            "traced_retry.late_replies": ("{reply}", "Sum", True, None),
            "traced_retry.budget.remaining": ("{attempt}", "Gauge", None, None),
        } == {
            m.name: (
                m.unit,
                type(m.data).__name__,
                getattr(m.data, "is_monotonic", None),
                getattr(m.data.data_points[0], "explicit_bounds", None),
            )
            for m in scope.metrics
        }
        assert all(m.description[0].isupper() and m.description[-1] == "." for m in scope.metrics)
        assert ("traced_retry", __version__, semconv.SCHEMA_URL) == (
            scope.scope.name,
            scope.scope.version,
            scope.scope.schema_url,
        )

    async def test_initialized_counter_has_no_exemplar(self, recorder):
        """An exemplar of "exhausted" must not name the call that initialized the counter."""
        with recorder.tracer_provider.get_tracer("agent").start_as_current_span("call"):
            Telemetry(**recorder.providers).initialize_counters("openai")

        assert [] == recorder.exemplars("traced_retry.replies")

    async def test_counters_start_at_zero(self, recorder):
        """Each outcome and stop reason starts at 0, so that its first count is an increase."""
        telemetry = Telemetry(**recorder.providers)
        telemetry.initialize_counters("openai")
        telemetry.initialize_counters("openai")

        replies = recorder.points("traced_retry.replies")
        assert {
            *(exactly(provider="openai", outcome=o) for o in ("succeeded", "recovered")),
            *(
                exactly(provider="openai", outcome=o, stop_reason=r)
                for r, o in semconv.OUTCOME_OF.items()
            ),
        } == set(replies)
        assert (
            {0} == set(replies.values()) == set(recorder.points("traced_retry.attempts").values())
        )

    async def test_counters_are_initialized_once(self, recorder, monkeypatch):
        """The listeners are called once per provider, and once for its texts to speak."""
        calls = []
        monkeypatch.setattr(core_telemetry, "on_counters_initialized", [lambda: calls.append(1)])
        telemetry = Telemetry(**recorder.providers)
        for provider, say in [("openai", False), ("openai", False), ("x_ai", False)]:
            telemetry.initialize_counters(provider, say=say)
        assert 2 == len(calls)
        for _ in range(2):
            telemetry.initialize_counters("x_ai", say=True)

        assert 3 == len(calls)

    async def test_attempts_start_at_zero_with_each_action(self, recorder):
        """Each action starts at 0 with success and with the frequent failures."""
        telemetry = Telemetry(**recorder.providers)
        telemetry.initialize_counters("google", ("send", "restart"))
        telemetry.initialize_counters("x_ai", say=True)
        kinds = ("timeout", "connection_lost", "server_error", "rate_limit_exceeded")
        google = {"gen_ai.provider.name": "google", "traced_retry.initiator": "agent"}
        targets = [
            {**google, "traced_retry.action": "send"},
            {**google, "traced_retry.action": "restart"},
            {
                "gen_ai.provider.name": "x_ai",
                "traced_retry.initiator": "agent",
                "traced_retry.action": "send",
                "traced_retry.operation": "say",
            },
        ]
        failing = {"traced_retry.result": "failed", "traced_retry.recoverable": True}
        expected = [
            frozenset({**target, **more}.items())
            for target in targets
            for more in [
                {"traced_retry.result": "succeeded"},
                *({**failing, "error.type": kind} for kind in kinds),
            ]
        ]

        assert dict.fromkeys(expected, 0) == recorder.points("traced_retry.attempts")
        assert {0} == set(recorder.points("traced_retry.late_replies").values())

    async def test_exemplars_lead_to_trace(self, recorder):
        """Metrics are recorded inside the span, so each exemplar leads to its trace."""
        await ask(recorder, "hello")
        data = recorder._reader.get_metrics_data()
        exemplars = {
            (m.name, e.span_id)
            for m in data.resource_metrics[0].scope_metrics[0].metrics
            for p in m.data.data_points
            for e in p.exemplars
        }
        ids = {s.name: s.context.span_id for s in recorder.spans()}

        assert ("traced_retry.reply.duration", ids["generate_reply"]) in exemplars
        assert ("traced_retry.attempt.duration", ids["generate_reply.attempt"]) in exemplars


class TestLog:
    async def test_each_retry_logs_one_info_record(self, recorder, caplog):
        """Each retry logs one INFO record, and a success logs none."""
        with caplog.at_level(logging.INFO, logger="traced_retry"):
            await ask(recorder, RATE_LIMIT, ConnectionError("no code"), "hello")

        assert ["INFO", "INFO"] == [r.levelname for r in caplog.records]
        assert [
            "openai attempt failed (rate_limit_exceeded), send in 1.00 s",
            "openai attempt failed (connection_lost), send in 2.00 s",
        ] == [r.getMessage() for r in caplog.records]

    @pytest.mark.parametrize("sampled", [True, False])
    async def test_only_a_sampled_trace_has_an_id(self, sampled, recorder, caplog):
        """No backend has an unsampled trace, so its id is in no note, log or callback."""
        provider = TracerProvider(sampler=ALWAYS_ON if sampled else ALWAYS_OFF)
        reply_trace = Telemetry(provider, recorder.meter_provider).reply(TARGET)
        failed_replies = []
        with caplog.at_level(logging.INFO, logger="traced_retry"):
            reply = Reply(
                CallRequest(Scripted(RATE_LIMIT, ProviderError("invalid_api_key")).future),
                RetryPolicy(),
                reply_trace,
                on_failed=failed_replies.append,
            ).start()
            await ended(reply)
            reply_trace.late()

        (failed_reply,) = failed_replies
        found = failed_reply.trace_id
        assert sampled == (found is not None)
        assert [found or ""] * 3 == [record.trace_id for record in caplog.records]
        for record in caplog.records[1:]:
            assert record.getMessage().endswith(f"trace {found or 'none'}")
        assert reply.exception().__notes__[0].endswith(f"trace id {found or 'none'}")

    async def test_failed_reply_logs_one_warning(self, recorder, caplog):
        """A failed reply logs one WARN record with its trace id."""
        with caplog.at_level(logging.WARNING, logger="traced_retry"):
            await ended(ask(recorder, ProviderError("server_error"), max_retries=2))

        (record,) = caplog.records
        trace_id = format(recorder.spans()[0].context.trace_id, "032x")
        assert "WARNING" == record.levelname
        assert trace_id == record.trace_id
        assert (
            "openai reply failed (server_error) after 3 attempt(s) and 3.00 s: exhausted, "
            f"stopped by max_attempts, trace {trace_id}"
        ) == record.getMessage()

    async def test_log_record_is_made_inside_span(self, recorder):
        """OpenTelemetry's logging handler can relate the record to the trace."""
        seen = []

        class Handler(logging.Handler):
            def emit(self, record):
                seen.append(trace.get_current_span().name)

        handler = Handler()
        logging.getLogger("traced_retry").addHandler(handler)
        try:
            await ended(ask(recorder, RATE_LIMIT, ProviderError("insufficient_quota")))
        finally:
            logging.getLogger("traced_retry").removeHandler(handler)

        assert "generate_reply" == seen[-1]

    async def test_log_records_have_attributes(self, recorder, caplog):
        """A log backend can filter by the same names as a trace backend."""
        with caplog.at_level(logging.INFO, logger="traced_retry"):
            await ended(ask(recorder, RATE_LIMIT, max_retries=1))
        retried, lost = ({k: v for k, v in vars(r).items() if "." in k} for r in caplog.records)
        trace_id = format(recorder.spans()[0].context.trace_id, "032x")

        assert {
            "gen_ai.provider.name": "openai",
            "traced_retry.initiator": "agent",
            "error.type": "rate_limit_exceeded",
            "traced_retry.action": "send",
            "traced_retry.next_delay": 1.0,
        } == retried
        assert {
            "gen_ai.provider.name": "openai",
            "traced_retry.initiator": "agent",
            "error.type": "rate_limit_exceeded",
            "traced_retry.outcome": "exhausted",
            "traced_retry.stop_reason": "max_attempts",
            "traced_retry.attempts": 2,
        } == lost
        assert [trace_id] * 2 == [record.trace_id for record in caplog.records]

    async def test_late_reply_is_counted_and_logged(self, recorder, caplog):
        """The record names the trace of the reply that was reported as failed."""
        trace = Telemetry(**recorder.providers).reply(Target("x_ai", say=True))
        trace.begin(0.0, 0.0)
        trace.late()
        (record,) = caplog.records

        assert logging.WARNING == record.levelno
        assert (
            f"x_ai say heard after it was reported as failed, trace {trace.trace_id}"
            == record.getMessage()
        )
        assert {"x_ai": 1} == recorder.counted("traced_retry.late_replies", "gen_ai.provider.name")

    async def test_interruption_logs_nothing(self, recorder, caplog):
        """An interruption by the caller logs no record."""
        with caplog.at_level(logging.INFO, logger="traced_retry"):
            await ended(ask(recorder, HANG, cancel_after=1.0))

        assert [] == caplog.records


class TestLeaks:
    async def test_no_text_of_exception_in_telemetry(self, recorder, caplog):
        """Spans, metrics and log hold no text of an exception, which may be a transcript."""
        with caplog.at_level(logging.DEBUG, logger="traced_retry"):
            await ended(
                ask(recorder, ProviderError("code"), ProviderError("the caller said SECRET"))
            )
        told = [
            repr([s.to_json() for s in recorder.spans()]),
            repr([recorder.points(m) for m in recorder.metric_names()]),
            repr([(r.getMessage(), vars(r)) for r in caplog.records]),
        ]

        assert not [t for t in told if "SECRET" in t or "sk-key" in t]


class Broken:
    """A tracer, a meter and their products, all of which fail."""

    def __getattr__(self, name):
        def fail(*_, **__):
            raise RuntimeError("SECRET telemetry is down")

        return fail


class TestHarmless:
    @pytest.mark.parametrize(
        ("part", "place"),
        [
            ("tracer", "begin"),
            ("attempts", "attempt_ended"),
            ("delay", "waited"),
            ("replies", "end"),
            ("reply_duration", "end"),
        ],
    )
    async def test_failing_sdk_does_not_change_result(self, recorder, caplog, part, place):
        """An error of the SDK is logged once, with its place, and never changes the result."""
        telemetry = Telemetry(**recorder.providers)
        setattr(telemetry, part, Broken())
        for _ in range(2):
            script = Scripted(ProviderError("server_error"), "hello")
            reply = Reply(CallRequest(script.future), RetryPolicy(), telemetry.reply(TARGET))
            assert "hello" == await reply.start()

        records = [r for r in caplog.records if r.levelname == "ERROR"]
        assert any(f"telemetry ({place}) raised" in r.getMessage() for r in records)
        assert len(records) == len({r.getMessage() for r in records})
        assert not any("SECRET" in r.getMessage() for r in records)
        assert 0 == recorder.open_spans
        assert {} == recorder.counted("traced_retry.in_flight")

    async def test_suppressed_instrumentation_still_retries(self, recorder):
        """Under suppress_instrumentation retries continue without telemetry."""
        with suppress_instrumentation():
            assert "hello" == await ask(recorder, RATE_LIMIT, "hello")

        assert [] == recorder.spans()
        # What is left of the process's budget is not told of this reply.
        assert {"traced_retry.budget.remaining"} == recorder.metric_names()

    async def test_suppressed_instrumentation_still_logs_failure(self, recorder, caplog):
        """A reply that fails under suppression is logged, without a trace, and not counted."""
        with suppress_instrumentation():
            await ended(ask(recorder, RATE_LIMIT, max_retries=1))
        (record,) = [r for r in caplog.records if r.levelname == "WARNING"]

        assert record.getMessage().endswith("exhausted, stopped by max_attempts, trace none")
        assert [] == recorder.spans()
        assert {"traced_retry.budget.remaining"} == recorder.metric_names()

    async def test_suppressed_late_reply_is_not_counted(self, recorder):
        """The suppression of the reply applies to what follows it."""
        with suppress_instrumentation():
            trace = Telemetry(**recorder.providers).reply(TARGET)
        trace.begin(0.0, 0.0)
        trace.late()

        assert "traced_retry.late_replies" not in recorder.metric_names()

    async def test_retries_work_without_sdk(self):
        """Retries need only the API of OpenTelemetry."""
        script = Scripted(RATE_LIMIT, "hello")
        reply = Reply(CallRequest(script.future), RetryPolicy(), Telemetry().reply(TARGET))

        assert "hello" == await reply.start()
        assert context.get_current() == {}

    async def test_dropped_span_leaves_metrics_exact(self, recorder):
        """A sampler that drops the span leaves nothing half-recorded, and metrics exact."""
        from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

        telemetry = Telemetry(
            TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False), recorder.meter_provider
        )
        script = Scripted(RATE_LIMIT, "hello")
        await Reply(CallRequest(script.future), RetryPolicy(), telemetry.reply(TARGET)).start()

        assert {"recovered": 1} == recorder.counted("traced_retry.replies", "traced_retry.outcome")


def test_target_is_frozen():
    """The labels are computed once, so a changed target would keep its old ones."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        TARGET.provider = "x_ai"


class TestVocabulary:
    def test_each_stop_reason_has_one_outcome(self):
        """Each stop reason leads to one outcome, and each failed outcome has a stop reason."""
        assert {*semconv.OUTCOMES} - {"succeeded", "recovered"} == {*semconv.OUTCOME_OF.values()}

    def test_table_covers_all_stop_reasons(self):
        """The table covers exactly the stop reasons of the type."""
        from typing import get_args

        assert set(get_args(semconv.StopReason)) == set(semconv.OUTCOME_OF)

    def test_own_names_have_own_prefix(self):
        """Names outside traced_retry.* belong to OpenTelemetry, LiveKit or OpenInference."""
        names = {
            v
            for k, v in vars(semconv).items()
            if k.isupper() and isinstance(v, str) and "." in v and "://" not in v
        }
        foreign = {n for n in names if not n.startswith("traced_retry.")}

        assert {
            "gen_ai.operation.name",
            "gen_ai.provider.name",
            "gen_ai.request.model",
            "openinference.span.kind",
            "server.address",
            "server.port",
            "error.type",
            "gen_ai.response.id",
            "lk.retry_count",
            "lk.speech_id",
            "generate_reply.attempt",
            "say.attempt",
        } == foreign
