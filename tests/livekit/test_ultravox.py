# SPDX-License-Identifier: Apache-2.0
"""The Ultravox adapter with the real plugin and a real AgentSession: on the wire and at the ear.

Heard is what reaches the conversation: the agent reads the streams of an Ultravox reply with a
second SpeechHandle, so the handle of whoever asked stays empty, with us or without.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

import aiohttp
import pytest
from livekit.agents import Agent, AgentSession, function_tool, llm
from livekit.plugins import ultravox
from support.conversation import Conversation, actions, ended, late

import traced_retry
from traced_retry.livekit.adapter import told
from traced_retry.livekit.ultravox import UltravoxAdapter
from traced_retry.simulator.ultravox import UltravoxSimulator


class Talk(Conversation):
    """With Ultravox."""

    async def asked(self):
        """Ask the plugin itself for a reply, and wait until the server has heard that."""
        before = len(self.server.requests)
        reply = self.realtime.generate_reply()
        await self.server.wait_for(lambda: len(self.server.requests) > before)
        return reply


@pytest.fixture
async def converse(recorder):
    """Of a script and a policy's settings makes a :class:`Talk`, closed after the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def converse(
            script, *, agent=None, bare=False, thinks=False, server=None, url=None, **policy
        ):
            if server is None:
                server = await stack.enter_async_context(UltravoxSimulator(script, thinks=thinks))
            model = ultravox.realtime.RealtimeModel(
                api_key="sk-SECRET",
                base_url=url or server.url,
                http_session=await stack.enter_async_context(aiohttp.ClientSession()),
                output_medium="text",
            )
            if not bare:
                policy = traced_retry.RetryPolicy(**policy)
                traced_retry.wrap(model, policy=policy, **recorder.providers)
            session = await stack.enter_async_context(AgentSession(llm=model))
            await session.start(agent or Agent(instructions="SECRET instructions"))
            return Talk(server, model, session)

        yield converse


LISTENS = ["send", "listen", "listen", "listen"]

ROWS = {
    # script: heard, outcome, stop reason, actions, seconds, late replies
    # and without us: heard, whether the agent is told of failure, seconds
    "ok": (1, "succeeded", None, ["send"], 0.0, 0, 1, False, 0.0),
    "late:4.8": (1, "succeeded", None, ["send"], 4.8, 0, 1, False, 4.8),
    "late:4.95": (1, "recovered", None, LISTENS[:2], 4.95, 0, 1, False, 4.95),
    "late:7": (1, "recovered", None, LISTENS[:2], 7.0, 0, 1, True, 5.0),
    "late:12": (1, "recovered", None, LISTENS[:3], 12.0, 0, 1, True, 5.0),
    "late:19.9": (1, "recovered", None, LISTENS, 19.9, 0, 1, True, 5.0),
    "late:25": (1, "exhausted", "deadline", LISTENS, 20.0, 1, 1, True, 5.0),
    "silence,ok": (0, "exhausted", "deadline", LISTENS, 20.0, 0, 0, True, 5.0),
    "silence": (0, "exhausted", "deadline", LISTENS, 20.0, 0, 0, True, 5.0),
    "malformed": (0, "exhausted", "deadline", LISTENS, 20.0, 0, 0, True, 5.0),
    "slow:8": (1, "succeeded", None, ["send"], 8.0, 0, 1, False, 8.0),
}

FATAL = {
    # script: error.type. The call is lost or refused: the session is dead, and LiveKit closes the
    # agent's before it reads our future, so the handle is silent, with us or without.
    "drop_before": "connection_lost",
    "rate_limit": "rate_limit",
    "quota": "quota",
    "unauthorized": "authentication",
}


