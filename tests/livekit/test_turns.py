# SPDX-License-Identifier: Apache-2.0
"""Replies that the provider starts, because the caller spoke: traced, recovered and reported."""

from __future__ import annotations

import asyncio

import pytest
from livekit.agents import Agent, function_tool
from support.conversation import Calls, actions, codes, configured, ended, late, now
from support.providers import (
    GOOGLE,
    NOVA_SONIC,
    OPENAI,
    PHONIC,
    SHARED_ENGINE,
    ULTRAVOX,
    VOICELIVE,
)

import traced_retry
from traced_retry import semconv
from traced_retry.simulator import OpenAISimulator

RECOVERING = {"openai": OPENAI, **SHARED_ENGINE}
OBSERVED = {
    "google": GOOGLE,
    "ultravox": ULTRAVOX,
    "phonic": PHONIC,
    "aws": NOVA_SONIC,
    "voicelive": VOICELIVE,
}


class Clerk(Agent):
    """An agent with a tool."""

    def __init__(self):
        super().__init__(instructions="SECRET instructions")
        self.calls = 0

    @function_tool
    async def look_up(self) -> str:
        """Look an order up."""
        self.calls += 1
        return "SECRET result"


async def speak(talk, transcript="hello", seconds=40.0):
    """Have the caller speak once, and let time pass."""
    await talk.server.caller_speaks(transcript)
    await asyncio.sleep(seconds)


def initiators(recorder):
    """The initiator of each reply."""
    return [reply[semconv.INITIATOR] for reply in recorder.replies]


@pytest.fixture
def failures():
    """Return an empty list of failed replies."""
    return Calls()


@pytest.fixture(params=RECOVERING, ids=str)
def recovering(request):
    """Return a provider whose replies carry ids."""
    return RECOVERING[request.param]


class TestAnswer:
    async def test_answer_to_caller_is_counted(self, recovering, start_conversation, recorder):
        """The server's own reply has one span with one attempt, which listened."""
        talk = await start_conversation("turn:ok", provider=recovering)
        await configured(talk)
        await speak(talk)

        assert ["answer 1"] == talk.heard
        assert [("succeeded", None)] == ended(recorder, None)
        assert ["listen"] == actions(recorder, None)
        assert ["provider"] == initiators(recorder)
        assert [] == talk.server.requests

    async def test_call_with_eleven_heard_replies_counts_eleven(self, start_conversation, recorder):
        """A response that calls a tool is not counted, because the reply to the result is."""
        agent = Clerk()
        turns = ",".join(["turn:ok", "turn:ok", "turn:tool:look_up"] * 3 + ["turn:ok"])
        talk = await start_conversation(turns, agent=agent)
        await configured(talk)
        await talk.reply()
        for _ in range(10):
            await speak(talk, seconds=5.0)

        assert (11, 3) == (len(talk.heard), agent.calls)
        assert [("succeeded", None)] * 11 == ended(recorder, None)
        assert {"agent": 4, "provider": 7} == recorder.counted(
            "traced_retry.replies", semconv.INITIATOR
        )
        assert {0} == set(recorder.points("traced_retry.in_flight").values())

    async def test_duration_begins_when_caller_stops_speaking(self, start_conversation, recorder):
        """The time until the server ends the turn, and begins to answer, is part of the silence."""

        class Thoughtful(OpenAISimulator):
            def connect(self, ws, http):
                connection = super().connect(ws, http)
                send = connection.send

                async def send_later(kind, **fields):
                    if kind == "input_audio_buffer.committed":
                        await asyncio.sleep(0.5)
                    await send(kind, **fields)

                connection.send = send_later
                return connection

        talk = await start_conversation("turn:late:3", simulator=Thoughtful)
        await configured(talk)
        await speak(talk)

        ((_, seconds),) = recorder.points("traced_retry.reply.duration").values()
        assert 3.5 == pytest.approx(seconds, abs=0.01)
        (span,) = (s for s in recorder.spans() if s.name == "generate_reply")
        assert 3.5 == pytest.approx((span.end_time - span.start_time) / 1e9, abs=0.01)

    async def test_spans_name_response_and_speech(self, start_conversation, recorder):
        """An engineer can go from the reply to LiveKit's turn, and back."""
        talk = await start_conversation("turn:ok")
        speeches = []
        talk.session.on("speech_created", lambda event: speeches.append(event.speech_handle.id))
        await configured(talk)
        await speak(talk)
        await talk.reply()

        assert speeches == [reply[semconv.LK_SPEECH_ID] for reply in recorder.replies]
        ids = [attempt[semconv.RESPONSE_ID] for attempt in recorder.attempts]
        assert ids == [reply[semconv.RESPONSE_ID] for reply in recorder.replies]
        assert 2 == len(set(ids))

    async def test_no_answer_is_expected_without_turn_detection(
        self, start_conversation, recorder, failures
    ):
        """A server that was told not to start replies owes none."""
        talk = await start_conversation(
            "turn:silence", options={"turn_detection": None}, on_exhausted=failures
        )
        await configured(talk)
        await speak(talk)

        assert ([], []) == (recorder.replies, failures)

    async def test_server_that_confirms_no_update(self, start_conversation, recorder):
        """Its first event says that it answers the caller, so a silent turn is reported."""

        class Terse(OpenAISimulator):
            def connect(self, ws, http):
                connection = super().connect(ws, http)
                connection.handlers["session.update"] = connection.ignore
                connection.configured = True
                connection.session["turn_detection"] = {"type": "server_vad"}
                return connection

        talk = await start_conversation("ok,turn:silence", simulator=Terse)
        assert None is await talk.reply()
        await speak(talk)

        assert [("succeeded", None), ("exhausted", "unsafe_to_resend")] == ended(recorder, None)
        assert ["agent", "provider"] == initiators(recorder)

    @pytest.mark.parametrize("fault", ["silence", "stalled"])
    async def test_caller_speaks_again(self, fault, start_conversation, recorder, failures):
        """A turn that the caller goes on with is interrupted, before its answer or in it."""
        talk = await start_conversation(f"turn:{fault},turn:ok", on_exhausted=failures)
        await configured(talk)
        await speak(talk, seconds=2.0)
        await speak(talk)

        assert ["answer 2"] == talk.heard
        assert [("interrupted", "interrupted"), ("succeeded", None)] == ended(recorder, None)
        assert [] == failures

    async def test_request_of_agent_answers_caller(self, start_conversation, recorder, failures):
        """The turn is superseded if the agent's own request is answered first."""
        talk = await start_conversation("ok,turn:silence", on_exhausted=failures)
        await configured(talk)
        await speak(talk, seconds=1.0)
        await talk.reply()
        await asyncio.sleep(40.0)

        assert ["reply 1"] == talk.heard
        assert {("superseded", "superseded"), ("succeeded", None)} == set(ended(recorder, None))
        assert [] == failures


