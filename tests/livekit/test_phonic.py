# SPDX-License-Identifier: Apache-2.0
"""What the Phonic adapter has of its own; the rest is in test_single_slot.py.

With the real plugin and a real AgentSession: on the wire and at the ear.
"""

from __future__ import annotations

import asyncio

import pytest
from livekit.agents import llm
from support.conversation import actions, ended, late
from support.providers import KEY, PHONIC, phonic_plugin

from traced_retry.simulator.phonic import PhonicSimulator, redirected

LISTENS = ["send", "listen"]


@pytest.fixture
def provider():
    """Return the provider of every conversation here."""
    return PHONIC


def not_ready(script):
    """Make a simulator that accepts no request before ``begin``."""
    return PhonicSimulator(script, ready=False)


class TestAnEndWithoutAnEvent:
    @pytest.mark.parametrize("after", [1.0, 12.0], ids=["in the attempt", "while listening"])
    async def test_close_without_event_ends_reply(self, after, start_conversation, recorder):
        """A close with 1000 emits no event, but the plugin's main task ends."""
        talk = await start_conversation("silence")
        began = asyncio.get_running_loop().time()
        reply = await talk.ask_plugin()
        await asyncio.sleep(after)
        await talk.server.end_conversations()

        with pytest.raises(llm.RealtimeError, match="the conversation is over"):
            await reply
        assert after == asyncio.get_running_loop().time() - began
        assert [("not_recoverable", "not_recoverable")] == ended(recorder)
        assert "connection_lost" == recorder.attempts[-1]["error.type"]
        assert [] == talk.errors

    async def test_request_after_close_without_event_fails_at_once(
        self, start_conversation, recorder
    ):
        """The agent's handle gets the failure at once, because the session is not closed."""
        talk = await start_conversation("ok")
        await talk.timed_reply()
        await talk.server.end_conversations()
        await talk.settle(1)

        error, took = await talk.timed_reply()

        assert isinstance(error, llm.RealtimeError)
        assert 0.0 == took
        assert ("not_recoverable", "not_recoverable") == ended(recorder)[1]
        assert [] == talk.closed

    async def test_close_before_first_request_fails_it_at_once(self, start_conversation, recorder):
        """The close came before any reply could notice it."""
        talk = await start_conversation("ok")
        await talk.server.wait_for("connected")
        await talk.settle(1)
        await talk.server.end_conversations()
        await talk.settle(1)

        _, took = await talk.timed_reply()

        assert 0.0 == took
        assert [("not_recoverable", "not_recoverable")] == ended(recorder)

    async def test_plugin_alone_waits_10_s_after_close(self, start_conversation):
        """The plugin alone lets each caller wait for 10 s."""
        talk = await start_conversation("ok", bare=True)
        await talk.timed_reply()
        await talk.server.end_conversations()
        await talk.settle(1)

        error, took = await talk.timed_reply()

        assert isinstance(error, llm.RealtimeError)
        assert 10.0 == took


class TestCutShort:
    """More of it, for all three without ids, is in test_failure_before_output.py."""

    async def speaking(self, talk):
        """The handle of a reply whose first words are there, a second ago; the connection."""
        handle = talk.ask()
        await talk.received()
        await talk.settle(1)
        (connection,) = talk.server._open
        return handle, connection

    async def test_close_without_event_fails_reply_in_progress(self, start_conversation, recorder):
        """With 1000 the plugin closes the reply's streams as if the reply were whole."""
        talk = await start_conversation("slow:5")
        handle, _ = await self.speaking(talk)
        await talk.server.end_conversations()
        await talk.settle()

        assert [] == talk.errors
        assert [("not_recoverable", "output_started")] == ended(recorder)
        assert "connection_lost" == recorder.attempts[0]["error.type"]
        assert isinstance(handle.exception(), llm.RealtimeError)

    @pytest.mark.parametrize("event", ["assistant_started_speaking", "user_started_speaking"])
    async def test_next_generation_ends_reply_without_end_event(
        self, event, start_conversation, recorder
    ):
        """The next generation ends the reply, which counts as heard."""
        talk = await start_conversation("slow:5")
        _, connection = await self.speaking(talk)
        await connection.send(event)
        await talk.settle(1)

        assert [("succeeded", None)] == ended(recorder)

    async def test_tool_call_after_words_ends_reply_as_heard(self, start_conversation, recorder):
        """The plugin ends the reply at the call of a tool, and the reply was heard."""
        talk = await start_conversation("slow:5")
        _, connection = await self.speaking(talk)
        tool = {"tool_call_id": "1", "tool_name": "look_up", "parameters": {}}
        await connection.send("tool_call", **tool)
        await talk.settle(1)

        assert [("succeeded", None)] == ended(recorder)

    async def test_loss_of_next_reply_does_not_change_whole_one(self, start_conversation, recorder):
        """A reply that begins in the same moment, and is lost, is another one."""
        talk = await start_conversation("silence")
        await talk.ask_plugin()
        (connection,) = talk.server._open
        await connection.reply(talk.server.requests[0])
        await connection.begin(talk.server.requests[0])
        await connection.hang_up(1011, by_script=True)
        await talk.settle()

        assert [("succeeded", None)] == ended(recorder)

    async def test_next_request_ends_reply_as_heard(self, start_conversation, recorder):
        """The plugin closes the reply in progress, which counts as heard."""
        talk = await start_conversation("slow:5,ok")
        await self.speaking(talk)
        await talk.ask_plugin()
        await talk.settle()

        assert [("succeeded", None)] * 2 == ended(recorder)


