# SPDX-License-Identifier: Apache-2.0
"""Nova Sonic: the real plugin and its AWS CRT client, a real AgentSession, HTTP/2 over TLS."""

from __future__ import annotations

import asyncio
import struct
from typing import NamedTuple

import pytest
from livekit.agents import Agent, function_tool, llm
from support.conversation import actions, ended, late, now
from support.providers import NOVA_SONIC

from traced_retry.simulator import ScriptError

plugin = pytest.importorskip(
    "livekit.plugins.aws.experimental.realtime.realtime_model",
    reason="livekit-plugins-aws[realtime] needs Python 3.12",
)
from traced_retry.simulator import aws  # noqa: E402 - needs h2 and trustme
from traced_retry.simulator.aws import AWSSimulator, decode_frame, encode_frame  # noqa: E402

LATE = "traced_retry.late_replies"


@pytest.fixture(autouse=True)
async def patient_clock():
    """The virtual clock does not overtake the CRT's threads: it jumps after 50 ms of rest."""
    asyncio.get_running_loop().patience = 0.05


@pytest.fixture
def provider():
    """Return the provider of every conversation here."""
    return NOVA_SONIC


def causes(recorder):
    """``error.type`` of each attempt."""
    return [attempt.get("error.type") for attempt in recorder.attempts]


OK = ("succeeded", None)
AGAIN = ("recovered", None)
DEADLINE = ("exhausted", "deadline")
DEAD = ("not_recoverable", "not_recoverable")
CUT = ("not_recoverable", "output_started")
ONCE, TWICE = ["send"], ["send", "listen"]


class Row(NamedTuple):
    """The expected result of one reply."""

    heard: int
    """The number of texts that the agent says."""
    late: int
    """The number of late replies."""
    end: tuple[str, str | None]
    """Outcome and stop reason."""
    actions: list[str]
    seconds: int


ROWS = {
    # script: replies heard, late ones counted, outcome and stop reason, actions, seconds
    "ok": Row(1, 0, OK, ONCE, 0),
    "slow:3": Row(1, 0, OK, ONCE, 3),
    "late:7": Row(1, 0, OK, ONCE, 7),
    "late:12": Row(1, 0, AGAIN, TWICE, 12),
    "silence": Row(0, 0, DEADLINE, TWICE, 20),
    "silence,ok": Row(0, 0, DEADLINE, TWICE, 20),  # lost for good: nothing tells, nothing cancels
    "late:25": Row(1, 1, DEADLINE, TWICE, 20),
    "rate_limit": Row(0, 0, DEADLINE, TWICE, 20),  # a new stream, silently, and the text is lost
    "error:modelTimeoutException,ok": Row(0, 0, DEADLINE, TWICE, 20),
    "error:systemInstability,ok": Row(0, 0, DEADLINE, TWICE, 20),
    "error:validationException": Row(0, 0, DEAD, ONCE, 0),
    "error:internalServerException": Row(0, 0, DEAD, ONCE, 0),
    "malformed": Row(0, 0, DEAD, ONCE, 0),
    "drop_before": Row(0, 0, DEAD, ONCE, 2),
    "drop_during": Row(1, 0, CUT, ONCE, 2),
    "unauthorized": Row(0, 0, DEAD, ONCE, 0),
}

BARE = {
    # script: replies heard, whether the agent is told of success, seconds
    "ok": (1, True, 0),
    "late:7": (1, True, 7),
    "late:12": (1, False, 10),  # told of failure, and spoken after that
    "silence": (0, False, 10),
    "late:25": (1, False, 10),
    "rate_limit": (0, False, 10),
    "drop_before": (0, False, 10),
    "unauthorized": (0, False, 10),
}

CLOSES_THE_AGENT = {"error:validationException", "error:internalServerException", "malformed"}
"""LiveKit closes the session on the event, and interrupts the handle before it reads our error."""