class TestEachFault:
    @pytest.mark.parametrize("script", ROWS)
    async def test_with_us(self, script, converse, recorder):
        """Heard once where the server answers in time; else the failure is known in time."""
        heard, outcome, stop, acts, seconds, lates, *_ = ROWS[script]
        talk = await converse(script)

        error, took = await talk.timed_reply(instructions="SECRET")
        await talk.settle()

        assert heard == len(talk.heard)
        assert [(outcome, stop)] == ended(recorder)
        assert acts == actions(recorder)
        assert seconds == took
        assert (outcome == "exhausted") == isinstance(error, llm.RealtimeError)
        assert lates == late(recorder)
        assert 1 == len(talk.server.requests)
        assert [] == talk.server.cancels
        assert 0 == recorder.open_spans

    @pytest.mark.parametrize("script", ROWS)
    async def test_the_plugin_alone(self, script, converse):
        """A reply after 5 s is reported as failed, and heard nevertheless."""
        *_, heard, fails, seconds = ROWS[script]
        talk = await converse(script, bare=True)

        error, took = await talk.timed_reply()
        await talk.settle()

        assert heard == len(talk.heard)
        assert fails == isinstance(error, llm.RealtimeError)
        assert seconds == took

    @pytest.mark.parametrize("thinks", [True, False])
    @pytest.mark.parametrize(("script", "heard_late"), [("late:7", 0), ("late:25", 1)])
    async def test_a_server_that_thinks_first(self, script, heard_late, thinks, converse, recorder):
        """The generation exists before the agent is told of failure; its first word counts."""
        talk = await converse(script, thinks=thinks)

        await talk.timed_reply()
        await talk.settle()

        assert ["reply 1"] == talk.heard
        assert heard_late == late(recorder)

    @pytest.mark.parametrize("script", FATAL)
    async def test_a_dead_session(self, script, converse, recorder):
        """The plugin has no way back to a lost call, nor into one it was refused."""
        talk = await converse(script)

        _, took = await talk.timed_reply(instructions="SECRET")
        await talk.settle()

        assert [("not_recoverable", "not_recoverable")] == ended(recorder)
        assert [FATAL[script]] == [a["error.type"] for a in recorder.attempts]
        assert ["send"] == actions(recorder)
        assert 0.0 == took
        assert [] == talk.heard
        assert 1 == len(talk.closed)
        assert 0 == recorder.open_spans

    @pytest.mark.parametrize("script", FATAL)
    async def test_a_dead_session_tells_who_asked(self, script, converse):
        """Our error is one that LiveKit catches; the plugin alone: five seconds, or a cancel."""
        talk = await converse(script)

        with pytest.raises(llm.RealtimeError, match=r"session failed|refused"):
            await talk.realtime.generate_reply()

    @pytest.mark.parametrize("bare", [True, False])
    async def test_a_server_that_comes_up_late(self, bare, converse, recorder):
        """The plugin calls again each second, and sends what waited: heard once, and no failure.

        Alone it reports the failure after 5 s, and the reply is heard nevertheless.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = UltravoxSimulator("late:6", port=port)
        talk = await converse("ok", server=server, url=f"http://127.0.0.1:{port}/api", bare=bare)
        asyncio.get_running_loop().call_later(7.5, lambda: up.append(asyncio.ensure_future(start)))
        up, start = [], server.start()

        error, took = await talk.timed_reply()
        await talk.settle()
        await server.close()

        assert ["reply 1"] == talk.heard
        assert 1 == len(server.requests)
        assert bare == isinstance(error, llm.RealtimeError)
        if not bare:
            assert 13.5 <= took <= 15.0
            assert [("recovered", None)] == ended(recorder)
            failed = [a.get("error.type") for a in recorder.attempts]
            assert ["connection_lost", "timeout", None] == failed


class TestCutShort:
    """More of it, for all three without ids, is in test_held.py."""

    async def speaking(self, talk):
        """The handle of a reply whose first words are there, a second ago."""
        handle = talk.ask()
        await talk.server.wait_for(lambda: talk.server.requests)
        await talk.settle(1)
        return handle

    async def test_dropped_in_the_middle(self, converse, recorder):
        """The agent learns it before its session is closed."""
        talk = await converse("drop_during")

        error, _ = await talk.timed_reply()
        await talk.settle()

        assert isinstance(error, llm.RealtimeError)
        assert [("not_recoverable", "output_started")] == ended(recorder)
        assert 1 == len(talk.server.requests)
        assert 1 == len(talk.closed)

    async def test_a_loss_that_no_event_tells_of(self, converse, recorder):
        """What cannot be sent makes the plugin open another call, and say nothing."""
        talk = await converse("slow:5,ok")
        handle = await self.speaking(talk)
        talk.realtime._send_client_event({"unsendable": object()})
        await talk.settle()

        assert (2, []) == (talk.server.connections, talk.errors)
        assert [("not_recoverable", "output_started")] == ended(recorder)
        assert "connection_lost" == recorder.attempts[0]["error.type"]
        assert isinstance(handle.exception(), llm.RealtimeError)
        assert None is await talk.reply()

    async def test_a_new_call_on_purpose(self, converse, recorder):
        """New instructions do the same: heard as far as the caller let it."""
        talk = await converse("slow:5")
        handle = await self.speaking(talk)
        await talk.realtime.update_instructions("other")
        await talk.settle()

        assert 2 == talk.server.connections
        assert [("succeeded", None)] == ended(recorder)
        assert None is handle.exception()
        assert 0 == recorder.open_spans

    async def test_by_a_tool(self, converse, recorder):
        """Words and then a call of a tool: the plugin ends the reply there, and it was heard."""
        talk = await converse("slow:5")
        await self.speaking(talk)
        (call,) = talk.server._open
        tool = {"toolName": "look_up", "invocationId": "1", "parameters": {}}
        await call.send("client_tool_invocation", **tool)
        await talk.settle(1)

        assert [("succeeded", None)] == ended(recorder)


class TestPolicy:
    async def test_one_retry_listens_to_the_deadline(self, converse, recorder):
        """Listening costs nothing; to give up before would only make the reply a late one."""
        talk = await converse("late:18", max_retries=1)

        assert (None, 18.0) == await talk.timed_reply()
        await talk.settle()

        assert LISTENS[:2] == actions(recorder)
        assert ["reply 1"] == talk.heard

    async def test_no_retry_is_the_plugin_alone(self, converse, recorder):
        """Its own time-out, told after as many seconds; the late reply is counted."""
        talk = await converse("late:7", max_retries=0)

        error, took = await talk.timed_reply()
        await talk.settle()

        assert "generate_reply timed out" in str(error)
        assert 5.0 == took
        assert [("exhausted", "max_attempts")] == ended(recorder)
        assert 1 == late(recorder)

    async def test_an_attempt_timeout(self, converse, recorder):
        """A shorter one makes more windows; the plugin's own time-out leaves our slot alone."""
        talk = await converse("late:7", attempt_timeout=2.0)

        assert (None, 7.0) == await talk.timed_reply()
        await talk.settle()

        assert LISTENS == actions(recorder)
        assert ["reply 1"] == talk.heard

    @pytest.mark.parametrize("on_silence", ["listen", "restart"])
    async def test_there_is_no_restart(self, on_silence, converse, recorder):
        """It cannot be done here; listening is what is left."""
        talk = await converse("silence", on_silence=on_silence)

        await talk.timed_reply()

        assert LISTENS == actions(recorder)

    @pytest.mark.parametrize(
        ("script", "heard"), [("silence,ok", ["reply 2"]), ("late:12,ok", ["reply 2", "reply 1"])]
    )
    async def test_resend_is_at_least_once(self, script, heard, converse, recorder):
        """The user's explicit choice: a lost request recovers, and a slow one is heard twice."""
        talk = await converse(script, on_silence="resend")

        error, _ = await talk.timed_reply()
        await talk.settle()

        assert None is error
        assert heard == talk.heard
        assert ["send", "listen", "send"] == actions(recorder)
        assert [] == talk.server.cancels

    @pytest.mark.parametrize(
        ("kind", "action"),
        [("timeout", "listen"), ("connection_lost", "listen"), ("server_error", None)],
    )
    async def test_only_silence_is_listened_to(self, kind, action, converse):
        """After anything else the plugin might say, nothing is known to be safe."""
        talk = await converse("ok")
        request = talk.realtime._traced_retry._adapter.request(None)

        assert action == request.next_action(told(kind, "it failed"))