class TestRecovery:
    @pytest.mark.parametrize(
        "fault", ["failed", "failed_later", "failed_message", "rate_limit", "drop_before"]
    )
    async def test_failed_answer_is_requested_again(
        self, fault, recovering, start_conversation, recorder
    ):
        """The caller hears the reply once, in the streams that the agent already has."""
        talk = await start_conversation(f"turn:{fault}", provider=recovering)
        speeches = []
        talk.session.on("speech_created", lambda event: speeches.append(event.speech_handle))
        await configured(talk)
        await speak(talk)

        assert ["reply 1"] == talk.heard
        assert [("recovered", None)] == ended(recorder, None)
        assert ["listen", "send"] == actions(recorder, None)
        assert ["provider"] == initiators(recorder)
        (speech,) = speeches
        assert (True, None) == (speech.done(), speech.exception())

    async def test_answer_fails_twice(self, start_conversation, recorder):
        """Our own request follows the rules of an agent's request."""
        talk = await start_conversation("failed,error:server_error,ok,turn:failed")
        await configured(talk)
        await speak(talk)

        assert ["reply 3"] == talk.heard
        assert ["listen", "send", "send", "send"] == actions(recorder, None)

    async def test_tool_in_recovered_answer_runs_once(self, start_conversation, recorder):
        """The recovered response calls a tool, and the agent requests the reply to its result."""
        agent = Clerk()
        talk = await start_conversation("tool:look_up,ok,turn:failed", agent=agent)
        await configured(talk)
        await speak(talk)

        assert (["reply 2"], 1) == (talk.heard, agent.calls)
        assert [("recovered", None), ("succeeded", None)] == ended(recorder, None)


REPORTED = {
    # fault: the code, the stop reason, and the longest time until the agent's code knows
    "incomplete": ("content_filter", "not_recoverable", 0.1),
    "failed:insufficient_quota": ("insufficient_quota", "not_recoverable", 0.1),
    "failed_during": ("server_error", "output_started", 0.2),
    "drop_during": ("connection_lost", "output_started", 0.2),
    "empty": ("empty_response", "unsafe_to_resend", 0.1),
    "silence": ("timeout", "unsafe_to_resend", 10.0),
    "uncorrelated": ("server_error", "unsafe_to_resend", 0.1),
    "quota": ("insufficient_quota", "not_recoverable", 0.1),
}