class TestEachRow:
    @pytest.mark.parametrize("script", ROWS)
    async def test_each_fault_has_expected_result(self, script, start_conversation, recorder):
        """A reply is heard at most once, with exact outcome, attempts and seconds."""
        row = ROWS[script]
        talk = await start_conversation(script)

        error, took = await talk.timed_reply()
        await asyncio.sleep(20)

        assert row.heard == len(talk.heard)
        assert row.late == late(recorder)
        assert [row.end] == ended(recorder)
        assert row.actions == actions(recorder)
        assert row.seconds == took
        assert 0 == recorder.open_spans
        if row.end[0] in ("exhausted", "not_recoverable") and script not in CLOSES_THE_AGENT:
            assert isinstance(error, llm.RealtimeError)

    @pytest.mark.parametrize("script", BARE)
    async def test_plugin_alone_has_expected_result(self, script, start_conversation):
        """The table shows the plugin's behavior without traced-retry."""
        heard, succeeded, seconds = BARE[script]
        talk = await start_conversation(script, bare=True)

        error, took = await talk.timed_reply()
        await asyncio.sleep(20)

        assert (heard, succeeded, seconds) == (len(talk.heard), error is None, took)

    async def test_plugin_alone_never_ends_reply_that_is_cut_short(self, start_conversation):
        """The plugin alone never closes the reply's streams, so the agent waits forever."""
        talk = await start_conversation("drop_during", bare=True)
        handle = talk.ask()
        await asyncio.sleep(300)

        assert not handle.done()

    @pytest.mark.parametrize(
        ("script", "cause"),
        [
            ("silence", ["timeout", "timeout"]),
            ("error:validationException", ["invalid_request"]),
            ("error:internalServerException", ["server_error"]),
            ("drop_before", ["connection_lost"]),
        ],
    )
    async def test_each_fault_has_error_type(self, script, cause, start_conversation, recorder):
        """Each attempt has the ``error.type`` of its fault."""
        await (await start_conversation(script)).timed_reply()

        assert cause == causes(recorder)

    async def test_refused_stream_has_code_of_aws(self, start_conversation, recorder):
        """AWS's own code is on the span and in the agent's error."""
        error, _ = await (await start_conversation("unauthorized")).timed_reply()

        assert "AccessDeniedException" == error.code
        assert ["AccessDeniedException"] == [
            a["traced_retry.error_code"] for a in recorder.attempts
        ]

    async def test_request_on_dead_stream_fails_at_once(self, start_conversation, recorder):
        """The reply fails at once, while the plugin alone lets the agent wait."""
        talk = await start_conversation("drop_before")
        await talk.timed_reply()
        began = now()

        with pytest.raises(llm.RealtimeError):
            await talk.realtime.generate_reply(instructions="SECRET")

        assert began == now()
        assert [DEAD] * 2 == ended(recorder)


def stream(talk):
    """The server's side of the one stream that is open."""
    (session,) = [s for client in talk.server._clients for s in client.streams.values()]
    return session


async def over(handle):
    """Wait for the speech to be over, for a minute."""
    await asyncio.wait_for(handle.wait_for_playout(), 60)


