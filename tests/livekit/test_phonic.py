# SPDX-License-Identifier: Apache-2.0
"""The Phonic adapter with the real plugin and a real AgentSession: on the wire and at the ear."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import warnings

import pytest
from livekit.agents import Agent, AgentSession, function_tool, llm
from support.conversation import Conversation, actions, ended, late

import traced_retry
from traced_retry.livekit.phonic import PhonicAdapter
from traced_retry.simulator.phonic import PhonicSimulator, redirected

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Phonic's client is on websockets.legacy
    from livekit.plugins import phonic
    from livekit.plugins.phonic.realtime import realtime_model as plugin

    importlib.import_module("phonic.conversations.client")  # which it does at its first use

KEY = "sk-SECRET-key"


class Talk(Conversation):
    """With Phonic."""

    async def asked(self, **kwargs):
        """Ask the plugin itself for a reply, and wait until the server has heard that."""
        before = len(self.server.requests)
        reply = self.realtime.generate_reply(**kwargs)
        await self.server.wait_for(lambda: len(self.server.requests) > before)
        return reply


@pytest.fixture
async def converse(recorder):
    """Of a script and a policy's settings makes a :class:`Talk`, closed after the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def converse(script, *, agent=None, bare=False, ready=True, **policy):
            server = await stack.enter_async_context(PhonicSimulator(script, ready=ready))
            stack.enter_context(redirected(server.url))
            model = phonic.realtime.RealtimeModel(api_key=KEY)
            if not bare:
                policy = traced_retry.RetryPolicy(**policy)
                traced_retry.wrap(model, policy=policy, **recorder.providers)
            session = await stack.enter_async_context(AgentSession(llm=model))
            await session.start(agent or Agent(instructions="SECRET instructions"))
            return Talk(server, model, session)

        yield converse


LISTENS = ["send", "listen"]

ROWS = {
    # script: heard, outcome, stop reason, actions, seconds, late replies
    # and without us: heard, whether the agent is told of failure, seconds
    "ok": (1, "succeeded", None, ["send"], 0.0, 0, 1, False, 0.0),
    "late:7": (1, "succeeded", None, ["send"], 7.0, 0, 1, False, 7.0),
    "late:9.95": (1, "recovered", None, LISTENS, 9.95, 0, 1, False, 9.95),
    "late:12": (1, "recovered", None, LISTENS, 12.0, 0, 1, True, 10.0),
    "late:19.9": (1, "recovered", None, LISTENS, 19.9, 0, 1, True, 10.0),
    "late:25": (1, "exhausted", "deadline", LISTENS, 20.0, 1, 1, True, 10.0),
    "silence,ok": (0, "exhausted", "deadline", LISTENS, 20.0, 0, 0, True, 10.0),
    "silence": (0, "exhausted", "deadline", LISTENS, 20.0, 0, 0, True, 10.0),
    "malformed": (0, "exhausted", "deadline", LISTENS, 20.0, 0, 0, True, 10.0),
    "slow:12": (1, "succeeded", None, ["send"], 12.0, 0, 1, False, 12.0),
}