class TestLateReplies:
    async def test_is_counted_and_linked(self, converse, recorder, caplog):
        """One WARN record with the trace id of the reply that had failed; counted once."""
        talk = await converse("late:25")

        await talk.timed_reply()
        await talk.settle()

        assert {"ultravox": 1} == recorder.counted(
            "traced_retry.late_replies", "gen_ai.provider.name"
        )
        (record,) = [r for r in caplog.records if "heard after" in r.getMessage()]
        trace_id = recorder.spans("generate_reply")[0].context.trace_id
        assert f"{trace_id:032x}" == record.trace_id

    async def test_an_exemplar_leads_to_the_trace(self, converse, recorder):
        """The counter's point carries the failed reply's trace and span."""
        talk = await converse("late:25")

        await talk.timed_reply()
        await talk.settle()

        (span,) = recorder.spans("generate_reply")
        assert [(span.context.trace_id, span.context.span_id)] == exemplars(recorder)

    @pytest.mark.parametrize("event", ["playback_clear_buffer", "another request"])
    async def test_an_answer_to_something_else_is_not(self, event, converse, recorder):
        """What the server says after the caller spoke, or was asked again, answers that."""
        talk = await converse("silence,ok")
        await talk.timed_reply()
        if event == "another request":
            await talk.timed_reply()
        else:
            (call,) = talk.server._open
            await call.send("playback_clear_buffer")
            await talk.settle(1)
            await call.reply(talk.server.requests[0])
        await talk.settle()

        assert 1 == len(talk.heard)
        assert 0 == late(recorder)

    async def test_an_answer_to_what_was_interrupted_is_not(self, converse, recorder):
        """It was asked again and then interrupted: a reply now may answer either."""
        talk = await converse("silence,late:3")
        await talk.timed_reply()
        (await talk.asked()).cancel()
        await talk.settle()

        assert ["reply 2"] == talk.heard
        assert 0 == late(recorder)

    async def test_what_is_said_verbatim_is_not(self, converse, recorder):
        """say() after the failure is no late reply."""
        talk = await converse("silence")
        if not talk.realtime.capabilities.supports_say:
            pytest.skip("the plugin has no say() yet in 1.7.0")
        await talk.timed_reply()
        await talk.realtime.say("sorry")
        await talk.settle()

        assert 0 == late(recorder)