class TestCutShort:
    """More of it, for all three without ids, is in test_failure_before_output.py."""

    @pytest.mark.parametrize(
        ("exception", "code", "type_"),
        [
            ("throttlingException", "ThrottlingException", "ThrottlingException"),
            ("modelStreamErrorException", "ModelStreamErrorException", "server_error"),
            ("systemInstability", "ValidationException", "ValidationException"),
        ],
    )
    async def test_new_stream_fails_reply_in_progress(
        self, exception, code, type_, start_conversation, recorder
    ):
        """The plugin drops the rest without closing it; the reply fails and closes at once."""
        talk = await start_conversation("slow:9,ok")
        handle = talk.ask()
        await asyncio.sleep(3)
        began = now()
        if exception == "systemInstability":
            stream(talk).fail("validationException", aws.UNSTABLE)
        else:
            stream(talk).fail(exception, "The script says so.")
        await over(handle)

        assert began == round(now(), 3)
        assert [CUT] == ended(recorder)
        (attempt,) = recorder.attempts
        assert (code, type_) == (attempt["traced_retry.error_code"], attempt["error.type"])
        assert attempt["traced_retry.recoverable"]
        assert isinstance(handle.exception(), llm.RealtimeError)
        await asyncio.sleep(2)
        assert None is await talk.reply()
        await asyncio.sleep(20)
        assert [CUT, OK] == ended(recorder)
        assert (["reply 1", "reply 2"], 2) == (talk.heard, len(talk.server.requests))
        assert 0 == recorder.open_spans

    async def test_answer_to_user_survives_new_stream_before_output(
        self, start_conversation, recorder
    ):
        """Before the first words of an answer to the user the plugin requests it again."""
        talk = await start_conversation("silence,slow:3")
        handle = talk.ask(user_input="SECRET question")
        await talk.received()
        stream(talk).send("completionStart")
        await asyncio.sleep(1)
        stream(talk).fail("throttlingException", "Too many requests, please wait.")
        await asyncio.sleep(2)
        assert [] == ended(recorder)
        await over(handle)
        await asyncio.sleep(1)

        assert [OK] == ended(recorder)
        assert (None, ["reply 2"]) == (handle.exception(), talk.heard)

    async def test_instructions_are_lost_with_stream_before_output(
        self, start_conversation, recorder
    ):
        """Instructions are lost with the stream, also before the first words."""
        talk = await start_conversation("silence,ok")
        handle = talk.ask()
        await talk.received()
        stream(talk).send("completionStart")
        await asyncio.sleep(1)
        stream(talk).fail("throttlingException", "Too many requests, please wait.")
        await over(handle)

        assert [CUT] == ended(recorder)
        assert isinstance(handle.exception(), llm.RealtimeError)

    async def test_both_callers_of_shared_reply_get_failure(self, start_conversation, recorder):
        """Both callers of a reply that is cut short get the failure."""
        talk = await start_conversation("drop_during")
        handle = talk.ask(user_input="SECRET question")
        await talk.received()
        other = talk.realtime.generate_reply()
        await over(handle)
        await other
        await asyncio.sleep(10)

        assert [CUT, CUT] == ended(recorder)
        assert 0 == recorder.open_spans

    async def test_reply_cut_by_new_tools_counts_as_heard(self, start_conversation, recorder):
        """The plugin recycles the session for new tools, so the reply counts as heard."""

        @function_tool
        async def look_up() -> str:
            """Look it up."""
            return "found"

        talk = await start_conversation("slow:9")
        handle = talk.ask()
        await asyncio.sleep(3)
        await talk.realtime.update_tools([look_up])
        await asyncio.sleep(20)

        assert 2 == talk.server.connections
        assert [OK] == ended(recorder)
        assert None is handle.exception()


