# SPDX-License-Identifier: Apache-2.0
"""The OpenAI adapter with the real plugin and a real AgentSession: on the wire and at the ear."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import pytest
from livekit.agents import llm
from support.conversation import codes, ended

from traced_retry.livekit.openai import OpenAIAdapter


class Row(NamedTuple):
    """The expected result of one reply."""

    heard: int
    """The number of texts that the agent says."""
    requests: int
    """The number of requests that the server receives."""
    outcome: str
    stop_reason: str | None
    code: str | None
    """The code of the error that the agent gets."""
    seconds: float
    """The longest time."""


ALONE = {
    # script: heard, requests sent, outcome, stop reason, the code the agent gets, seconds at most
    "ok": Row(1, 1, "succeeded", None, None, 0.1),
    "error:server_error": Row(0, 4, "exhausted", "max_attempts", None, 0.8),
    "error:odd_type/odd_code": Row(0, 4, "exhausted", "max_attempts", "odd_code", 7.1),
    "error:invalid_value": Row(0, 1, "not_recoverable", "not_recoverable", "invalid_value", 0.1),
    "uncorrelated": Row(0, 4, "exhausted", "max_attempts", "server_error", 7.1),
    "rate_limit": Row(0, 4, "exhausted", "max_attempts", "rate_limit_exceeded", 7.1),
    "rate_limit:4.5": Row(0, 4, "exhausted", "max_attempts", "rate_limit_exceeded", 14.6),
    "rate_limit:30": Row(0, 1, "exhausted", "deadline", "rate_limit_exceeded", 0.1),
    "quota": Row(0, 1, "not_recoverable", "not_recoverable", "insufficient_quota", 0.1),
    "unauthorized": Row(0, 0, "not_recoverable", "not_recoverable", None, 1.1),
    "silence": Row(0, 4, "exhausted", "deadline", None, 20.0),
    "late:3": Row(1, 2, "recovered", None, None, 3.1),
    "late:12": Row(1, 2, "recovered", None, None, 12.2),
    "drop_before": Row(0, 4, "exhausted", "max_attempts", None, 9.1),
    "active:1": Row(
        0, 4, "exhausted", "max_attempts", "conversation_already_has_active_response", 9
    ),
    "failed": Row(0, 4, "exhausted", "max_attempts", "server_error", 7.1),
    "incomplete": Row(0, 1, "not_recoverable", "not_recoverable", "content_filter", 0.1),
    "drop_during": Row(0, 1, "not_recoverable", "output_started", None, 0.2),
    "malformed": Row(0, 1, "not_recoverable", "not_recoverable", None, 0.1),
}

NOT_TOLD_BY_THE_HANDLE = {
    # LiveKit closes the session on this, and interrupts the handle before it reads our future.
    "malformed",
    "unauthorized",
}

THEN_OK = {
    # script: requests sent, error codes of the failed attempts, seconds at most
    "error:server_error,ok": (2, ["server_error"], 0.2),
    "error:odd_type/odd_code,ok": (2, ["odd_code"], 0.2),
    "uncorrelated,ok": (2, ["server_error"], 0.2),
    "rate_limit,ok": (2, ["rate_limit_exceeded"], 1.1),
    "rate_limit:4.5,ok": (2, ["rate_limit_exceeded"], 4.6),
    "silence,ok": (2, ["timeout"], 2.6),
    "drop_queued:1,ok": (1, ["connection_lost"], 3.7),  # the first is lost with the socket
    "late:3,ok": (2, ["timeout"], 2.6),
    "late:12,ok": (2, ["timeout"], 2.6),
    "drop_before,ok": (2, ["connection_lost"], 2.1),
    "active:3,ok": (2, ["conversation_already_has_active_response"], 3.1),
    "rate_limit,error:server_error,drop_before,ok": (
        4,
        ["rate_limit_exceeded", "server_error", "connection_lost"],
        9.0,
    ),
}


class TestEachFault:
    @pytest.mark.parametrize("script", ALONE)
    async def test_lasting_fault_fails_reply_in_time(self, script, start_conversation, recorder):
        """The failure of a lasting fault is known in time with its code, and nothing is heard."""
        row = ALONE[script]
        talk = await start_conversation(script)
        began = asyncio.get_running_loop().time()

        error = await talk.reply(instructions="SECRET")
        took = asyncio.get_running_loop().time() - began
        await talk.settle()

        assert [(row.outcome, row.stop_reason)] == ended(recorder)
        assert row.requests == len(talk.server.requests)
        assert row.heard == len([t for t in talk.heard if t == "reply 1"])
        assert took <= row.seconds
        if row.heard == 0 and script not in NOT_TOLD_BY_THE_HANDLE:
            assert isinstance(error, llm.RealtimeError)
            assert row.code == error.code
        assert 0 == recorder.open_spans

    @pytest.mark.parametrize("script", THEN_OK)
    async def test_passing_fault_is_recovered_once(self, script, start_conversation, recorder):
        """After a fault that passes the reply is heard exactly once."""
        requests, failed, seconds = THEN_OK[script]
        talk = await start_conversation(script)
        began = asyncio.get_running_loop().time()

        assert None is await talk.reply(instructions="SECRET")
        took = asyncio.get_running_loop().time() - began
        await talk.settle()

        assert [f"reply {requests}"] == talk.heard
        assert [("recovered" if failed else "succeeded", None)] == ended(recorder)
        assert [*failed, None] == codes(recorder)
        assert requests == len(talk.server.requests)
        assert took <= seconds


OK_IS_TOO_LATE = {
    # script, ending in ok: heard, outcome, stop reason. A fault after which nothing is asked again.
    "error:invalid_value,ok": ([], "not_recoverable", "not_recoverable"),
    "quota,ok": ([], "not_recoverable", "not_recoverable"),
    "malformed,ok": ([], "not_recoverable", "not_recoverable"),
    "incomplete,ok": ([], "not_recoverable", "not_recoverable"),
    "drop_during,ok": (["reply"], "not_recoverable", "output_started"),
}


class TestNothingFollows:
    @pytest.mark.parametrize("script", OK_IS_TOO_LATE)
    async def test_final_failure_sends_no_further_request(
        self, script, start_conversation, recorder
    ):
        """A failure is final by its code, by the session's end, or after the first output."""
        talk = await start_conversation(script)

        await talk.reply()
        await talk.settle()

        heard, *end = OK_IS_TOO_LATE[script]
        assert [tuple(end)] == ended(recorder)
        assert 1 == len(talk.server.requests)
        assert heard == talk.heard


