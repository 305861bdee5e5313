# SPDX-License-Identifier: Apache-2.0
"""The OpenAI adapter with the real plugin and a real AgentSession: on the wire and at the ear."""

from __future__ import annotations

import asyncio

import pytest
from livekit.agents import Agent, function_tool, llm
from support.conversation import codes, ended

from traced_retry.livekit.openai import OpenAIAdapter

ALONE = {
    # script: heard, requests sent, outcome, stop reason, the code the agent gets, seconds at most
    "ok": (1, 1, "succeeded", None, None, 0.1),
    "error:server_error": (0, 4, "exhausted", "max_attempts", None, 7.1),
    "error:odd_code": (0, 4, "exhausted", "max_attempts", "odd_code", 7.1),
    "error:invalid_value": (0, 1, "not_recoverable", "not_recoverable", "invalid_value", 0.1),
    "uncorrelated": (0, 4, "exhausted", "max_attempts", "server_error", 7.1),
    "rate_limit": (0, 4, "exhausted", "max_attempts", "rate_limit_exceeded", 7.1),
    "rate_limit:4.5": (0, 4, "exhausted", "max_attempts", "rate_limit_exceeded", 14.6),
    "rate_limit:30": (0, 1, "exhausted", "deadline", "rate_limit_exceeded", 0.1),
    "quota": (0, 1, "not_recoverable", "not_recoverable", "insufficient_quota", 0.1),
    "unauthorized": (0, 0, "not_recoverable", "not_recoverable", None, 1.1),
    "silence": (0, 2, "exhausted", "deadline", None, 20.0),
    "late:3": (1, 1, "succeeded", None, None, 3.1),
    "late:12": (0, 2, "exhausted", "deadline", None, 20.0),
    "drop_before": (0, 4, "exhausted", "max_attempts", None, 9.1),
    "active:1": (0, 4, "exhausted", "max_attempts", "conversation_already_has_active_response", 9),
    "failed": (0, 4, "exhausted", "max_attempts", "server_error", 7.1),
    "incomplete": (0, 1, "not_recoverable", "not_recoverable", "content_filter", 0.1),
    "drop_during": (0, 1, "not_recoverable", "output_started", None, 0.2),
    "malformed": (0, 1, "not_recoverable", "not_recoverable", None, 0.1),
}

NOT_TOLD_BY_THE_HANDLE = {
    # LiveKit closes the session on this, and interrupts the handle before it reads our future.
    "malformed",
    "unauthorized",
}