class TestUserMessage:
    async def test_user_message_is_resent_only_by_plugin(self, start_conversation, recorder):
        """After throttling the plugin requests the reply again, so we never do."""
        talk = await start_conversation("rate_limit,ok")

        assert (None, 0.05) == await talk.timed_reply(user_input="SECRET question")
        await asyncio.sleep(15)

        assert ["reply 2"] == talk.heard
        assert [OK] == ended(recorder)
        assert ["send"] == actions(recorder)
        assert 2 == len(talk.server.requests)

    @pytest.mark.parametrize(
        ("script", "outcome", "seconds"),
        [("late:12", AGAIN, 12), ("silence", DEADLINE, 20), ("late:25", DEADLINE, 20)],
    )
    async def test_user_message_ends_at_deadline(
        self, script, outcome, seconds, start_conversation, recorder
    ):
        """The plugin's future of a user's message has no timeout of its own."""
        talk = await start_conversation(script)

        _, took = await talk.timed_reply(user_input="SECRET question")

        assert ([outcome], TWICE, seconds) == (ended(recorder), actions(recorder), took)
        assert 1 == len(talk.server.requests)

    async def test_cancel_by_one_caller_keeps_shared_reply(self, start_conversation, recorder):
        """Two callers wait for one reply; one cancels, and the other gets it."""
        talk = await start_conversation("late:5,ok")
        handle = talk.ask(user_input="SECRET question")
        await talk.received()
        other = talk.realtime.generate_reply()
        await asyncio.sleep(1)
        handle.interrupt()

        assert await other is talk.generations[0]
        await asyncio.sleep(1)
        assert [("interrupted", "interrupted"), OK] == ended(recorder)
        assert None is talk.realtime._pending_generation_fut

    async def test_shared_reply_reaches_both_callers_and_is_heard_once(
        self, start_conversation, recorder
    ):
        """Both callers get the one reply, which is heard once."""
        talk = await start_conversation("late:5")
        handle = talk.ask(user_input="SECRET question")
        await talk.received()
        other = talk.realtime.generate_reply()
        await handle
        await other
        await asyncio.sleep(10)

        assert [OK, OK] == ended(recorder)
        assert ["reply 1"] == talk.heard

    async def test_cancel_of_plugin_future_supersedes_reply(self, start_conversation, recorder):
        """A cancel of the plugin's own future supersedes the reply, so no caller waits."""
        talk = await start_conversation("silence")
        handle = talk.ask(user_input="SECRET question")
        await talk.received()
        talk.realtime._pending_generation_fut.cancel()
        await asyncio.wait_for(handle.wait_for_playout(), 1)

        assert [("superseded", "superseded")] == ended(recorder)


class TestNothingSent:
    async def test_request_without_content_ends_at_deadline(self, start_conversation, recorder):
        """Without instructions or message the plugin sends nothing and never resolves."""
        talk = await start_conversation("ok")
        began = now()

        with pytest.raises(llm.RealtimeError):
            await talk.realtime.generate_reply()

        assert (20, [], [DEADLINE]) == (now() - began, talk.server.requests, ended(recorder))

    async def test_request_without_content_shares_next_reply(self, start_conversation, recorder):
        """It does not take the reply of a request that was sent: both callers get it."""
        talk = await start_conversation("late:3")
        nothing = talk.realtime.generate_reply()
        asked = talk.realtime.generate_reply(instructions="SECRET")

        assert (await nothing) is (await asked)
        await asyncio.sleep(1)
        assert [OK, OK] == ended(recorder)

    async def test_audio_only_model_returns_empty_reply(self, start_conversation, recorder):
        """A model that takes no text answers at once with nothing: no failure, no retry."""
        talk = await start_conversation("ok")
        talk.model._opts.modalities = "audio"

        assert (None, 0) == await talk.timed_reply()
        assert ([OK], ["send"], []) == (ended(recorder), actions(recorder), talk.server.requests)