def exemplars(recorder):
    """Trace and span id of the late replies' exemplars."""
    data = recorder._reader.get_metrics_data()
    return [
        (exemplar.trace_id, exemplar.span_id)
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == "traced_retry.late_replies"
        for point in metric.data.data_points
        for exemplar in point.exemplars
    ]


class TestInterruption:
    @pytest.mark.parametrize("after", [1.0, 8.0], ids=["in the attempt", "while listening"])
    async def test_barge_in(self, after, converse, recorder):
        """Over at once, and nothing is sent: the caller speaks, and the server hears that."""
        talk = await converse("silence")
        handle = talk.session.generate_reply()
        await talk.server.wait_for(lambda: talk.server.requests)
        await asyncio.sleep(after)
        handle.interrupt()
        await handle
        await talk.settle()

        assert [("interrupted", "interrupted")] == ended(recorder)
        assert LISTENS[: 1 if after < 5 else 2] == actions(recorder)
        assert 1 == len(talk.server.requests)
        assert [] == talk.server.cancels
        assert None is talk.realtime._pending_generation_fut
        assert 0 == late(recorder)
        assert 0 == recorder.open_spans

    async def test_the_plugin_alone_asks_for_one_more(self, converse):
        """Its empty immediate message lacks deferResponse: by the protocol, one more request."""
        talk = await converse("silence,ok", bare=True)
        handle = talk.session.generate_reply()
        await talk.server.wait_for(lambda: talk.server.requests)
        handle.interrupt()
        await handle
        await talk.settle()

        assert 2 == len(talk.server.requests)
        assert [None] == talk.server.cancels
        assert ["reply 2"] == talk.heard

    async def test_a_late_reply_after_it_is_not_counted(self, converse, recorder):
        """Nobody was told of failure."""
        talk = await converse("late:7")
        reply = await talk.asked()
        reply.cancel()
        await talk.settle()

        assert [("interrupted", "interrupted")] == ended(recorder)
        assert 0 == late(recorder)

    @pytest.mark.parametrize("after", [0.0, 8.0], ids=["in the attempt", "while listening"])
    async def test_superseded(self, after, converse, recorder):
        """A newer request takes the slot: the older one's caller is cancelled, not left waiting."""
        talk = await converse("silence,ok")
        first = await talk.asked()
        await asyncio.sleep(after)
        second = await talk.asked()
        await second
        await talk.settle(1)

        assert first.cancelled()
        assert [("superseded", "superseded"), ("succeeded", None)] == ended(recorder)
        assert [] == talk.server.cancels

    async def test_cancelled_and_superseded_at_once(self, converse, recorder):
        """The cancel of the older one leaves the newer one's slot alone."""
        talk = await converse("silence,ok")
        first = await talk.asked()
        first.cancel()
        second = talk.realtime.generate_reply()

        assert (await second).user_initiated
        await talk.settle(1)
        assert ["interrupted", "succeeded"] == [end for end, _ in ended(recorder)]

    async def test_a_restart_supersedes(self, converse, recorder):
        """New instructions make the plugin open a new call; the old one's request is dropped."""
        talk = await converse("silence")
        reply = await talk.asked()
        await asyncio.sleep(8)
        await talk.realtime.update_instructions("other")

        with pytest.raises(asyncio.CancelledError):
            await reply
        assert [("superseded", "superseded")] == ended(recorder)


