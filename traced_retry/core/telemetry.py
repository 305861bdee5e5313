# SPDX-License-Identifier: Apache-2.0
"""The loop's events as spans, metrics and one log record. OpenTelemetry API only.

The contract is in ``docs/telemetry.md``. Every name is in :mod:`traced_retry.semconv`. This module
never reads the text of an exception.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from opentelemetry import context as otel_context
from opentelemetry import metrics, trace
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.util.types import AttributeValue

from traced_retry import semconv
from traced_retry._version import __version__
from traced_retry.core import budget
from traced_retry.core.attempt import Attempt
from traced_retry.core.failure import Failure
from traced_retry.core.guard import log_suppressed, suppress_and_log
from traced_retry.core.request import Request

logger = logging.getLogger(semconv.SCOPE)

Attributes = dict[str, AttributeValue]
T = TypeVar("T")
M = TypeVar("M", bound=Callable[..., object])

_NOWHERE = trace.set_span_in_context(trace.INVALID_SPAN, otel_context.Context())
"""A context outside of any span, for counts without an exemplar. One of "exhausted", counted as 0,
would lead to a call that was not exhausted. The exemplars of replies in flight would cost 4 % of
the whole telemetry. (An empty context would not do, because the SDK takes that for none.)"""

_SUPPRESSED = "suppress_instrumentation"
"""The context key that ``opentelemetry.instrumentation.utils.suppress_instrumentation`` sets."""


@dataclass(frozen=True)
class Target:
    """The provider, model and server of a request, on both spans and every metric."""

    provider: str
    """``gen_ai.provider.name``: semantic conventions' value, or a plain lower-case name."""
    model: str | None = None
    server_address: str | None = None
    server_port: int | None = None
    say: bool = False
    """Whether a given text is to be spoken, and not a reply to be made."""
    initiator: semconv.Initiator = "agent"
    """Who starts the reply."""
    labels: Attributes = field(init=False, repr=False, compare=False)
    """The labels that every metric has."""
    attempt_labels: dict[tuple[semconv.Action, semconv.Result], Attributes] = field(
        init=False, repr=False, compare=False
    )
    """The labels of one attempt on metrics, without the reason of its failure."""
    reply_labels: dict[semconv.Outcome, Attributes] = field(init=False, repr=False, compare=False)
    """The labels of one reply on metrics, without its stop reason."""
    attributes: Attributes = field(init=False, repr=False, compare=False)
    """The known parts of the target as span attributes."""

    @property
    def key(self) -> tuple[str, str | None, str | None, int | None]:
        """Return the parts that name the model on its server."""
        return self.provider, self.model, self.server_address, self.server_port

    def __post_init__(self) -> None:
        labels: Attributes = {semconv.PROVIDER: self.provider, semconv.INITIATOR: self.initiator}
        if self.say:
            labels[semconv.OPERATION] = "say"
        # LiveKit's own span counts as the generation, and ours as steps around it.
        kind: semconv.SpanKind = "CHAIN"
        known = {
            semconv.SPAN_KIND: kind,
            semconv.GEN_AI_OPERATION: semconv.GENERATE_CONTENT,
            semconv.PROVIDER: self.provider,
            semconv.INITIATOR: self.initiator,
            semconv.MODEL: self.model,
            semconv.SERVER_ADDRESS: self.server_address,
            semconv.SERVER_PORT: self.server_port,
        }
        # A frozen dataclass sets its further fields in this way.
        object.__setattr__(self, "labels", labels)
        object.__setattr__(
            self,
            "attempt_labels",
            {
                (action, result): {**labels, semconv.ACTION: action, semconv.RESULT: result}
                for action in semconv.ACTIONS
                for result in semconv.RESULTS
            },
        )
        object.__setattr__(
            self, "reply_labels", {o: {**labels, semconv.OUTCOME: o} for o in semconv.OUTCOMES}
        )
        object.__setattr__(
            self, "attributes", {name: value for name, value in known.items() if value is not None}
        )


