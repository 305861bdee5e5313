# SPDX-License-Identifier: Apache-2.0
"""Tools that count LLM calls count each reply once, in LiveKit's spans and ours together."""

from __future__ import annotations

import asyncio

import pytest
from livekit.agents import telemetry as livekit_telemetry
from opentelemetry import trace
from support.conversation import ended
from support.generation_rules import RULES, generations

from traced_retry import semconv

LIVEKITS = "realtime_inference"


@pytest.fixture
async def play(start_conversation, recorder):
    """Return a function that runs a script to its end, and records LiveKit's own spans, too."""
    livekit_telemetry.set_tracer_provider(recorder.tracer_provider)

    async def play(script, *, turn=False, reply=None, **policy):
        talk = await start_conversation(script, **policy)
        if turn:
            await talk.server.wait_for("connected")
            await asyncio.sleep(1.0)
            await talk.server.caller_speaks("hello")
            await asyncio.sleep(40.0)
        else:
            await talk.reply(**(reply or {}))
        await talk.session.aclose()
        return recorder.spans()

    yield play
    livekit_telemetry.set_tracer_provider(trace.get_tracer_provider())


class Case:
    """A script, the outcome of its reply, and the span that counts as the generation."""

    def __init__(self, script, outcome, counted, **options):
        self.script, self.outcome, self.counted, self.options = script, outcome, counted, options


CASES = {
    "heard": Case("ok", "succeeded", LIVEKITS),
    "retried": Case("rate_limit,ok", "recovered", LIVEKITS),
    "retried response": Case("failed,ok", "recovered", LIVEKITS),
    "retried after a started response": Case("failed_later,ok", "recovered", LIVEKITS),
    "lost": Case("rate_limit,rate_limit", "exhausted", semconv.SPAN_REPLY, max_retries=1),
    "lost response": Case("failed,failed", "exhausted", semconv.SPAN_REPLY, max_retries=1),
    "cut off": Case("failed_during", "not_recoverable", LIVEKITS),
    "turn": Case("turn:ok", "succeeded", LIVEKITS, turn=True),
    "retried turn": Case("ok,turn:failed", "recovered", LIVEKITS, turn=True),
    "lost turn": Case("failed,turn:failed", "exhausted", LIVEKITS, turn=True, max_retries=1),
    "unanswered turn": Case("turn:silence", "exhausted", semconv.SPAN_REPLY, turn=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_reply_counts_as_one_generation(case, play, recorder):
    """By the rules of each tool, exactly one span of the reply is a generation."""
    spans = await play(case.script, **case.options)

    assert [case.outcome] == [outcome for outcome, _ in ended(recorder, None)]
    for tool, rules in RULES.items():
        assert (tool, [case.counted]) == (tool, generations(rules, spans))


async def test_both_spans_have_operation_of_livekit(play, recorder):
    """The operation of our spans is that of LiveKit's own span."""
    spans = await play("rate_limit,ok")

    (livekits,) = (span for span in spans if span.name == LIVEKITS)
    operation = livekits.attributes["gen_ai.operation.name"]
    ours = recorder.replies + recorder.attempts
    assert [operation] * 3 == [span["gen_ai.operation.name"] for span in ours]


@pytest.mark.parametrize("reply", [{}, {"user_input": "hello"}], ids=["alone", "user input"])
async def test_reply_span_is_sibling_of_agent_turn(reply, play, recorder):
    """Both are children of the session, and have the same speech."""
    await play("rate_limit,ok", reply=reply)

    (session,) = recorder.spans("agent_session")
    ((ours,), (turn,)) = map(recorder.spans, (semconv.SPAN_REPLY, "agent_turn"))
    assert {session.context.span_id} == {ours.parent.span_id, turn.parent.span_id}
    assert turn.attributes["lk.speech_id"] == ours.attributes["lk.speech_id"]