FATAL = {
    # script: error.type. The plugin has no reconnect, and drops the code of an error message.
    # LiveKit closes the agent's session at the error event before it reads our future, so the
    # handle is silent, with us or without.
    "drop_before": "connection_lost",
    "error:internal_error": "_OTHER",
    "rate_limit": "_OTHER",
    "quota": "_OTHER",
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
        assert 0 == recorder.open_spans

    @pytest.mark.parametrize("script", ROWS)
    async def test_the_plugin_alone(self, script, converse):
        """A reply after 10 s is reported as failed, and heard nevertheless."""
        *_, heard, fails, seconds = ROWS[script]
        talk = await converse(script, bare=True)

        error, took = await talk.timed_reply()
        await talk.settle()

        assert heard == len(talk.heard)
        assert fails == isinstance(error, llm.RealtimeError)
        assert seconds == took

    @pytest.mark.parametrize("script", FATAL)
    async def test_a_dead_session(self, script, converse, recorder):
        """The plugin never comes back from any of these."""
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
        """Our error is one that LiveKit catches, at once; so is that of who asks again."""
        talk = await converse(script)

        for _ in range(2):
            began = asyncio.get_running_loop().time()
            with pytest.raises(llm.RealtimeError, match=r"session failed|connection was lost"):
                await talk.realtime.generate_reply()
            assert began == asyncio.get_running_loop().time()
            await talk.settle(1)


class TestAnEndWithoutAnEvent:
    @pytest.mark.parametrize("after", [1.0, 12.0], ids=["in the attempt", "while listening"])
    async def test_ends_the_reply(self, after, converse, recorder):
        """A close with 1000 emits nothing; the end of the plugin's main task tells of it."""
        talk = await converse("silence")
        began = asyncio.get_running_loop().time()
        reply = await talk.asked()
        await asyncio.sleep(after)
        await talk.server.end_conversations()

        with pytest.raises(llm.RealtimeError, match="the conversation is over"):
            await reply
        assert after == asyncio.get_running_loop().time() - began
        assert [("not_recoverable", "not_recoverable")] == ended(recorder)
        assert "connection_lost" == recorder.attempts[-1]["error.type"]
        assert [] == talk.errors

    async def test_who_asks_after_it_is_told(self, converse, recorder):
        """At once, and through the agent's handle: this session is not closed."""
        talk = await converse("ok")
        await talk.timed_reply()
        await talk.server.end_conversations()
        await talk.settle(1)

        error, took = await talk.timed_reply()

        assert isinstance(error, llm.RealtimeError)
        assert 0.0 == took
        assert ("not_recoverable", "not_recoverable") == ended(recorder)[1]
        assert [] == talk.closed

    async def test_before_the_first_request(self, converse, recorder):
        """The end came before there was anybody to notice it."""
        talk = await converse("ok")
        await talk.server.wait_for("connected")
        await talk.settle(1)
        await talk.server.end_conversations()
        await talk.settle(1)

        _, took = await talk.timed_reply()

        assert 0.0 == took
        assert [("not_recoverable", "not_recoverable")] == ended(recorder)

    async def test_the_plugin_alone(self, converse):
        """It lets each caller wait for ten seconds."""
        talk = await converse("ok", bare=True)
        await talk.timed_reply()
        await talk.server.end_conversations()
        await talk.settle(1)

        error, took = await talk.timed_reply()

        assert isinstance(error, llm.RealtimeError)
        assert 10.0 == took


class TestCutShort:
    """More of it, for all three without ids, is in test_held.py."""

    async def speaking(self, talk):
        """The handle of a reply whose first words are there, a second ago; the connection."""
        handle = talk.ask()
        await talk.server.wait_for(lambda: talk.server.requests)
        await talk.settle(1)
        (connection,) = talk.server._open
        return handle, connection

    async def test_dropped_in_the_middle(self, converse, recorder):
        """The agent learns it before its session is closed."""
        talk = await converse("drop_during")

        error, _ = await talk.timed_reply()
        await talk.settle()

        assert isinstance(error, llm.RealtimeError)
        assert [("not_recoverable", "output_started")] == ended(recorder)
        assert 1 == len(talk.server.requests)
        assert 1 == len(talk.closed)

    async def test_a_close_that_no_event_tells_of(self, converse, recorder):
        """With 1000: the plugin closes the reply's streams as if it were whole."""
        talk = await converse("slow:5")
        handle, _ = await self.speaking(talk)
        await talk.server.end_conversations()
        await talk.settle()

        assert [] == talk.errors
        assert [("not_recoverable", "output_started")] == ended(recorder)
        assert "connection_lost" == recorder.attempts[0]["error.type"]
        assert isinstance(handle.exception(), llm.RealtimeError)

    @pytest.mark.parametrize("event", ["assistant_started_speaking", "user_started_speaking"])
    async def test_an_end_that_is_not_told(self, event, converse, recorder):
        """What begins instead ends it: nothing says that it was not heard."""
        talk = await converse("slow:5")
        _, connection = await self.speaking(talk)
        await connection.send(event)
        await talk.settle(1)

        assert [("succeeded", None)] == ended(recorder)

    async def test_by_a_tool(self, converse, recorder):
        """Words and then a call of a tool: the plugin ends the reply there, and it was heard."""
        talk = await converse("slow:5")
        _, connection = await self.speaking(talk)
        tool = {"tool_call_id": "1", "tool_name": "look_up", "parameters": {}}
        await connection.send("tool_call", **tool)
        await talk.settle(1)

        assert [("succeeded", None)] == ended(recorder)

    async def test_one_that_is_whole_before_it_is_looked_at(self, converse, recorder):
        """What begins in the same moment, and is lost, is another one."""
        talk = await converse("silence")
        await talk.asked()
        (connection,) = talk.server._open
        await connection.reply(talk.server.requests[0])
        await connection.begin()
        await connection.hang_up(1011, by_script=True)
        await talk.settle()

        assert [("succeeded", None)] == ended(recorder)

    async def test_by_the_next_request(self, converse, recorder):
        """The plugin closes what is being spoken: heard as far as the caller let it."""
        talk = await converse("slow:5,ok")
        await self.speaking(talk)
        await talk.asked()
        await talk.settle()

        assert [("succeeded", None)] * 2 == ended(recorder)


class TestPolicy:
    async def test_no_retry_is_the_plugin_alone(self, converse, recorder):
        """Its own time-out, told after as many seconds; the late reply is counted."""
        talk = await converse("late:12", max_retries=0)

        error, took = await talk.timed_reply()
        await talk.settle()

        assert "generate_reply timed out" in str(error)
        assert 10.0 == took
        assert [("exhausted", "max_attempts")] == ended(recorder)
        assert 1 == late(recorder)

    async def test_a_longer_deadline(self, converse, recorder):
        """Window after window; the last one reaches to the deadline."""
        talk = await converse("silence", deadline=45.0)

        _, took = await talk.timed_reply()

        assert 45.0 == took
        assert ["send", "listen", "listen", "listen"] == actions(recorder)

    @pytest.mark.parametrize("on_silence", ["listen", "restart"])
    async def test_there_is_no_restart(self, on_silence, converse, recorder):
        """It cannot be done here; listening is what is left."""
        talk = await converse("silence", on_silence=on_silence)

        await talk.timed_reply()

        assert LISTENS == actions(recorder)

    @pytest.mark.parametrize(
        ("script", "heard"),
        [("silence,ok", ["reply 2"]), ("late:25,ok", ["reply 2", "reply 1"])],
    )
    async def test_resend_is_at_least_once(self, script, heard, converse, recorder):
        """The user's explicit choice: a lost request recovers, and a slow one is heard twice."""
        talk = await converse(script, on_silence="resend", deadline=40.0)

        error, _ = await talk.timed_reply()
        await talk.settle()

        assert None is error
        assert heard == talk.heard
        assert ["send", "listen", "send"] == actions(recorder)

    async def test_resend_says_what_the_caller_typed(self, converse):
        """The plugin forgets it with the first request; the second says it again."""
        talk = await converse("silence,ok", on_silence="resend", deadline=40.0)

        await talk.session.run(user_input="any news?")

        assert 2 == len(talk.server.requests)
        assert all("any news?" in r.instructions for r in talk.server.requests)

    async def test_what_was_typed_is_said_once(self, converse):
        """Not again with the next reply."""
        talk = await converse("ok,ok")

        await talk.session.run(user_input="any news?")
        await talk.timed_reply(instructions="go on")

        first, second = talk.server.requests
        assert "any news?" in first.instructions
        assert "go on" == second.instructions


class TestNotReady:
    """The plugin sends nothing before the server says that the conversation may begin."""

    async def test_ready_in_time(self, converse, recorder):
        """The request waits in the plugin while we listen, and is sent once."""
        talk = await converse("ok", ready=False)
        asyncio.get_running_loop().call_later(15, lambda: tasks.append(ensure(talk.server.begin())))
        tasks, ensure = [], asyncio.ensure_future

        assert (None, 15.0) == await talk.timed_reply()
        await talk.settle()

        assert ["reply 1"] == talk.heard
        assert [("recovered", None)] == ended(recorder)

    @pytest.mark.parametrize("bare", [True, False])
    async def test_ready_too_late(self, bare, converse):
        """Given up means never sent. The plugin alone reports a failure, and sends it later."""
        talk = await converse("ok", ready=False, bare=bare)

        error, _ = await talk.timed_reply()
        await talk.server.begin()
        await talk.settle()

        assert isinstance(error, llm.RealtimeError)
        assert (["reply 1"] if bare else []) == talk.heard

    async def test_barge_in(self, converse):
        """What was not sent never is, and what the caller typed is forgotten, as without us."""
        talk = await converse("ok,ok", ready=False)
        await talk.settle(1)
        talk.realtime._pending_user_text = "never mind"
        reply = talk.realtime.generate_reply()
        await asyncio.sleep(12)
        reply.cancel()
        await talk.server.begin()
        await talk.settle()
        assert [] == talk.server.requests

        await talk.timed_reply(instructions="go on")
        assert ["go on"] == [r.instructions for r in talk.server.requests]


class TestLateReplies:
    async def test_is_counted_and_linked(self, converse, recorder, caplog):
        """Counted once, with one WARN record and an exemplar that lead to the failed reply."""
        talk = await converse("late:25")

        await talk.timed_reply()
        await talk.settle()

        (span,) = recorder.spans("generate_reply")
        assert [(span.context.trace_id, span.context.span_id)] == exemplars(recorder)
        assert {"phonic": 1} == recorder.counted(
            "traced_retry.late_replies", "gen_ai.provider.name"
        )
        (record,) = [r for r in caplog.records if "heard after" in r.getMessage()]
        assert f"{span.context.trace_id:032x}" == record.trace_id

    @pytest.mark.parametrize("event", ["user_started_speaking", "another request", "say"])
    async def test_an_answer_to_something_else_is_not(self, event, converse, recorder):
        """What the server says after the caller spoke, or was asked again, answers that."""
        talk = await converse("silence,ok")
        await talk.timed_reply()
        (connection,) = talk.server._open
        if event == "another request":
            await talk.timed_reply()
        elif event == "say":
            await talk.realtime.say("sorry")
        else:
            await connection.send(event)
            await talk.settle(1)
            await connection.reply(talk.server.requests[0])
            await talk.settle(1)
            assert 1 == len(talk.heard)
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
    @pytest.mark.parametrize("after", [1.0, 12.0], ids=["in the attempt", "while listening"])
    async def test_barge_in(self, after, converse, recorder):
        """Over at once; the slot is free for what the server answers to the caller."""
        talk = await converse("silence")
        handle = talk.session.generate_reply()
        await talk.server.wait_for(lambda: talk.server.requests)
        await asyncio.sleep(after)
        handle.interrupt()
        await handle

        assert [("interrupted", "interrupted")] == ended(recorder)
        assert LISTENS[: 1 if after < 10 else 2] == actions(recorder)
        assert None is talk.realtime._pending_generate_reply_fut

        (connection,) = talk.server._open
        await connection.send("user_started_speaking")
        await connection.reply(talk.server.requests[0])
        await talk.settle()

        assert 1 == len(talk.heard)
        assert 1 == len(talk.server.requests)
        assert 0 == late(recorder)
        assert 0 == recorder.open_spans

    @pytest.mark.parametrize("after", [0.0, 12.0], ids=["in the attempt", "while listening"])
    async def test_superseded(self, after, converse, recorder):
        """A newer request takes the slot: the older one's caller is cancelled, not left waiting."""
        talk = await converse("silence,ok")
        first = await talk.asked()
        await asyncio.sleep(after)
        await (await talk.asked())
        await talk.settle(1)

        assert first.cancelled()
        assert [("superseded", "superseded"), ("succeeded", None)] == ended(recorder)


class TestSessionEnds:
    @pytest.mark.parametrize("after", [1.0, 12.0], ids=["in the attempt", "while listening"])
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
        await asyncio.sleep(12)
        await talk.session.aclose()

        assert 1 == len(ended(recorder))
        assert 0 == recorder.open_spans


class TestWhatTheAgentSees:
    async def test_replies_in_turn(self, converse, recorder):
        """A failed reply leaves the slot free for the next."""
        talk = await converse("silence,ok,late:12")

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
        await talk.timed_reply()
        await talk.settle()

        assert [True] == called
        assert ["reply 2"] == talk.heard

    @pytest.mark.parametrize("script", ["ok", "late:25", *FATAL])
    async def test_nothing_leaks(self, script, converse, recorder, caplog):
        """Neither instructions nor key are in spans, metrics, our log or any error event.

        The plugin's own logger writes the key; that we cannot help.
        """
        talk = await converse(script)
        error, _ = await talk.timed_reply(instructions="SECRET instructions")
        with contextlib.suppress(llm.RealtimeError):
            await talk.realtime.generate_reply()
        await talk.settle()

        told = [
            repr([s.to_json() for s in recorder.spans()]),
            repr([recorder.points(m) for m in recorder.metric_names()]),
            repr([vars(r) for r in caplog.records if r.name == "traced_retry"]),
            repr(error),
            *[f"{e.error.error} {e.error.error!r}" for e in talk.errors],
            *[f"{e.error and e.error.error}" for e in talk.closed],
        ]
        assert not [t for t in told if "SECRET" in t]

    async def test_no_handler_sees_the_key(self, converse):
        """In whatever order the plugin's base calls them: in any, with livekit-agents 1.7.0."""
        talk = await converse("unauthorized")
        seen = []
        for _ in range(50):
            talk.realtime.on("error", lambda event: seen.append(f"{event.error!r} {event.error}"))
        await talk.timed_reply()

        assert 50 == len(seen)
        assert not [text for text in seen if KEY in text]

    async def test_the_key_without_us(self, converse):
        """What the plugin alone hands to everyone who listens to the session's errors."""
        talk = await converse("unauthorized", bare=True)
        await talk.timed_reply()

        assert KEY in str(talk.errors[0].error.error)

    async def test_names(self, converse, recorder):
        """The provider's name is plain."""
        talk = await converse("ok")
        await talk.timed_reply()

        assert "phonic" == recorder.replies[0]["gen_ai.provider.name"]


class TestContract:
    """What the adapter and the simulator rely on, in the installed plugin."""

    async def test_private_attributes(self, converse):
        """A plugin version that moves one fails here, by its name."""
        talk = await converse("ok", bare=True)

        assert [] == PhonicAdapter(talk.realtime, None).missing()

    async def test_the_time_out_leaves_another_slot_alone(self, converse):
        """After 10 s the plugin's future fails, and ours in the slot waits on and is resolved."""
        talk = await converse("late:12", bare=True)
        theirs = await talk.asked()
        ours = talk.realtime._pending_generate_reply_fut = asyncio.Future()

        with pytest.raises(llm.RealtimeError, match="timed out"):
            await theirs
        assert ours is talk.realtime._pending_generate_reply_fut
        assert (await ours).user_initiated

    async def test_the_task_that_sends(self, converse):
        """Cancelling it before the conversation is ready keeps the request from being sent."""
        talk = await converse("ok", bare=True, ready=False)
        reply = talk.realtime.generate_reply()
        talk.realtime._generate_reply_task.cancel()
        await talk.settle(1)
        await talk.server.begin()

        with pytest.raises(llm.RealtimeError):
            await reply
        assert [] == talk.server.requests

    async def test_typed_words_are_sent_once(self, converse):
        """They go out with the first request, and are forgotten."""
        talk = await converse("ok,ok", bare=True)
        await talk.asked()
        talk.realtime._pending_user_text = "any news?"
        await talk.asked()

        assert "any news?" in talk.server.requests[1].instructions
        assert None is talk.realtime._pending_user_text

    async def test_the_main_task_ends_with_the_conversation(self, converse):
        """It is all there is to notice of a close with 1000."""
        talk = await converse("ok", bare=True)
        await talk.timed_reply()
        await talk.server.end_conversations()
        await talk.settle(1)

        assert talk.realtime._main_atask.done()
        assert [] == talk.errors

    async def test_what_is_being_spoken(self, converse):
        """It is in ``_current_generation``, with the stream that the future brings, until whole."""
        talk = await converse("slow:1", bare=True)
        await talk.server.wait_for("connected")
        reply = await talk.realtime.generate_reply()

        assert reply.message_stream is talk.realtime._current_generation.message_ch
        await talk.settle(2)
        assert None is talk.realtime._current_generation

    async def test_who_closes_a_reply(self, converse, monkeypatch):
        """The main task does so as it ends, and nothing else is done in that task."""
        talk = await converse("slow:1,slow:5", bare=True)
        original, by_main = talk.realtime._close_current_generation, []

        def close(**kwargs):
            if talk.realtime._current_generation is not None:
                by_main.append(asyncio.current_task() is talk.realtime._main_atask)
            original(**kwargs)

        monkeypatch.setattr(talk.realtime, "_close_current_generation", close)
        await (await talk.asked())
        await talk.settle(2)
        await (await talk.asked())
        await talk.server.end_conversations()
        await talk.settle(1)

        assert [False, True] == by_main

    def test_a_plugin_that_cannot_be_redirected(self, monkeypatch):
        """It is said, rather than that a real server is called."""
        monkeypatch.delattr(plugin, "AsyncPhonic")

        with pytest.raises(RuntimeError, match="AsyncPhonic"), redirected("ws://127.0.0.1:1"):
            pass

    def test_the_redirection_ends(self):
        """After the block, the plugin is as it was."""
        original = plugin.AsyncPhonic

        with redirected("ws://127.0.0.1:1"):
            assert original is not plugin.AsyncPhonic
        assert original is plugin.AsyncPhonic
