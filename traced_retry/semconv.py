# SPDX-License-Identifier: Apache-2.0
"""Every span, attribute, metric and value name of this project, once.

Code, dashboards, alert rules, documentation and tests read names from here, so that none of
them can drift from what is emitted. Names of OpenTelemetry's and LiveKit's own vocabularies
keep their spelling; all others begin with ``traced_retry.`` (semantic conventions reserve
``gen_ai.*`` and ``otel.*``).
"""

from __future__ import annotations

from typing import Final, Literal, get_args

SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.40.0"
SCOPE: Final = "traced_retry"
"""Name of the tracer, the meter and the logger."""

# --- spans ------------------------------------------------------------------------------------

SPAN_REPLY: Final = "generate_reply"
"""INTERNAL. One ``generate_reply`` call by the agent, from the call to its outcome."""
SPAN_ATTEMPT: Final = "generate_reply.attempt"
"""CLIENT. One effort to get that reply, as a child of the reply's span."""
SPAN_SAY: Final = "say"
"""INTERNAL. One ``say`` call on a plugin that speaks a given text itself."""
SPAN_SAY_ATTEMPT: Final = "say.attempt"
"""CLIENT. The single request of a ``say``, as a child of its span."""
SPAN_DOCTOR: Final = "traced_retry doctor"
"""INTERNAL. The test span of ``traced-retry doctor``."""

# --- attributes of others ---------------------------------------------------------------------

PROVIDER: Final = "gen_ai.provider.name"
MODEL: Final = "gen_ai.request.model"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"
ERROR_TYPE: Final = "error.type"
GEN_AI_OPERATION: Final = "gen_ai.operation.name"
"""On both spans: ``generate_content``, as on LiveKit's ``realtime_inference`` span."""
GENERATE_CONTENT: Final = "generate_content"
RESPONSE_ID: Final = "gen_ai.response.id"
"""The provider's id of the response, once one has begun. LiveKit's plugin invents it for Gemini."""
LK_RETRY_COUNT: Final = "lk.retry_count"
"""0-based, as on LiveKit's own ``llm_request_run`` and ``tts_request_run`` spans."""
LK_SPEECH_ID: Final = "lk.speech_id"
"""The id of LiveKit's ``SpeechHandle``, as on its ``agent_turn`` span."""
SPAN_KIND: Final = "openinference.span.kind"
"""Whether tools such as Langfuse and Phoenix count the span as a generation: see
:data:`SpanKind`."""

OTHER: Final = "_OTHER"
"""Semantic conventions' word for an ``error.type`` outside the known, bounded set."""

# --- attributes of ours -----------------------------------------------------------------------

OUTCOME: Final = "traced_retry.outcome"
ATTEMPTS: Final = "traced_retry.attempts"
"""The number of attempts (int). It is 0 if the reply ended before its first request, for example
because the session ended."""
DELAY_TOTAL: Final = "traced_retry.delay.total"
"""Seconds spent waiting between attempts, summed (float)."""
STOP_REASON: Final = "traced_retry.stop_reason"

ATTEMPT: Final = "traced_retry.attempt"
"""Number of the attempt (int, from 1)."""
ACTION: Final = "traced_retry.action"
DELAY: Final = "traced_retry.delay"
"""Seconds really waited before this attempt (float). It is 0.0 for the first one, unless the
provider asked an earlier reply of the session to wait."""
ERROR_CODE: Final = "traced_retry.error_code"
"""The provider's own error code, exact. On spans only: it is not bounded."""
RECOVERABLE: Final = "traced_retry.recoverable"
DECISION: Final = "traced_retry.decision"
NEXT_DELAY: Final = "traced_retry.next_delay"
"""Seconds the next attempt is planned to wait (float). A reconnect may make it longer. The real
wait is ``traced_retry.delay`` of that attempt."""
ANSWERED_ATTEMPT: Final = "traced_retry.answered_attempt"
"""The number of the earlier attempt that was answered during this attempt."""
RESULT: Final = "traced_retry.result"
OPERATION: Final = "traced_retry.operation"
"""``say`` on the metrics and log records of a ``say``, and absent for a ``generate_reply``. Spans
have a name instead."""
EXPORTER: Final = "traced_retry.exporter"
"""Which exporter dropped spans: ``otlp``, ``local_store``, or a name given. On metrics only."""
DROP_REASON: Final = "traced_retry.drop_reason"
INITIATOR: Final = "traced_retry.initiator"
"""Who started the reply: see :data:`Initiator`. On spans, metrics and log records."""
TRACE_ID: Final = "trace_id"
"""On log records: 32 lower-case hex digits."""