class TestSessionEnds:
    @pytest.mark.parametrize("after", [1.0, 8.0], ids=["in the attempt", "while listening"])
    async def test_closed(self, after, converse, recorder):
        """Closing the realtime session ends a pending reply."""
        talk = await converse("silence")
        reply = await talk.asked()
        await asyncio.sleep(after)
        await talk.realtime.aclose()

        with pytest.raises(llm.RealtimeError):
            await reply
        assert [("not_recoverable", "session_closed")] == ended(recorder)
        assert 0 == recorder.open_spans

    async def test_the_caller_closes(self, converse, recorder):
        """The agent's session closes with a reply in mid-air, and nothing stays open."""
        talk = await converse("silence")
        talk.session.generate_reply()
        await talk.server.wait_for(lambda: talk.server.requests)
        await asyncio.sleep(8)
        await talk.session.aclose()

        assert 1 == len(ended(recorder))
        assert 0 == recorder.open_spans


class TestWhatTheAgentSees:
    async def test_streams_are_those_of_the_plugin(self, converse):
        """A reply that came while listening is handed over untouched."""
        talk = await converse("late:7")
        made = []
        talk.realtime.on("generation_created", made.append)

        generation = await talk.realtime.generate_reply()

        assert made[0].message_stream is generation.message_stream
        assert made[0].function_stream is generation.function_stream

    async def test_replies_in_turn(self, converse, recorder):
        """A failed reply leaves the slot free for the next."""
        talk = await converse("silence,ok,late:7")

        for _ in range(3):
            await talk.timed_reply()
        await talk.settle()

        assert ["reply 2", "reply 3"] == talk.heard
        assert ["exhausted", "succeeded", "recovered"] == [end for end, _ in ended(recorder)]

    async def test_tools(self, converse):
        """The server answers a tool's result by itself; nobody asks it to."""
        called = []

        class Helper(Agent):
            @function_tool
            async def look_up(self) -> str:
                """Look it up."""
                called.append(True)
                return "found"

        talk = await converse("tool:look_up,ok", agent=Helper(instructions="SECRET"))
        await talk.realtime.generate_reply()
        await talk.settle()

        assert [True] == called
        assert ["reply 2"] == talk.heard

    @pytest.mark.parametrize("script", ["ok", "late:25", *FATAL])
    async def test_nothing_leaks(self, script, converse, recorder, caplog):
        """Neither instructions nor key are in spans, metrics, our log or the agent's error."""
        talk = await converse(script)
        error, _ = await talk.timed_reply(instructions="SECRET instructions")
        await talk.settle()

        told = [
            repr([s.to_json() for s in recorder.spans()]),
            repr([recorder.points(m) for m in recorder.metric_names()]),
            repr([vars(r) for r in caplog.records if r.name == "traced_retry"]),
            repr(error),
        ]
        assert not [t for t in told if "SECRET" in t]

    async def test_names(self, converse, recorder):
        """The provider's name is plain, and the model the plugin's."""
        talk = await converse("ok")
        await talk.timed_reply()

        (reply,) = recorder.replies
        assert "ultravox" == reply["gen_ai.provider.name"]
        assert "fixie-ai/ultravox" == reply["gen_ai.request.model"]