THEN_OK = {
    # script: requests sent, error codes of the failed attempts, seconds at most
    "error:server_error,ok": (2, ["server_error"], 1.1),
    "error:odd_code,ok": (2, ["odd_code"], 1.1),
    "uncorrelated,ok": (2, ["server_error"], 1.1),
    "rate_limit,ok": (2, ["rate_limit_exceeded"], 1.1),
    "rate_limit:4.5,ok": (2, ["rate_limit_exceeded"], 4.6),
    "silence,ok": (2, ["timeout"], 11.1),
    "drop_queued:1,ok": (1, ["connection_lost"], 3.7),  # the first is lost with the socket
    "late:3,ok": (1, [], 3.1),
    "late:12,ok": (2, ["timeout"], 11.1),
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
    async def test_alone(self, script, start_conversation, recorder):
        """A fault that lasts: the failure is known in time, with its code; nothing is heard."""
        heard, requests, outcome, stop_reason, code, seconds = ALONE[script]
        talk = await start_conversation(script)
        began = asyncio.get_running_loop().time()

        error = await talk.reply(instructions="SECRET")
        took = asyncio.get_running_loop().time() - began
        await talk.settle()

        assert [(outcome, stop_reason)] == ended(recorder)
        assert requests == len(talk.server.requests)
        assert heard == len([t for t in talk.heard if t == "reply 1"])
        assert took <= seconds
        if outcome != "succeeded" and script not in NOT_TOLD_BY_THE_HANDLE:
            assert isinstance(error, llm.RealtimeError)
            assert code == error.code
        assert 0 == recorder.open_spans

    @pytest.mark.parametrize("script", THEN_OK)
    async def test_followed_by_ok(self, script, start_conversation, recorder):
        """A fault that passes: the reply is heard exactly once."""
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
    async def test_although_the_server_would_answer(self, script, start_conversation, recorder):
        """Final by its code, fatal to the session, or partly heard already."""
        talk = await start_conversation(script)

        await talk.reply()
        await talk.settle()

        heard, *end = OK_IS_TOO_LATE[script]
        assert [tuple(end)] == ended(recorder)
        assert 1 == len(talk.server.requests)
        assert heard == talk.heard


class TestExactlyOnce:
    async def test_a_late_reply_is_cancelled_by_its_id(self, start_conversation):
        """After our retry was heard, the first request's response comes and is not."""
        talk = await start_conversation("late:12,ok")

        await talk.reply()
        await talk.settle()

        assert ["reply 2"] == talk.heard
        (cancelled,) = talk.server.cancels
        assert cancelled is not None

    async def test_the_plugin_alone(self, start_conversation):
        """What it is like without us: the reply is lost."""
        talk = await start_conversation("late:12,ok", bare=True)

        error = await talk.reply()
        await talk.settle()

        assert isinstance(error, llm.RealtimeError)
        assert [] == talk.heard

    async def test_our_own_timeout_sends_no_cancel(self, start_conversation, recorder):
        """An id-less response.cancel would stop whatever response is active."""
        talk = await start_conversation("late:4,ok", attempt_timeout=2.0)

        assert None is await talk.reply()
        await talk.settle()

        assert ["reply 2"] == talk.heard
        assert ["timeout", None] == codes(recorder)
        assert None not in talk.server.cancels

    async def test_given_up_means_never_heard(self, start_conversation):
        """After the agent was told of failure, a late reply is not spoken."""
        talk = await start_conversation("late:25")

        assert isinstance(await talk.reply(), llm.RealtimeError)
        await talk.settle(30)

        assert [] == talk.heard
        assert 2 == len(talk.server.cancels)

    async def test_queued_while_the_socket_is_down(self, start_conversation, recorder):
        """The plugin sends the stale request after the reconnect; its reply is cancelled by id."""
        talk = await start_conversation("ok,drop_queued:1,ok")
        await talk.reply()
        await talk.server.wait_for("connection_lost")

        assert None is await talk.reply()
        await talk.settle()

        assert 2 == len(talk.heard)
        assert [("succeeded", None), ("recovered", None)] == ended(recorder)
        assert [None, "connection_lost", None] == codes(recorder)

    async def test_queued_over_two_lost_connections(self, start_conversation):
        """Each reconnect empties the plugin's set of discarded ids; ours outlives it."""
        talk = await start_conversation("ok,drop_queued:1,drop_before,ok")
        await talk.reply()
        await talk.server.wait_for("connection_lost")

        assert None is await talk.reply()
        await talk.settle()

        assert 2 == len(talk.heard)

    async def test_waits_for_the_active_response(self, start_conversation):
        """Sent at once, the request would be rejected again; it goes out when that has ended."""
        talk = await start_conversation("active:6,ok")

        assert None is await talk.reply()

        first, second = talk.server.requests
        assert 6.0 <= second.at - first.at <= 6.1
        assert ["reply 2"] == talk.heard

    @pytest.mark.parametrize("script", ["uncorrelated,failed", "late:4,failed"])
    async def test_without_a_wait_the_attempts_are_not_mixed_up(
        self, script, start_conversation, recorder
    ):
        """The end of an abandoned request is noted a turn late; the next is sent by then."""
        talk = await start_conversation(script, base_delay=0, attempt_timeout=2)

        await talk.reply()
        await talk.settle()

        assert [("exhausted", "max_attempts")] == ended(recorder)
        assert [] == talk.heard

    async def test_refused_at_first(self, start_conversation, recorder):
        """The request waits in the plugin, or (in 1.7.0) is discarded and asked again by us."""
        talk = await start_conversation("unauthorized,ok")

        assert None is await talk.reply()
        await talk.settle()

        assert 1 == len(talk.heard)
        assert [None] == [stop for _, stop in ended(recorder)]

    async def test_two_replies_in_turn(self, start_conversation, recorder):
        """One conversation, several replies, each its own trace."""
        talk = await start_conversation("rate_limit,ok,error:server_error,ok")

        await talk.reply()
        await talk.reply()

        assert ["reply 2", "reply 4"] == talk.heard
        assert [("recovered", None)] * 2 == ended(recorder)
        assert 2 == len({s.context.span_id for s in recorder.spans("generate_reply")})

    async def test_tools(self, start_conversation, recorder):
        """A tool call is a reply, and its result asks for another one, retried as well."""
        called = []

        class Helper(Agent):
            @function_tool
            async def look_up(self) -> str:
                """Look it up."""
                called.append(True)
                return "found"

        talk = await start_conversation(
            "rate_limit,tool:look_up,error:server_error,ok", agent=Helper(instructions="SECRET")
        )
        await talk.session.run(user_input="SECRET question")

        assert [True] == called
        assert ["reply 4"] == talk.heard
        assert [("recovered", None)] * 2 == ended(recorder)

    async def test_a_user_message_is_sent_once(self, start_conversation):
        """The retry asks again; it does not say again."""
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
    async def test_is_read_from_the_words(self, said, seconds, start_conversation):
        """OpenAI's realtime errors carry no field for it."""
        talk = await start_conversation("ok")
        adapter = OpenAIAdapter(talk.realtime, None)
        error = llm.RealtimeError(
            f"Rate limit reached. Please try again in {said}", code="rate_limit_exceeded"
        )

        assert seconds == adapter.request(None).explain(error).retry_after


class TestInterruption:
    async def test_in_the_attempt(self, start_conversation, recorder):
        """Barge-in while the server is silent: over at once, and never heard."""
        talk = await start_conversation("late:5,ok")
        handle = talk.ask()
        await talk.received()
        handle.interrupt()
        await handle
        await talk.settle()

        assert [("interrupted", "interrupted")] == ended(recorder)
        assert [] == talk.heard
        assert 1 == len(talk.server.requests)

    async def test_in_the_wait(self, start_conversation, recorder):
        """Barge-in between two attempts: nothing is sent afterwards."""
        talk = await start_conversation("rate_limit:10,ok")
        handle = talk.ask()
        await talk.received()
        await asyncio.sleep(1)
        handle.interrupt()
        await handle
        await talk.settle()

        assert [("interrupted", "interrupted")] == ended(recorder)
        assert [] == talk.heard
        assert 1 == len(talk.server.requests)

    async def test_as_the_reply_comes(self, start_conversation, recorder):
        """Cancelled in the very moment the response was created: the response is cancelled."""
        talk = await start_conversation("slow:5")
        talk.realtime.on("generation_created", lambda _: reply.cancel())
        reply = talk.realtime.generate_reply()

        with pytest.raises(asyncio.CancelledError):
            await reply
        await talk.settle()

        assert [("interrupted", "interrupted")] == ended(recorder)
        assert 1 == len(talk.server.cancels)
        assert [] == talk.server.completed

    async def test_while_it_is_spoken(self, start_conversation, recorder):
        """What was begun was heard."""
        talk = await start_conversation("slow:5")
        handle = talk.ask()
        await talk.received()
        await asyncio.sleep(1)
        handle.interrupt()
        await handle
        await talk.settle()

        assert [("succeeded", None)] == ended(recorder)
        assert 0 == recorder.open_spans


class TestSessionEnds:
    @pytest.mark.parametrize("script", ["silence", "rate_limit:10"])
    async def test_closed(self, script, start_conversation, recorder):
        """Closing the realtime session ends a pending reply, in an attempt or in a wait."""
        talk = await start_conversation(script)
        reply = talk.realtime.generate_reply()
        await talk.received()
        await asyncio.sleep(1)
        await talk.realtime.aclose()

        with pytest.raises(llm.RealtimeError):
            await reply
        assert [("not_recoverable", "session_closed")] == ended(recorder)
        assert 0 == recorder.open_spans

    async def test_asked_after_the_end(self, start_conversation, recorder):
        """The plugin alone lets such a caller wait for ten seconds."""
        talk = await start_conversation("ok")
        await talk.realtime.aclose()
        began = asyncio.get_running_loop().time()

        with pytest.raises(llm.RealtimeError):
            await talk.realtime.generate_reply()

        assert began == asyncio.get_running_loop().time()
        assert [("not_recoverable", "session_closed")] == ended(recorder)

    async def test_no_task_is_left(self, start_conversation, recorder):
        """The agent's session closes with a reply in mid-air and nothing of ours stays."""
        talk = await start_conversation("silence")
        talk.ask()
        await talk.received()
        await talk.session.aclose()
        await asyncio.sleep(0)

        ours = [t for t in asyncio.all_tasks() if "Reply.run" in repr(t.get_coro())]
        assert [] == ours
        assert 0 == recorder.open_spans
        assert 1 == len(ended(recorder))


class TestWhatTheAgentSees:
    async def test_run_raises_the_original_error(self, start_conversation):
        """session.run() raises the provider's error: its code, and a note leading to the trace."""
        talk = await start_conversation("rate_limit", max_retries=1)

        with pytest.raises(llm.RealtimeError) as caught:
            await talk.session.run(user_input="hello")

        assert "rate_limit_exceeded" == caught.value.code
        assert "2 attempt(s), stopped by max_attempts" in "".join(caught.value.__notes__)

    async def test_the_handle_has_it_too(self, start_conversation):
        """SpeechHandle.exception() is the same error."""
        talk = await start_conversation("error:invalid_value")

        error = await talk.reply()

        assert (llm.RealtimeError, "invalid_value") == (type(error), error.code)

    async def test_session_goes_on(self, start_conversation):
        """One lost reply is not the end of the conversation."""
        talk = await start_conversation("rate_limit,rate_limit,ok", max_retries=1)

        assert await talk.reply() is not None
        assert await talk.reply() is None
        assert ["reply 3"] == talk.heard


class TestNothingLeaks:
    @pytest.mark.parametrize("script", ["error:server_error", "unauthorized", "malformed", "quota"])
    async def test_no_content_and_no_key(self, script, start_conversation, recorder, caplog):
        """Neither instructions nor key are in spans, metrics or our log."""
        talk = await start_conversation(script)
        error = await talk.reply(instructions="SECRET instructions")

        told = [
            repr([s.to_json() for s in recorder.spans() if s.name.startswith("generate_reply")]),
            repr([recorder.points(m) for m in recorder.metric_names()]),
            repr([vars(r) for r in caplog.records if r.name == "traced_retry"]),
            repr(error),
        ]
        assert not [t for t in told if "SECRET" in t]