class TestInOrder:
    async def test_two_concurrent_requests_are_both_answered(self, start_conversation, recorder):
        """The second request does not orphan the first, as the plugin's single slot does."""
        talk = await start_conversation("late:3,late:5")
        first = talk.realtime.generate_reply(instructions="SECRET")
        second = talk.realtime.generate_reply(instructions="SECRET")
        began = now()

        await first
        assert 3 == round(now() - began, 3)
        await second
        assert 5 == round(now() - began, 3)
        await asyncio.sleep(10)
        assert ["reply 1", "reply 2"] == talk.heard
        assert [OK, OK] == ended(recorder)

    async def test_replies_in_turn_are_each_heard(self, start_conversation, recorder):
        """One conversation has several replies, each heard once."""
        talk = await start_conversation("ok,late:12,ok")

        for _ in range(3):
            await talk.timed_reply()
        await asyncio.sleep(1)

        assert ["reply 1", "reply 2", "reply 3"] == talk.heard
        assert [OK, AGAIN, OK] == ended(recorder)
        assert 0 == late(recorder)

    async def test_new_tools_are_no_connection_loss(self, start_conversation, recorder):
        """The plugin ends its stream for new tools and opens another one."""

        @function_tool
        async def look_up() -> str:
            """Look it up."""
            return "found"

        talk = await start_conversation("silence")
        reply = talk.realtime.generate_reply(instructions="SECRET")
        await asyncio.sleep(3)
        await talk.realtime.update_tools([look_up])

        with pytest.raises(llm.RealtimeError):
            await reply
        assert 2 == talk.server.connections
        assert ([DEADLINE], TWICE) == (ended(recorder), actions(recorder))

    async def test_recycling_by_clock_fails_reply_at_once(
        self, start_conversation, recorder, monkeypatch
    ):
        """The plugin's recycling cancels itself and leaves no reader, which fails the reply."""
        monkeypatch.setattr(plugin, "MAX_SESSION_DURATION_SECONDS", 15)
        talk = await start_conversation("ok")
        await talk.timed_reply()
        await asyncio.sleep(20)

        assert (2, True) == (talk.server.connections, talk.realtime._response_task.done())
        assert 0 == (await talk.timed_reply())[1]
        assert [OK, DEAD] == ended(recorder)

    async def test_tool_result_is_answered_without_request(self, start_conversation, recorder):
        """The plugin has the result answered by itself, so no reply is requested of us."""

        class Helper(Agent):
            @function_tool
            async def look_up(self) -> str:
                """Look it up."""
                return "found"

        talk = await start_conversation("tool:look_up", agent=Helper(instructions="SECRET"))
        await talk.timed_reply()
        await asyncio.sleep(5)

        assert ["reply 1"] == talk.heard
        assert [OK] == ended(recorder)


class TestLate:
    async def test_late_reply_is_linked_and_logged_once(self, start_conversation, recorder, caplog):
        """A late reply logs one record with the trace of the failed reply."""
        talk = await start_conversation("late:25")
        await talk.timed_reply()
        await asyncio.sleep(20)

        trace_id = format(recorder.spans("generate_reply")[0].context.trace_id, "032x")
        records = [r for r in caplog.records if "heard after it was reported" in r.getMessage()]
        assert [trace_id] == [r.trace_id for r in records]

    async def test_reply_after_user_speech_is_not_late(self, start_conversation, recorder):
        """After the user spoke, a reply answers the user or cannot be told apart from that."""
        talk = await start_conversation("late:25")
        await talk.timed_reply()
        talk.realtime.emit("input_speech_started", llm.InputSpeechStartedEvent())
        await asyncio.sleep(20)

        assert (1, 0) == (len(talk.heard), late(recorder))

    async def test_late_reply_resolves_next_request(self, start_conversation, recorder):
        """It resolves the next request, and that request's own reply is then one too many."""
        talk = await start_conversation("late:25,late:10")
        await talk.timed_reply()
        await talk.timed_reply()
        await asyncio.sleep(20)

        assert [DEADLINE, OK] == ended(recorder)
        assert (2, 1) == (len(talk.heard), late(recorder))


class TestOnSilence:
    async def test_resend_recovers_lost_request(self, start_conversation, recorder):
        """By explicit choice the request is sent again after one window of listening."""
        talk = await start_conversation(
            "silence,ok", on_silence="resend", attempt_timeout=5, base_delay=0
        )

        assert (None, 10) == await talk.timed_reply()
        await asyncio.sleep(20)

        assert ["send", "listen", "send"] == actions(recorder)
        assert (["reply 2"], [AGAIN]) == (talk.heard, ended(recorder))

    async def test_resend_hears_slow_reply_twice(self, start_conversation, recorder):
        """A slow reply is heard twice, which is why resend is no default."""
        talk = await start_conversation(
            "late:12,ok", on_silence="resend", attempt_timeout=5, base_delay=0
        )

        await talk.timed_reply()
        await asyncio.sleep(20)

        assert ["reply 2", "reply 1"] == talk.heard

    async def test_user_message_is_not_resent(self, start_conversation, recorder):
        """A user's message was sent by update_chat_ctx, so a resend would send nothing."""
        talk = await start_conversation("silence", on_silence="resend", attempt_timeout=4)
        await talk.timed_reply(user_input="SECRET question")

        assert ["send", "listen", "listen", "listen"] == actions(recorder)
        assert [("exhausted", "max_attempts")] == ended(recorder)

    async def test_restart_only_listens(self, start_conversation, recorder):
        """No restart here could keep an old turn from being answered."""
        await (await start_conversation("silence", on_silence="restart")).reply()

        assert TWICE == actions(recorder)