class TestExactlyOnce:
    async def test_request_queued_while_disconnected_is_heard_once(
        self, start_conversation, recorder
    ):
        """The plugin sends the stale request after the reconnect; its reply is cancelled by id."""
        talk = await start_conversation("ok,drop_queued:1,ok")
        await talk.reply()
        await talk.server.wait_for("connection_lost")

        assert None is await talk.reply()
        await talk.settle()

        assert 2 == len(talk.heard)
        assert [("succeeded", None), ("recovered", None)] == ended(recorder)
        assert [None, "connection_lost", None] == codes(recorder)

    async def test_discarded_ids_survive_two_reconnects(self, start_conversation):
        """Each reconnect empties the plugin's set of discarded ids, and ours keeps them."""
        talk = await start_conversation("ok,drop_queued:1,drop_before,ok")
        await talk.reply()
        await talk.server.wait_for("connection_lost")

        assert None is await talk.reply()
        await talk.settle()

        assert 2 == len(talk.heard)

    async def test_retry_waits_for_end_of_active_response(self, start_conversation):
        """Sent at once, the request would be rejected again, so it waits for that end."""
        talk = await start_conversation("active:6,ok")

        assert None is await talk.reply()

        first, second = talk.server.requests
        assert 6.0 <= second.at - first.at <= 6.1
        assert ["reply 2"] == talk.heard

    @pytest.mark.parametrize("script", ["uncorrelated,failed", "late:4,failed"])
    async def test_attempts_without_delay_are_not_confused(
        self, script, start_conversation, recorder
    ):
        """The end of an abandoned request arrives a turn late, when the next is sent."""
        talk = await start_conversation(script, base_delay=0, attempt_timeout=2)

        await talk.reply()
        await talk.settle()

        assert [("exhausted", "max_attempts")] == ended(recorder)
        assert [] == talk.heard

    async def test_refused_first_connection_is_heard_once(self, start_conversation, recorder):
        """The request waits in the plugin, or (in 1.7.0) is discarded and sent again by us."""
        talk = await start_conversation("unauthorized,ok")

        assert None is await talk.reply()
        await talk.settle()

        assert 1 == len(talk.heard)
        assert [None] == [stop for _, stop in ended(recorder)]

    async def test_replies_in_turn_have_own_traces(self, start_conversation, recorder):
        """One conversation has several replies, each with its own trace."""
        talk = await start_conversation("rate_limit,ok,error:server_error,ok")

        await talk.reply()
        await talk.reply()

        assert ["reply 2", "reply 4"] == talk.heard
        assert [("recovered", None)] * 2 == ended(recorder)
        assert 2 == len({s.context.span_id for s in recorder.spans("generate_reply")})

    async def test_user_message_is_sent_once_over_retries(self, start_conversation):
        """A retry requests the reply again, and does not send the message again."""
        talk = await start_conversation("rate_limit,ok")

        await talk.session.run(user_input="hello")

        assert 1 == len([i for i in talk.realtime.chat_ctx.items if i.role == "user"])


class TestRetryAfter:
    @pytest.mark.parametrize(
        ("said", "seconds"),
        [
            ("200ms", 0.2),
            ("1.5s", 1.5),
            ("20s.", 20.0),
            ("1m26.4s", 86.4),
            ("2h0m0s", 7200.0),
            ("a while", None),
        ],
    )
    async def test_retry_after_is_read_from_message(self, said, seconds, start_conversation):
        """OpenAI's realtime errors have no field for it."""
        talk = await start_conversation("ok")
        adapter = OpenAIAdapter(talk.realtime, None)
        error = llm.RealtimeError(
            f"Rate limit reached. Please try again in {said}", code="rate_limit_exceeded"
        )

        assert seconds == adapter.request(None).explain(error).retry_after


class TestWhatTheAgentSees:
    async def test_run_raises_original_error_with_note(self, start_conversation):
        """session.run() raises the provider's error with its code and a note with the trace."""
        talk = await start_conversation("rate_limit", max_retries=1)

        with pytest.raises(llm.RealtimeError) as caught:
            await talk.session.run(user_input="hello")

        assert "rate_limit_exceeded" == caught.value.code
        assert "2 attempt(s), stopped by max_attempts" in "".join(caught.value.__notes__)

    async def test_handle_has_original_error(self, start_conversation):
        """SpeechHandle.exception() is the same error."""
        talk = await start_conversation("error:invalid_value")

        error = await talk.reply()

        assert (llm.RealtimeError, "invalid_value") == (type(error), error.code)

    async def test_next_reply_after_failure_is_heard(self, start_conversation):
        """The conversation continues after a failed reply."""
        talk = await start_conversation("rate_limit,rate_limit,ok", max_retries=1)

        assert await talk.reply() is not None
        assert await talk.reply() is None
        assert ["reply 3"] == talk.heard