class TestContract:
    """What the adapter relies on, in the installed plugin."""

    async def test_private_attributes(self, converse):
        """A plugin version that moves one fails here, by its name."""
        talk = await converse("ok", bare=True)

        assert [] == UltravoxAdapter(talk.realtime, None).missing()

    async def test_the_time_out_leaves_another_slot_alone(self, converse):
        """After 5 s the plugin's future fails, and ours in the slot waits on and is resolved."""
        talk = await converse("late:7", bare=True)
        theirs = await talk.asked()
        ours = talk.realtime._pending_generation_fut = asyncio.Future()

        with pytest.raises(llm.RealtimeError, match="timed out"):
            await theirs
        assert ours is talk.realtime._pending_generation_fut
        assert (await ours).user_initiated

    async def test_the_slot_needs_its_epoch(self, converse):
        """Without the epoch beside it a future in the slot is never resolved."""
        talk = await converse("ok", bare=True)
        slot = talk.realtime._pending_generation_fut = asyncio.Future()
        await talk.server.wait_for("connected")
        (call,) = talk.server._open
        await call.begin()
        await talk.settle()

        assert not slot.done()

    async def test_an_empty_slot_keeps_a_cancel_quiet(self, converse):
        """The plugin sends its empty message only for the future in the slot."""
        talk = await converse("silence", bare=True)
        theirs = await talk.asked()
        talk.realtime._pending_generation_fut = None
        theirs.cancel()
        await talk.settle()

        assert [] == talk.server.cancels

    async def test_a_generation_is_created_first_and_uninitiated(self, converse):
        """So the agent reads the same streams with a handle of its own."""
        talk = await converse("ok", bare=True)
        made = []
        reply = talk.realtime.generate_reply()
        talk.realtime.on(
            "generation_created", lambda e: made.append((e.user_initiated, reply.done()))
        )
        await reply

        assert [(False, False)] == made

    async def test_refusals_are_told_in_words(self, converse):
        """``HTTP 401: ...``, and no attribute tells the status."""
        talk = await converse("unauthorized", bare=True)
        errors = []
        talk.realtime.on("error", errors.append)
        await talk.settle(1)

        assert [False] == [e.recoverable for e in errors]
        assert str(errors[0].error).startswith("HTTP 401")

    async def test_what_is_being_spoken(self, converse):
        """It is in ``_current_generation``, with the stream that the future brings, until whole."""
        talk = await converse("slow:1", bare=True)
        reply = await talk.realtime.generate_reply()

        assert reply.message_stream is talk.realtime._current_generation.message_ch
        await talk.settle(2)
        assert None is talk.realtime._current_generation

    async def test_an_event_comes_before_its_effect(self, converse):
        """So a new call is seen while what the old one was saying is still there."""
        talk = await converse("slow:5", bare=True)
        seen = []
        talk.realtime.on(
            "ultravox_server_event_received",
            lambda event: seen.append((event["type"], talk.realtime._current_generation)),
        )
        await talk.realtime.generate_reply()
        channel = talk.realtime._msg_ch
        seen.clear()
        talk.realtime._send_client_event({"unsendable": object()})
        await talk.settle(1)

        assert "call_started" == seen[0][0]
        assert None is not seen[0][1]
        assert channel is talk.realtime._msg_ch
        await talk.realtime.update_instructions("other")
        assert channel is not talk.realtime._msg_ch