class TestInterruption:
    @pytest.mark.parametrize("seconds", [3, 13])
    async def test_interruption_ends_reply_that_is_still_spoken(
        self, seconds, start_conversation, recorder
    ):
        """The reply ends at once, but no cancel exists, so it is still spoken."""
        talk = await start_conversation("late:15")
        handle = talk.ask()
        await asyncio.sleep(seconds)
        handle.interrupt()
        await handle
        await asyncio.sleep(20)

        assert [("interrupted", "interrupted")] == ended(recorder)
        assert (TWICE if seconds > 10 else ONCE) == actions(recorder)
        assert (1, 0, 0) == (len(talk.heard), late(recorder), recorder.open_spans)

    async def test_interruption_before_stream_opens_drops_request(
        self, start_conversation, recorder
    ):
        """The stream is not open yet, so the text is dropped and never heard."""
        talk = await start_conversation("ok", ready=False)
        handle = talk.ask()
        await asyncio.sleep(0.1)
        handle.interrupt()
        await handle
        await asyncio.sleep(20)

        assert [("interrupted", "interrupted")] == ended(recorder)
        assert ([], []) == (talk.server.requests, talk.heard)

    async def test_deadline_before_stream_opens_drops_request(self, start_conversation, recorder):
        """The deadline drops a request that is not sent yet."""
        talk = await start_conversation("ok", ready=False, deadline=0.3)
        error, _ = await talk.timed_reply()
        await asyncio.sleep(20)

        assert isinstance(error, llm.RealtimeError)
        assert ([DEADLINE], [], []) == (ended(recorder), talk.server.requests, talk.heard)

    @pytest.mark.parametrize("seconds", [3, 13])
    async def test_session_close_fails_reply(self, seconds, start_conversation, recorder):
        """Closing the session fails the reply in ``send`` and in ``listen``."""
        talk = await start_conversation("silence")
        reply = talk.realtime.generate_reply(instructions="SECRET")
        await asyncio.sleep(seconds)
        await talk.realtime.aclose()

        with pytest.raises(llm.RealtimeError):
            await reply
        assert [("not_recoverable", "session_closed")] == ended(recorder)


class TestRawExceptions:
    @pytest.mark.parametrize(
        ("raw", "outcome", "cause"),
        [
            (ValueError("SECRET"), DEAD, "invalid_request"),
            (OSError("SECRET"), ("exhausted", "unsafe_to_resend"), "connection_lost"),
        ],
    )
    async def test_raw_exception_becomes_realtime_error(
        self, raw, outcome, cause, start_conversation, recorder, monkeypatch
    ):
        """LiveKit catches only RealtimeError; the cause is kept, its text is not repeated."""
        talk = await start_conversation("ok")

        async def fail(*args, **kwargs):
            raise raw

        monkeypatch.setattr(talk.realtime, "_send_text_message", fail)
        error, took = await talk.timed_reply()

        assert (llm.RealtimeError, raw, 0) == (type(error), error.__cause__, took)
        assert "SECRET" not in repr(error)
        assert ([outcome], [cause]) == (ended(recorder), causes(recorder))