# --- values -----------------------------------------------------------------------------------

Action = Literal["send", "listen", "restart", "hedge"]
"""``send``: a request goes out. ``listen``: the wait for the answer to an earlier request
continues. ``restart``: a new session is opened, then a request goes out. ``hedge``: a second
request goes out while the first one may still be answered, and the first answer is the reply."""
ACTIONS: Final[tuple[Action, ...]] = get_args(Action)

SpanKind = Literal["CHAIN", "LLM"]
"""``LLM`` on the reply span if LiveKit got no generation, and ``CHAIN`` on all other spans. A
generation is counted on LiveKit's ``realtime_inference`` span, so a reply counts once."""

Initiator = Literal["agent", "provider"]
"""``agent``: the code requested the reply. ``provider``: the provider started it by itself, because
the caller spoke or a tool returned."""
INITIATORS: Final[tuple[Initiator, ...]] = get_args(Initiator)

Decision = Literal["retry", "stop"]
"""Whether another attempt was to follow, when this one had failed."""
DECISIONS: Final[tuple[Decision, ...]] = get_args(Decision)

Result = Literal["succeeded", "failed", "interrupted", "superseded"]
"""How one attempt ended."""
RESULTS: Final[tuple[Result, ...]] = get_args(Result)

Outcome = Literal[
    "succeeded", "recovered", "exhausted", "not_recoverable", "interrupted", "superseded"
]
"""How one reply ended. The outcomes partition replies: their counts sum to the number asked."""
OUTCOMES: Final[tuple[Outcome, ...]] = get_args(Outcome)

StopReason = Literal[
    "max_attempts",
    "deadline",
    "budget",
    "circuit_open",
    "unsafe_to_resend",
    "output_started",
    "not_recoverable",
    "session_closed",
    "interrupted",
    "superseded",
]
"""Why no further attempt was made."""

OUTCOME_OF: Final[dict[StopReason, Outcome]] = {
    "max_attempts": "exhausted",
    "deadline": "exhausted",
    "budget": "exhausted",
    "circuit_open": "exhausted",
    "unsafe_to_resend": "exhausted",
    "output_started": "not_recoverable",
    "not_recoverable": "not_recoverable",
    "session_closed": "not_recoverable",
    "interrupted": "interrupted",
    "superseded": "superseded",
}
"""The one outcome each stop reason leads to."""
STOP_REASONS: Final[tuple[StopReason, ...]] = tuple(OUTCOME_OF)

DropReason = Literal[
    "queue_full",
    "shutdown",
    "connection",
    "timeout",
    "certificate",
    "rate_limited",
    "unavailable",
    "rejected",
    "disk_full",
    "failed",
]
"""Why a span was not delivered. ``shutdown``: it was not confirmed when the time to exit was up.
``rate_limited`` is HTTP 429, ``unavailable`` 502 to 504, ``rejected`` another status. ``failed``
is an exporter that reports no reason."""
DROP_REASONS: Final[tuple[DropReason, ...]] = get_args(DropReason)

# --- metrics ----------------------------------------------------------------------------------

METRIC_ATTEMPTS: Final = "traced_retry.attempts"
METRIC_REPLIES: Final = "traced_retry.replies"
METRIC_ATTEMPT_DURATION: Final = "traced_retry.attempt.duration"
METRIC_REPLY_DURATION: Final = "traced_retry.reply.duration"
METRIC_DELAY: Final = "traced_retry.delay"
METRIC_IN_FLIGHT: Final = "traced_retry.in_flight"
METRIC_LATE_REPLIES: Final = "traced_retry.late_replies"
METRIC_BUDGET_REMAINING: Final = "traced_retry.budget.remaining"
"""Gauge: retries that the process may still send, by provider."""
METRIC_EXPORT_DROPPED: Final = "traced_retry.export.dropped"

DURATION_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0)
"""Seconds. Floats, for Prometheus writes an int bound as ``le="1"`` and a float as ``le="1.0"``.
5 and 10 are the plugins' own timeouts, 20 is the default deadline."""