class TestPolicy:
    async def test_longer_deadline_adds_windows(self, start_conversation, recorder):
        """Windows follow each other, and the last one reaches to the deadline."""
        talk = await start_conversation("silence", deadline=45.0)

        _, took = await talk.timed_reply()

        assert 45.0 == took
        assert ["send", "listen", "listen", "listen"] == actions(recorder)

    @pytest.mark.parametrize(
        ("script", "heard"),
        [("silence,ok", ["reply 2"]), ("late:25,ok", ["reply 2", "reply 1"])],
    )
    async def test_resend_hears_slow_reply_twice(self, script, heard, start_conversation, recorder):
        """By the user's explicit choice a lost request recovers, and a slow one is heard twice."""
        talk = await start_conversation(script, on_silence="resend", deadline=40.0)

        error, _ = await talk.timed_reply()
        await talk.settle()

        assert None is error
        assert heard == talk.heard
        assert ["send", "listen", "send"] == actions(recorder)

    async def test_resend_includes_typed_text(self, start_conversation):
        """The plugin forgets typed text with the first request, and the second has it again."""
        talk = await start_conversation("silence,ok", on_silence="resend", deadline=40.0)
        await talk.realtime._ready_to_start.wait()  # before, the words go into the system prompt

        await talk.session.run(user_input="any news?")

        assert 2 == len(talk.server.requests)
        assert all("any news?" in r.instructions for r in talk.server.requests)

    async def test_typed_text_is_not_sent_with_next_reply(self, start_conversation):
        """Typed text is not sent again with the next reply."""
        talk = await start_conversation("ok,ok")
        await talk.realtime._ready_to_start.wait()  # before, the words go into the system prompt

        await talk.session.run(user_input="any news?")
        await talk.timed_reply(instructions="go on")

        first, second = talk.server.requests
        assert "any news?" in first.instructions
        assert "go on" == second.instructions


class TestNotReady:
    """The plugin sends nothing before the server says that the conversation may begin."""

    async def test_request_before_ready_is_sent_once(self, start_conversation, recorder):
        """The request waits in the plugin while we listen, and is sent once."""
        talk = await start_conversation("ok", simulator=not_ready)
        asyncio.get_running_loop().call_later(15, lambda: tasks.append(ensure(talk.server.begin())))
        tasks, ensure = [], asyncio.ensure_future

        assert (None, 15.0) == await talk.timed_reply()
        await talk.settle()

        assert ["reply 1"] == talk.heard
        assert [("recovered", None)] == ended(recorder)

    @pytest.mark.parametrize("bare", [True, False])
    async def test_request_that_failed_before_ready_is_never_sent(self, bare, start_conversation):
        """The plugin alone reports a failure, and sends the request later."""
        talk = await start_conversation("ok", simulator=not_ready, bare=bare)

        error, _ = await talk.timed_reply()
        await talk.server.begin()
        await talk.settle()

        assert isinstance(error, llm.RealtimeError)
        assert (["reply 1"] if bare else []) == talk.heard

    async def test_interruption_before_ready_drops_request_and_text(self, start_conversation):
        """The request is never sent, and typed text is forgotten, as without traced-retry."""
        talk = await start_conversation("ok,ok", simulator=not_ready)
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
    @pytest.mark.parametrize("event", ["user_started_speaking", "another request", "say"])
    async def test_answer_to_other_request_is_not_late(self, event, start_conversation, recorder):
        """A reply after the caller spoke, or after the next request, answers that."""
        talk = await start_conversation("silence,ok")
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