class TestContract:
    """What the adapter relies on; each fails where a new version of the plugin moved it."""

    async def test_model_has_timeout_of_ten_seconds(self, start_conversation):
        """The adapter reads the model's timeout, which is 10 s by default."""
        talk = await start_conversation("ok", bare=True)

        assert 10.0 == talk.model._generate_reply_timeout

    async def test_span_names_model(self, start_conversation, recorder):
        """The reply's span carries the model that the plugin names."""
        await (await start_conversation("ok")).reply()

        assert "amazon.nova-2-sonic-v1:0" == recorder.replies[0]["gen_ai.request.model"]

    async def test_slot_shares_future_only_without_instructions(self, start_conversation):
        """Without instructions the slot's future is shared, and otherwise a new one is made."""
        talk = await start_conversation("silence", bare=True)
        realtime = talk.realtime
        empty = realtime.generate_reply()
        first = realtime.generate_reply(instructions="SECRET")

        assert realtime._pending_generation_fut is first is realtime.generate_reply()
        assert realtime.generate_reply(instructions="SECRET") is realtime._pending_generation_fut
        assert not empty.done()
        for future in (first, realtime._pending_generation_fut):
            future.cancel()

    async def test_generation_is_announced_twice_under_one_id(self, start_conversation):
        """Each reply is announced twice under one id, and never as requested by the user."""
        talk = await start_conversation("ok", bare=True)
        await talk.timed_reply()
        await asyncio.sleep(1)

        assert [False, False] == [event.user_initiated for event in talk.generations]
        assert 1 == len({event.response_id for event in talk.generations})

    async def test_throttling_replaces_reader_task(self, start_conversation):
        """One task reads the stream, and another one after throttling."""
        talk = await start_conversation("rate_limit", bare=True)
        before = talk.realtime._response_task
        await talk.timed_reply()

        assert before.done()
        assert not talk.realtime._response_task.done()

    async def test_current_generation_holds_stream_until_closed(self, start_conversation):
        """``_current_generation`` holds the stream of its event until it is closed."""
        talk = await start_conversation("slow:3", bare=True)
        handle = talk.ask()
        await asyncio.sleep(1)

        (event, *_) = talk.generations
        assert event.message_stream is talk.realtime._current_generation.message_ch
        await handle
        assert None is talk.realtime._current_generation

    async def test_restart_session_gets_error_of_stream(self, start_conversation, monkeypatch):
        """``_restart_session`` opens another stream and receives the error of the first."""
        talk = await start_conversation("rate_limit", bare=True)
        original, errors = talk.realtime._restart_session, []

        async def restart(error):
            errors.append(type(error).__name__)
            await original(error)

        monkeypatch.setattr(talk.realtime, "_restart_session", restart)
        await talk.timed_reply()

        assert ["ThrottlingException"] == errors

    async def test_plugin_alone_leaves_agent_waiting_after_loss(self, start_conversation):
        """The plugin alone opens another stream and leaves the agent waiting for the rest."""
        talk = await start_conversation("slow:9", bare=True)
        handle = talk.ask()
        await asyncio.sleep(3)
        stream(talk).fail("modelStreamErrorException", "The script says so.")
        await asyncio.sleep(60)

        assert 2 == talk.server.connections
        assert not handle.done()