class TestReport:
    @pytest.mark.parametrize("fault", REPORTED)
    async def test_lost_answer_is_reported(self, fault, start_conversation, recorder, failures):
        """The agent's code, the trace and the metrics show it once, and at once."""
        code, stop, seconds = REPORTED[fault]
        talk = await start_conversation(f"turn:{fault}", on_exhausted=failures)
        speeches = []
        talk.session.on("speech_created", lambda event: speeches.append(event.speech_handle))
        await configured(talk)
        began = now()
        await speak(talk)

        assert [code] == codes(recorder, None)
        assert [(semconv.OUTCOME_OF[stop], stop)] == ended(recorder, None)
        (failed,) = failures
        assert (stop, (code,), "provider") == (failed.stop_reason, failed.codes, failed.initiator)
        assert failures.at[0] - began <= seconds + 0.01
        assert speeches == ([] if failed.speech is None else [failed.speech])
        assert talk.session is failed.session
        assert all(s.done() and s.exception() is not None for s in speeches)
        assert [] == talk.server.requests

    async def test_words_without_transcript_are_lost_with_connection(
        self, start_conversation, recorder, failures
    ):
        """A new connection does not know the caller's words, so a request would be nonsense."""
        errors = []
        talk = await start_conversation(
            "turn:drop_before",
            on_exhausted=failures,
            classify=lambda why: errors.append(str(why.error)),
        )
        await configured(talk)
        await speak(talk, transcript=None)

        assert ([], []) == (talk.heard, talk.server.requests)
        assert ["the connection was lost before the reply (connection_lost)"] == errors
        assert ["connection_lost"] == codes(recorder, None)
        assert ["provider"] == [failed.initiator for failed in failures]

    async def test_late_answer_is_counted_as_late(self, start_conversation, recorder, failures):
        """An answer after the report is heard, as with the plugin alone, and is no new reply."""
        talk = await start_conversation("turn:late:12", on_exhausted=failures)
        await configured(talk)
        await speak(talk)

        assert (["answer 1"], 1, 1) == (talk.heard, len(failures), late(recorder))
        assert [("exhausted", "unsafe_to_resend")] == ended(recorder, None)

    async def test_only_one_answer_is_late(self, start_conversation, recorder, failures):
        """A response of the server's own after the late answer is a reply of its own."""
        talk = await start_conversation("turn:late:12,turn:ok", on_exhausted=failures)
        await configured(talk)
        await speak(talk)
        (connection,) = talk.server._open
        turn = talk.server.take_turn()
        await connection.answer(turn, turn.fault)
        await asyncio.sleep(1.0)

        assert (["answer 1", "answer 2"], 1) == (talk.heard, late(recorder))
        assert [("exhausted", "unsafe_to_resend"), ("succeeded", None)] == ended(recorder, None)

    async def test_session_closes_before_answer(self, start_conversation, recorder, failures):
        """A turn without an answer ends with its session."""
        talk = await start_conversation("turn:silence", on_exhausted=failures)
        await configured(talk)
        await speak(talk, seconds=1.0)
        await talk.session.aclose()

        assert [("not_recoverable", "session_closed")] == ended(recorder, None)
        assert {0} == set(recorder.points("traced_retry.in_flight").values())


class TestObserved:
    """On providers without ids, and on VoiceLive, a reply is counted and never requested."""

    @pytest.fixture(params=OBSERVED)
    def observed(self, request):
        """Return a provider that is only observed."""
        return OBSERVED[request.param]

    async def test_answer_to_caller_is_counted(self, observed, start_conversation, recorder):
        """The provider's own reply has one span with one attempt, which listened."""
        talk = await start_conversation("turn:ok", provider=observed)
        await configured(talk)
        await speak(talk)
        await speak(talk)

        assert ["answer 1", "answer 2"] == talk.heard
        assert [("succeeded", None)] * 2 == ended(recorder, None)
        assert ["listen"] * 2 == actions(recorder, None)
        assert ["provider"] * 2 == initiators(recorder)
        assert [] == talk.server.requests
        assert {0} == set(recorder.points("traced_retry.in_flight").values())

    @pytest.mark.parametrize("fault", ["silence", "drop_during", "drop_before", "rate_limit"])
    async def test_lost_answer_is_reported_once(
        self, fault, observed, start_conversation, recorder, failures
    ):
        """The failure is reported once. Nothing is sent, except by the plugin itself."""
        talk = await start_conversation(f"turn:{fault}", provider=observed, on_exhausted=failures)
        await configured(talk)
        began = now()
        await speak(talk)

        if observed is NOVA_SONIC and fault == "rate_limit":
            # The plugin opens another stream and sends the caller's words again.
            assert [("succeeded", None)] == ended(recorder, None)
            return
        (reply,) = recorder.replies
        assert reply[semconv.OUTCOME] in ("exhausted", "not_recoverable")
        (failed,) = failures
        assert "provider" == failed.initiator
        assert failures.at[0] - began <= (20.0 if observed is GOOGLE else 10.01)
        assert [] == talk.server.requests
        assert 0 == recorder.open_spans
        # Gemini answers after all, on the next connection.
        assert (observed is GOOGLE and fault == "drop_before") == late(recorder)

    async def test_replies_of_both_initiators(self, observed, start_conversation, recorder):
        """Each reply is counted once, under its initiator."""
        talk = await start_conversation("ok,turn:ok", provider=observed)
        await configured(talk)
        for _ in range(3):
            await talk.reply(instructions="SECRET")
            await speak(talk)

        if observed is not NOVA_SONIC:  # Its plugin loses texts, also without us.
            assert 6 == len(talk.heard)
        assert [("succeeded", None)] * 3 == ended(recorder, "provider")
        assert [("succeeded", None)] * 3 == ended(recorder)


async def test_switched_off(start_conversation, recorder):
    """The server's own replies are heard and not traced."""
    talk = await start_conversation("turn:ok")
    await configured(talk)
    traced_retry.disable()
    await speak(talk)

    assert (["answer 1"], []) == (talk.heard, recorder.replies)