class TestInterruption:
    @pytest.mark.parametrize("after", [1.0, 12.0], ids=["in the attempt", "while listening"])
    async def test_interruption_ends_reply_and_frees_slot(
        self, after, start_conversation, recorder
    ):
        """The reply ends at once, and the slot is free for the answer to the caller."""
        talk = await start_conversation("silence")
        handle = talk.session.generate_reply()
        await talk.received()
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


class TestWhatTheAgentSees:
    async def test_no_error_handler_sees_key(self, start_conversation):
        """Handlers run in any order with livekit-agents 1.7.0, and none sees the key."""
        talk = await start_conversation("unauthorized")
        seen = []
        for _ in range(50):
            talk.realtime.on("error", lambda event: seen.append(f"{event.error!r} {event.error}"))
        await talk.timed_reply()

        assert 50 == len(seen)
        assert not [text for text in seen if KEY in text]

    async def test_plugin_alone_shows_key_to_error_handlers(self, start_conversation):
        """The plugin alone puts the key into the error that every handler gets."""
        talk = await start_conversation("unauthorized", bare=True)
        await talk.timed_reply()

        assert KEY in str(talk.errors[0].error.error)


class TestContract:
    """What the adapter and the simulator rely on, in the installed plugin."""

    async def test_cancel_of_send_task_prevents_request(self, start_conversation):
        """A cancel before the conversation is ready keeps the request from being sent."""
        talk = await start_conversation("ok", bare=True, simulator=not_ready)
        reply = talk.realtime.generate_reply()
        talk.realtime._generate_reply_task.cancel()
        await talk.settle(1)
        await talk.server.begin()

        with pytest.raises(llm.RealtimeError):
            await reply
        assert [] == talk.server.requests

    async def test_typed_text_is_sent_with_first_request_only(self, start_conversation):
        """The plugin sends typed text with the first request and then forgets it."""
        talk = await start_conversation("ok,ok", bare=True)
        await talk.ask_plugin()
        talk.realtime._pending_user_text = "any news?"
        await talk.ask_plugin()

        assert "any news?" in talk.server.requests[1].instructions
        assert None is talk.realtime._pending_user_text

    async def test_main_task_ends_with_conversation(self, start_conversation):
        """The end of the task is the only sign of a close with 1000."""
        talk = await start_conversation("ok", bare=True)
        await talk.timed_reply()
        await talk.server.end_conversations()
        await talk.settle(1)

        assert talk.realtime._main_atask.done()
        assert [] == talk.errors

    async def test_main_task_closes_reply_only_at_its_end(self, start_conversation, monkeypatch):
        """The main task closes the reply as it ends, and no other close runs in that task."""
        talk = await start_conversation("slow:1,slow:5", bare=True)
        original, by_main = talk.realtime._close_current_generation, []

        def close(**kwargs):
            if talk.realtime._current_generation is not None:
                by_main.append(asyncio.current_task() is talk.realtime._main_atask)
            original(**kwargs)

        monkeypatch.setattr(talk.realtime, "_close_current_generation", close)
        await (await talk.ask_plugin())
        await talk.settle(2)
        await (await talk.ask_plugin())
        await talk.server.end_conversations()
        await talk.settle(1)

        assert [False, True] == by_main

    def test_redirection_fails_if_plugin_lacks_client(self, monkeypatch):
        """The simulator raises an error, so that no real server is called."""
        monkeypatch.delattr(phonic_plugin().realtime.realtime_model, "AsyncPhonic")

        with pytest.raises(RuntimeError, match="AsyncPhonic"), redirected("ws://127.0.0.1:1"):
            pass

    def test_redirection_is_undone(self):
        """After the block the plugin is unchanged."""
        plugin = phonic_plugin().realtime.realtime_model
        original = plugin.AsyncPhonic

        with redirected("ws://127.0.0.1:1"):
            assert original is not plugin.AsyncPhonic
        assert original is plugin.AsyncPhonic