class Telemetry:
    """The tracer and the instruments. All replies share one object per set of providers.

    Args:
        tracer_provider: default: the global one, at the time of each span.
        meter_provider: default: the global one, likewise.
        tracer: a tracer to use unchanged, instead of ``tracer_provider``.
        in_livekit: put LiveKit's ``lk.retry_count`` on attempt spans.
    """

    def __init__(
        self,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
        *,
        tracer: trace.Tracer | None = None,
        in_livekit: bool = False,
    ) -> None:
        self.in_livekit = in_livekit
        self.tracer = tracer or trace.get_tracer(
            semconv.SCOPE, __version__, tracer_provider, semconv.SCHEMA_URL
        )
        meter = metrics.get_meter(
            semconv.SCOPE, __version__, meter_provider, schema_url=semconv.SCHEMA_URL
        )
        self.attempts = meter.create_counter(
            semconv.METRIC_ATTEMPTS, "{attempt}", "Attempts to get a reply that have ended."
        )
        self.replies = meter.create_counter(
            semconv.METRIC_REPLIES, "{reply}", "Replies that have ended, by outcome."
        )
        self.attempt_duration = _seconds(
            meter, semconv.METRIC_ATTEMPT_DURATION, "Time from the start of an attempt to its end."
        )
        self.reply_duration = _seconds(
            meter,
            semconv.METRIC_REPLY_DURATION,
            "Time until a reply starts or fails: the caller's silence.",
        )
        self.delay = _seconds(
            meter, semconv.METRIC_DELAY, "Time waited before an attempt, except the first."
        )
        self.in_flight = meter.create_up_down_counter(
            semconv.METRIC_IN_FLIGHT, "{reply}", "Replies that have not ended."
        )
        self.late_replies = meter.create_counter(
            semconv.METRIC_LATE_REPLIES,
            "{reply}",
            "Replies heard after their failure was reported.",
        )
        meter.create_observable_gauge(
            semconv.METRIC_BUDGET_REMAINING,
            [_observe_budgets],
            "{attempt}",
            "Retries that this process may still send.",
        )
        self._zeroed: set[tuple[str, bool, str]] = set()

    def reply(self, target: Target) -> ReplyTrace:
        """Return the telemetry of one reply."""
        return (
            TurnTrace(self, target) if target.initiator == "provider" else ReplyTrace(self, target)
        )

    def initialize_counters(
        self,
        provider: str,
        actions: tuple[semconv.Action, ...] = ("send",),
        *,
        say: bool = False,
        initiator: semconv.Initiator = "agent",
    ) -> None:
        """Start the counters of ``provider`` at 0, once. With ``say``, start those of its ``say``.

        A counter that starts at 1 has no increase, so Prometheus would miss the first failure.
        """
        if (provider, say, initiator) in self._zeroed:
            return
        self._zeroed.add((provider, say, initiator))
        target = Target(provider, say=say, initiator=initiator)
        with suppress_and_log("zero-initialising the counters"):
            self.late_replies.add(0, target.labels, _NOWHERE)
            for outcome in ("succeeded", "recovered"):
                self.replies.add(0, {**target.labels, semconv.OUTCOME: outcome}, _NOWHERE)
            for reason, outcome in semconv.OUTCOME_OF.items():
                of = {**target.labels, semconv.OUTCOME: outcome}
                self.replies.add(0, {**of, semconv.STOP_REASON: reason}, _NOWHERE)
            for action in actions:
                of = {**target.labels, semconv.ACTION: action}
                self.attempts.add(0, {**of, semconv.RESULT: "succeeded"}, _NOWHERE)
                of = {**of, semconv.RESULT: "failed", semconv.RECOVERABLE: True}
                for kind in ("timeout", "connection_lost", "server_error", "rate_limit_exceeded"):
                    self.attempts.add(0, {**of, semconv.ERROR_TYPE: kind}, _NOWHERE)
            for tell in on_counters_initialized:
                tell()


on_counters_initialized: list[Callable[[], None]] = []
"""Called after counters were started at 0 and before their first reply, to export the zeros."""