class TestSimulator:
    def test_frame_survives_encoding_and_decoding(self):
        """An encoded frame decodes to the same, and the SDK's own encoder agrees."""
        events = pytest.importorskip("smithy_aws_event_stream.events")
        headers = {":message-type": "event", ":event-type": "chunk"}
        frame = encode_frame(headers, b"payload")

        assert (headers, b"payload", len(frame)) == decode_frame(frame + b"more")
        assert events.EventMessage(headers=headers, payload=b"payload").encode() == frame

    def test_headers_that_are_no_strings_are_skipped(self):
        """The decoder skips headers that are no strings."""
        events = pytest.importorskip("smithy_aws_event_stream.events")
        headers = {"a": True, "b": 5, "c": b"bytes", "d": events.Long(7), "e": "text"}
        frame = events.EventMessage(headers=headers, payload=b"").encode()

        assert ({"e": "text"}, b"", len(frame)) == decode_frame(frame)

    @pytest.mark.parametrize("length", [0, 15, 30])
    def test_incomplete_frame_decodes_to_none(self, length):
        """The decoder returns None until the frame is complete."""
        assert None is decode_frame(encode_frame({"a": "b"}, b"a payload")[:length])

    @pytest.mark.parametrize("at", [2, -6])
    def test_wrong_checksum_is_refused(self, at):
        """A wrong checksum of the prelude or of the frame raises an error."""
        frame = bytearray(encode_frame({"a": "b"}, struct.pack("!I", 7)))
        frame[at] ^= 1

        with pytest.raises(ValueError, match="checksum"):
            decode_frame(bytes(frame))

    async def test_text_longer_than_http2_frame_and_window_arrives(self, start_conversation):
        """A text of 400 kB is sent in several frames, as the client's window allows."""
        talk = await start_conversation("ok")
        stream(talk).reply("12345678" * 50_000)
        await asyncio.sleep(5)

        assert ["12345678" * 50_000] == talk.heard

    async def test_simulator_records_requests_and_texts(self, start_conversation):
        """The simulator records requests, other texts, and the replies it completed."""
        talk = await start_conversation("ok")
        await talk.timed_reply()

        (request,) = talk.server.requests
        assert ("SECRET instructions", 1, "ok") == (
            request.instructions,
            request.number,
            str(request.fault),
        )
        assert [("SYSTEM", "SECRET instructions")] == talk.server.history
        assert (["reply 1"], [], 1) == (
            talk.server.completed,
            talk.server.cancels,
            talk.server.connections,
        )

    async def test_simulator_events_can_be_waited_for(self, start_conversation):
        """A test can wait for each of the simulator's events."""
        talk = await start_conversation("drop_before")
        await talk.server.wait_for("connected")
        await talk.timed_reply()
        await talk.server.wait_for("connection_lost")

        assert 1 == talk.server.lost

    async def test_simulator_refuses_stream_by_script(self, start_conversation):
        """The script can refuse to open a stream."""
        talk = await start_conversation("unauthorized")
        await talk.server.wait_for("connection_refused")

        assert (1, 0) == (talk.server.refused, talk.server.connections)

    @pytest.mark.parametrize("script", ["quota", "active", "uncorrelated"])
    def test_unknown_fault_is_refused(self, script):
        """A fault that this simulator does not know raises an error."""
        with pytest.raises(ScriptError, match="means nothing to AWSSimulator"):
            AWSSimulator(script)

    async def test_simulator_has_url_only_while_running(self):
        """The simulator has a URL while it runs, and starts only once."""
        server = AWSSimulator()
        with pytest.raises(RuntimeError, match="not running"):
            _ = server.url
        async with server:
            assert server.url.startswith("https://127.0.0.1:")
            with pytest.raises(RuntimeError, match="running already"):
                await server.start()
        await server.close()

    async def test_redirection_is_undone(self):
        """After the block the plugin is unchanged."""
        names = ("_BedrockRuntimeConfig", "AWSCRTHTTPClient", "_get_credentials_resolver")
        before = [getattr(plugin, name) for name in names]
        async with AWSSimulator() as server:
            with server.redirected():
                assert not set(before) & {getattr(plugin, name) for name in names}

        assert before == [getattr(plugin, name) for name in names]

    async def test_redirection_names_missing_attribute(self, monkeypatch):
        """The error names the plugin's attribute that is missing."""
        monkeypatch.delattr(plugin, "AWSCRTHTTPClient")
        async with AWSSimulator() as server:
            with pytest.raises(RuntimeError, match="has no AWSCRTHTTPClient"), server.redirected():
                pass

    def test_configuration_works_with_old_sdk(self):
        """Before 0.10 the SDK's configuration class was called, not resolved."""
        made = aws._Config(dict, "https://127.0.0.1:1")(endpoint_uri="https://aws", region="x")

        assert {"endpoint_uri": "https://127.0.0.1:1", "region": "x"} == made