def _observe_budgets(_: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
    for provider, tokens in budget.remaining():
        yield metrics.Observation(tokens, {semconv.PROVIDER: provider})


def _seconds(meter: metrics.Meter, name: str, description: str) -> metrics.Histogram:
    return meter.create_histogram(
        name, "s", description, explicit_bucket_boundaries_advisory=semconv.DURATION_BUCKETS
    )


def _suppress_and_log(method: M) -> M:
    """Wrap ``method``, so that its failures are logged once and suppressed."""

    @functools.wraps(method)
    def guarded(*args: object) -> object:
        try:
            return method(*args)
        except Exception as error:  # noqa: BLE001 - whatever an SDK, exporter or sampler raises
            log_suppressed(f"telemetry ({method.__name__})", error)
            return None

    return guarded  # type: ignore[return-value]


def _attempt_end(attempt: Attempt[Any]) -> Attributes:
    """Return the attributes that are known once an attempt has ended."""
    attributes: Attributes = {semconv.RESULT: attempt.result}
    failure = attempt.failure
    if failure is not None:
        attributes[semconv.ERROR_TYPE] = failure.error_type
        attributes[semconv.RECOVERABLE] = failure.recoverable
        attributes[semconv.DECISION] = "stop" if attempt.next_action is None else "retry"
        if failure.code is not None:
            attributes[semconv.ERROR_CODE] = failure.code
        if attempt.next_action is not None:
            attributes[semconv.NEXT_DELAY] = attempt.next_delay
    if (delivery := attempt.delivery) is not None:
        if delivery.response_id:
            attributes[semconv.RESPONSE_ID] = delivery.response_id
        if delivery.answers_attempt is not None:
            attributes[semconv.ANSWERED_ATTEMPT] = delivery.answers_attempt
    return attributes


@contextmanager
def _current(context: otel_context.Context | None) -> Iterator[None]:
    """Make ``context`` current, so that a log record carries its span. None changes no context."""
    token = None if context is None else otel_context.attach(context)
    try:
        yield
    finally:
        if token is not None:
            otel_context.detach(token)


class ReplyTrace:
    """The spans, metrics and log records of one reply. Only :meth:`call` may raise.

    Arguments are positional, and attributes are built only if the span is recording, because this
    code runs for every reply.
    """

    __slots__ = (
        "_attempts",
        "_began",
        "_context",
        "_response_id",
        "_silent",
        "_span",
        "_started",
        "_telemetry",
        "_waited",
        "has_generation",
        "speech_id",
        "target",
    )

    def __init__(self, telemetry: Telemetry, target: Target) -> None:
        self._telemetry = telemetry
        self.target = target
        # Retries go on if instrumentation is suppressed. They are only not recorded.
        self._silent = otel_context.get_current().get(_SUPPRESSED)
        self._span: trace.Span = trace.INVALID_SPAN
        self._context: otel_context.Context | None = None
        """The context of the reply's span. None if the reply is not traced."""
        self._attempts = 0
        self._waited = 0.0
        self._response_id: str | None = None
        self.speech_id: str | None = None
        """The id of LiveKit's ``SpeechHandle``, if there is one."""
        self.has_generation = False
        """Whether LiveKit got a generation of this reply, for which it starts its own span."""

    @property
    def trace_id(self) -> str | None:
        """Return 32 hexadecimal digits, or None if no backend gets the trace."""
        context = self._span.get_span_context()
        return trace.format_trace_id(context.trace_id) if context.trace_flags.sampled else None

    def begin(self, began: float, ago: float) -> None:
        """Start the span of the reply, which began ``ago`` seconds ago.

        ``began`` is the event loop's time at that moment.
        """
        if self._silent:
            return
        try:
            # The system's clock is read once per reply. It may be set back during the reply, so all
            # other times of its spans are this one plus seconds of the event loop's clock.
            self._began, self._started = began, time.time_ns()
            if ago:
                self._started -= round(ago * 1e9)
            try:
                self._start_span()
            finally:
                self._telemetry.in_flight.add(1, self.target.labels, _NOWHERE)
        except Exception as error:  # noqa: BLE001 - as in _suppress_and_log
            log_suppressed("telemetry (begin)", error)

    def _start_span(self) -> None:
        self._span = self._telemetry.tracer.start_span(
            semconv.SPAN_SAY if self.target.say else semconv.SPAN_REPLY,
            None,
            SpanKind.INTERNAL,
            self.target.attributes,
            None,
            self._started,
        )
        # Without an SDK the span has no context of its own, so there is no span to nest below.
        if self._span.get_span_context().is_valid:
            self._context = trace.set_span_in_context(self._span)

    def attempt_began(self, attempt: Attempt[Any]) -> None:
        """Start the span of ``attempt``."""
        self._attempts = attempt.number
        if self._context is None:
            return
        try:
            attributes = {
                **self.target.attributes,
                semconv.ATTEMPT: attempt.number,
                semconv.ACTION: attempt.action,
                semconv.DELAY: attempt.delay,
            }
            if self._telemetry.in_livekit:
                attributes[semconv.LK_RETRY_COUNT] = attempt.number - 1
            attempt.span = self._telemetry.tracer.start_span(
                semconv.SPAN_SAY_ATTEMPT if self.target.say else semconv.SPAN_ATTEMPT,
                self._context,
                SpanKind.CLIENT,
                attributes,
                None,
                self._unix(attempt.began),
            )
            attempt.context = trace.set_span_in_context(attempt.span, self._context)
        except Exception as error:  # noqa: BLE001 - as in _suppress_and_log
            log_suppressed("telemetry (attempt_began)", error)

    def call(self, attempt: Attempt[T], request: Request[T]) -> asyncio.Future[T]:
        """Send ``attempt`` with ``request``, and its span as the current one.

        Raises:
            BaseException: if ``request`` raises, unchanged.
        """
        if attempt.context is None:
            return request.attempt(attempt.action)
        token = otel_context.attach(attempt.context)
        try:
            return request.attempt(attempt.action)
        finally:
            otel_context.detach(token)

    def attempt_ended(self, attempt: Attempt[Any], seconds: float) -> None:
        """End the span of ``attempt`` after ``seconds``, and count the attempt."""
        failure = attempt.failure
        if failure is not None and attempt.next_action is not None:
            self._log_retry(attempt.context, failure, attempt.next_action, attempt.next_delay)
        if self._silent:
            return
        if attempt.delivery is not None:
            self._response_id = attempt.delivery.response_id
        telemetry, context = self._telemetry, attempt.context
        labels = self.target.attempt_labels[attempt.action, attempt.result]
        try:
            if failure is not None:
                labels = {**labels, semconv.ERROR_TYPE: failure.error_type}
            try:
                if self._context is not None:
                    attempt.span.set_attributes(_attempt_end(attempt))
                    if failure is not None:
                        attempt.span.set_status(StatusCode.ERROR)
                telemetry.attempt_duration.record(seconds, labels, context)
                if failure is not None:
                    labels = {**labels, semconv.RECOVERABLE: failure.recoverable}
                telemetry.attempts.add(1, labels, context)
            finally:
                if self._context is not None:
                    attempt.span.end(self._unix(attempt.began + seconds))
        except Exception as error:  # noqa: BLE001 - as in _suppress_and_log
            log_suppressed("telemetry (attempt_ended)", error)

    @_suppress_and_log
    def waited(self, seconds: float) -> None:
        """Record a wait before an attempt. It may have been cut short."""
        self._waited += seconds
        if not self._silent:
            self._telemetry.delay.record(seconds, self.target.labels, self._context)

    def end(
        self,
        stop: semconv.StopReason | None,
        seconds: float,
        failure: Failure | None,
    ) -> None:
        """End the span of the reply after ``seconds``, and count the reply.

        ``stop`` is None if the reply succeeded. ``failure`` holds the error raised to the agent.
        """
        if stop is not None:
            outcome = semconv.OUTCOME_OF[stop]
        else:
            outcome = "succeeded" if self._attempts == 1 else "recovered"
        if failure is not None and stop is not None:
            self._log_failed(failure, outcome, stop, self._attempts, seconds)
        if self._silent:
            return
        telemetry, context = self._telemetry, self._context
        labels = self.target.reply_labels[outcome]
        try:
            try:
                telemetry.in_flight.add(-1, self.target.labels, _NOWHERE)
                if context is not None:
                    self._span.set_attributes(self._end_attributes(outcome, stop, failure))
                    if failure is not None:
                        self._span.set_status(StatusCode.ERROR)
                telemetry.reply_duration.record(seconds, labels, context)
                if stop is not None:
                    labels = {**labels, semconv.STOP_REASON: stop}
                telemetry.replies.add(1, labels, context)
            finally:
                if context is not None:
                    self._span.end(self._unix(self._began + seconds))
        except Exception as error:  # noqa: BLE001 - as in _suppress_and_log
            log_suppressed("telemetry (end)", error)

    def _unix(self, at: float) -> int:
        """Return the Unix time in ns of the event loop's time ``at``."""
        return self._started + round((at - self._began) * 1e9)

    def _end_attributes(
        self,
        outcome: semconv.Outcome,
        stop: semconv.StopReason | None,
        failure: Failure | None,
    ) -> Attributes:
        """Return the attributes that are known once the reply has ended."""
        attributes: Attributes = {
            semconv.OUTCOME: outcome,
            semconv.ATTEMPTS: self._attempts,
            semconv.DELAY_TOTAL: self._waited,
        }
        if not self.has_generation:
            kind: semconv.SpanKind = "LLM"
            attributes[semconv.SPAN_KIND] = kind
        if stop is not None:
            attributes[semconv.STOP_REASON] = stop
        if failure is not None:
            attributes[semconv.ERROR_TYPE] = failure.error_type
        if self._response_id:
            attributes[semconv.RESPONSE_ID] = self._response_id
        if self.speech_id is not None:
            attributes[semconv.LK_SPEECH_ID] = self.speech_id
        return attributes

    def discard(self) -> bool:
        """Forget the reply, if it is none of its own, and return whether it was forgotten."""
        return False

    @_suppress_and_log
    def late(self) -> None:
        """Count a reply that was heard after its failure was reported."""
        if not self._silent:
            self._telemetry.late_replies.add(1, self.target.labels, self._context)
        with _current(self._context):
            logger.warning(
                "%s %s heard after it was reported as failed, trace %s",
                self.target.provider,
                "say" if self.target.say else "reply",
                self.trace_id or "none",
                extra={**self.target.labels, semconv.TRACE_ID: self.trace_id or ""},
            )

    # --- log records ---------------------------------------------------------------------------

    @_suppress_and_log
    def _log_retry(
        self,
        context: otel_context.Context | None,
        failure: Failure,
        then: semconv.Action,
        next_delay: float,
    ) -> None:
        with _current(context):
            logger.info(
                "%s attempt failed (%s), %s in %.2f s",
                self.target.provider,
                failure.code or failure.error_type,
                then,
                next_delay,
                extra={
                    **self.target.labels,
                    semconv.ERROR_TYPE: failure.error_type,
                    semconv.ACTION: then,
                    semconv.NEXT_DELAY: next_delay,
                    semconv.TRACE_ID: self.trace_id or "",
                },
            )

    @_suppress_and_log
    def _log_failed(
        self,
        failure: Failure,
        outcome: semconv.Outcome,
        stop: semconv.StopReason,
        attempts: int,
        seconds: float,
    ) -> None:
        with _current(self._context):
            logger.warning(
                "%s %s failed (%s) after %d attempt(s) and %.2f s: %s, stopped by %s, trace %s",
                self.target.provider,
                "say" if self.target.say else "reply",
                failure.code or failure.error_type,
                attempts,
                seconds,
                outcome,
                stop,
                self.trace_id or "none",
                extra={
                    **self.target.labels,
                    semconv.OUTCOME: outcome,
                    semconv.STOP_REASON: stop,
                    semconv.ERROR_TYPE: failure.error_type,
                    semconv.ATTEMPTS: attempts,
                    semconv.TRACE_ID: self.trace_id or "",
                },
            )


class TurnTrace(ReplyTrace):
    """The telemetry of a reply that the provider started.

    A response that only calls a tool is no reply of its own, because the reply to the tool's result
    is counted. So the spans start once the first attempt has ended, with their true times.
    """

    __slots__ = ()

    def _start_span(self) -> None:
        """Wait for the end of the first attempt."""

    def attempt_began(self, attempt: Attempt[Any]) -> None:
        """Start the span of ``attempt``, unless it is the first one."""
        self._attempts = attempt.number
        if attempt.number > 1:
            super().attempt_began(attempt)

    @_suppress_and_log
    def attempt_ended(self, attempt: Attempt[Any], seconds: float) -> None:
        """End the span of ``attempt`` after ``seconds``, and count the attempt."""
        if attempt.number == 1 and not self._silent:
            super()._start_span()
            super().attempt_began(attempt)
        # LiveKit gets the generation from the plugin, before the reply knows if it fails.
        self.has_generation = self.has_generation or attempt.delivery is not None
        super().attempt_ended(attempt, seconds)

    @_suppress_and_log
    def discard(self) -> bool:
        """Forget the reply if it was not retried, and return whether it was forgotten."""
        if self._attempts > 1:
            return False
        if not self._silent:
            self._telemetry.in_flight.add(-1, self.target.labels, _NOWHERE)
        return True
