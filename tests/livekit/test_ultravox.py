# SPDX-License-Identifier: Apache-2.0
"""What the Ultravox adapter has of its own; the rest is in test_single_slot.py.

With the real plugin and a real AgentSession: on the wire and at the ear.
Heard is what reaches the conversation: the agent reads the streams of an Ultravox reply with a
second SpeechHandle, so the handle of whoever asked stays empty, with us or without.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
from livekit.agents import Agent, function_tool, llm
from support.conversation import actions, ended, late, now
from support.providers import ULTRAVOX

from traced_retry.livekit.adapter import failure_from_event
from traced_retry.simulator.ultravox import UltravoxSimulator

LISTENS = ["send", "listen", "listen", "listen"]


@pytest.fixture
def provider():
    """Return the provider of every conversation here."""
    return ULTRAVOX


class TestEachFault:
    @pytest.mark.parametrize("thinks", [True, False])
    @pytest.mark.parametrize(("script", "heard_late"), [("late:7", 0), ("late:25", 1)])
    async def test_reply_of_thinking_server_is_late_only_by_first_word(
        self, script, heard_late, thinks, start_conversation, recorder
    ):
        """The generation exists before the agent's failure, and its first word counts."""
        talk = await start_conversation(script, simulator=partial(UltravoxSimulator, thinks=thinks))

        await talk.timed_reply()
        await talk.settle()

        assert ["reply 1"] == talk.heard
        assert heard_late == late(recorder)

    @pytest.mark.parametrize("bare", [True, False])
    async def test_server_that_starts_late_is_heard_once(self, bare, start_conversation, recorder):
        """The plugin calls again each second, and sends the waiting request once.

        Alone it reports the failure after 5 s, and the reply is heard nevertheless.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = UltravoxSimulator("late:6", port=port)
        url = {"base_url": f"http://127.0.0.1:{port}/api"}
        ultravox = replace(ULTRAVOX, address=lambda _: url)
        talk = await start_conversation(
            "ok", provider=ultravox, simulator=lambda _: nullcontext(server), bare=bare
        )
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
    """More of it, for all three without ids, is in test_failure_before_output.py."""

    async def speaking(self, talk):
        """The handle of a reply whose first words are there, a second ago."""
        handle = talk.ask()
        await talk.received()
        await talk.settle(1)
        return handle

    async def test_loss_without_event_fails_reply_in_progress(self, start_conversation, recorder):
        """A message that cannot be sent makes the plugin open another call without an event."""
        talk = await start_conversation("slow:5,ok")
        handle = await self.speaking(talk)
        talk.realtime._send_client_event({"unsendable": object()})
        await talk.settle()

        assert (2, []) == (talk.server.connections, talk.errors)
        assert [("not_recoverable", "output_started")] == ended(recorder)
        assert "connection_lost" == recorder.attempts[0]["error.type"]
        assert isinstance(handle.exception(), llm.RealtimeError)
        assert None is await talk.reply()

    async def test_new_instructions_count_reply_as_heard(self, start_conversation, recorder):
        """New instructions make the plugin open another call, and the reply counts as heard."""
        talk = await start_conversation("slow:5")
        handle = await self.speaking(talk)
        await talk.realtime.update_instructions("other")
        await talk.settle()

        assert 2 == talk.server.connections
        assert [("succeeded", None)] == ended(recorder)
        assert None is handle.exception()
        assert 0 == recorder.open_spans

    async def test_tool_call_after_words_ends_reply_as_heard(self, start_conversation, recorder):
        """The plugin ends the reply at the call of a tool, and the reply was heard."""
        talk = await start_conversation("slow:5")
        await self.speaking(talk)
        (call,) = talk.server._open
        tool = {"toolName": "look_up", "invocationId": "1", "parameters": {}}
        await call.send("client_tool_invocation", **tool)
        await talk.settle(1)

        assert [("succeeded", None)] == ended(recorder)


class TestToolCall:
    @pytest.mark.parametrize("thinks", [False, True])
    @pytest.mark.parametrize(("bare", "seconds"), [(False, 0.0), (True, 5.0)])
    async def test_reply_of_only_tool_call_runs_tool_at_once(
        self, bare, seconds, thinks, start_conversation, recorder
    ):
        """The call of a tool answers the request.

        With the plugin alone the request fails after 5 s, and the tool runs only then.
        """
        agent, called = helper()
        talk = await start_conversation("silence,ok", agent=agent, bare=bare)
        began = now()
        handle = await talk.ask_agent()
        (call,) = talk.server._open
        if thinks:
            await call.send("state", state="thinking")
        tool = {"toolName": "look_up", "invocationId": "1", "parameters": {}}
        await call.send("client_tool_invocation", **tool)
        await handle
        await talk.settle()

        assert bare == isinstance(handle.exception(), llm.RealtimeError)
        assert [seconds] == [at - began for at in called]
        assert ["reply 2"] == talk.heard
        if not bare:
            assert [("succeeded", None)] == ended(recorder)

    async def test_tool_call_with_unexpected_fields_resolves_nothing(
        self, start_conversation, recorder
    ):
        """A call that the plugin cannot read is no answer, and the reply that follows is."""
        talk = await start_conversation("ok,late:2")
        await talk.reply()
        reply = await talk.ask_plugin()
        (call,) = talk.server._open
        await call.send("client_tool_invocation", toolName=7, invocationId=None, parameters=[])
        await talk.settle(1)

        assert not reply.done()
        await reply
        assert [("succeeded", None)] * 2 == ended(recorder)


def helper():
    """Return an agent with one tool, and the times of the tool's calls."""
    called = []

    class Helper(Agent):
        @function_tool
        async def look_up(self) -> str:
            """Look it up."""
            called.append(now())
            return "found"

    return Helper(instructions="SECRET"), called


class TestPolicy:
    async def test_one_retry_listens_until_deadline(self, start_conversation, recorder):
        """Listening costs nothing, and an earlier end would only make the reply a late one."""
        talk = await start_conversation("late:18", max_retries=1)

        assert (None, 18.0) == await talk.timed_reply()
        await talk.settle()

        assert LISTENS[:2] == actions(recorder)
        assert ["reply 1"] == talk.heard

    async def test_attempt_timeout_adds_windows(self, start_conversation, recorder):
        """Shorter windows are more, and the plugin's own timeout leaves our slot unchanged."""
        talk = await start_conversation("late:7", attempt_timeout=2.0)

        assert (None, 7.0) == await talk.timed_reply()
        await talk.settle()

        assert LISTENS == actions(recorder)
        assert ["reply 1"] == talk.heard

    @pytest.mark.parametrize(
        ("script", "heard"), [("silence,ok", ["reply 2"]), ("late:12,ok", ["reply 2", "reply 1"])]
    )
    async def test_resend_hears_slow_reply_twice(self, script, heard, start_conversation, recorder):
        """By the user's explicit choice a lost request recovers, and a slow one is heard twice."""
        talk = await start_conversation(script, on_silence="resend")

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
    async def test_adapter_listens_only_after_silence(self, kind, action, start_conversation):
        """After any other failure no action is known to be safe."""
        talk = await start_conversation("ok")
        request = talk.realtime._traced_retry._adapter.request(None)

        assert action == request.next_action(failure_from_event(kind, "it failed"))


class TestLateReplies:
    @pytest.mark.parametrize("event", ["playback_clear_buffer", "another request"])
    async def test_answer_to_other_request_is_not_late(self, event, start_conversation, recorder):
        """A reply after the caller spoke, or after the next request, answers that."""
        talk = await start_conversation("silence,ok")
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

    async def test_reply_after_interrupted_request_is_not_late(self, start_conversation, recorder):
        """A request followed and was interrupted, so a reply now may answer either."""
        talk = await start_conversation("silence,late:3")
        await talk.timed_reply()
        (await talk.ask_plugin()).cancel()
        await talk.settle()

        assert ["reply 2"] == talk.heard
        assert 0 == late(recorder)

    async def test_say_after_failure_is_not_late(self, start_conversation, recorder):
        """say() after the failure is no late reply."""
        talk = await start_conversation("silence")
        if not talk.realtime.capabilities.supports_say:
            pytest.skip("the plugin has no say() yet in 1.7.0")
        await talk.timed_reply()
        await talk.realtime.say("sorry")
        await talk.settle()

        assert 0 == late(recorder)


class TestInterruption:
    @pytest.mark.parametrize("after", [1.0, 8.0], ids=["in the attempt", "while listening"])
    async def test_interruption_ends_reply_and_sends_nothing(
        self, after, start_conversation, recorder
    ):
        """The caller speaks, and the server hears that, so nothing is sent."""
        talk = await start_conversation("silence")
        handle = talk.session.generate_reply()
        await talk.received()
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

    async def test_plugin_alone_requests_another_reply(self, start_conversation):
        """Its empty immediate message lacks deferResponse, which is a request by the protocol."""
        talk = await start_conversation("silence,ok", bare=True)
        handle = talk.session.generate_reply()
        await talk.received()
        handle.interrupt()
        await handle
        await talk.settle()

        assert 2 == len(talk.server.requests)
        assert [None] == talk.server.cancels
        assert ["reply 2"] == talk.heard

    async def test_reply_after_interruption_is_not_late(self, start_conversation, recorder):
        """The interruption is no failure, so a reply after it is not a late one."""
        talk = await start_conversation("late:7")
        reply = await talk.ask_plugin()
        reply.cancel()
        await talk.settle()

        assert [("interrupted", "interrupted")] == ended(recorder)
        assert 0 == late(recorder)

    async def test_cancel_of_older_reply_keeps_slot_of_newer(self, start_conversation, recorder):
        """The cancel of the older reply leaves the newer one's slot unchanged."""
        talk = await start_conversation("silence,ok")
        first = await talk.ask_plugin()
        first.cancel()
        second = talk.realtime.generate_reply()

        assert (await second).user_initiated
        await talk.settle(1)
        assert ["interrupted", "succeeded"] == [end for end, _ in ended(recorder)]

    async def test_new_instructions_supersede_pending_reply(self, start_conversation, recorder):
        """The plugin opens a new call and drops the request of the old one."""
        talk = await start_conversation("silence")
        reply = await talk.ask_plugin()
        await asyncio.sleep(8)
        await talk.realtime.update_instructions("other")

        with pytest.raises(asyncio.CancelledError):
            await reply
        assert [("superseded", "superseded")] == ended(recorder)


class TestWhatTheAgentSees:
    async def test_agent_gets_streams_of_plugin(self, start_conversation):
        """The agent gets the plugin's own streams of a reply that came while listening."""
        talk = await start_conversation("late:7")
        made = []
        talk.realtime.on("generation_created", made.append)

        generation = await talk.realtime.generate_reply()

        assert made[0].message_stream is generation.message_stream
        assert made[0].function_stream is generation.function_stream

    async def test_span_names_model(self, start_conversation, recorder):
        """The reply's span carries the model that the plugin names."""
        talk = await start_conversation("ok")
        await talk.timed_reply()

        assert "fixie-ai/ultravox" == recorder.replies[0]["gen_ai.request.model"]


class TestContract:
    """What the adapter relies on, in the installed plugin."""

    async def test_slot_without_epoch_is_never_resolved(self, start_conversation):
        """Without the epoch beside it a future in the slot is never resolved."""
        talk = await start_conversation("ok", bare=True)
        slot = talk.realtime._pending_generation_fut = asyncio.Future()
        await talk.server.wait_for("connected")
        (call,) = talk.server._open
        await call.begin(talk.server.take_turn())
        await talk.settle()

        assert not slot.done()

    async def test_cancel_with_empty_slot_sends_nothing(self, start_conversation):
        """The plugin sends its empty message only for the future in the slot."""
        talk = await start_conversation("silence", bare=True)
        theirs = await talk.ask_plugin()
        talk.realtime._pending_generation_fut = None
        theirs.cancel()
        await talk.settle()

        assert [] == talk.server.cancels

    async def test_generation_is_announced_before_future_resolves(self, start_conversation):
        """The event is not user-initiated, so the agent reads the streams with its own handle."""
        talk = await start_conversation("ok", bare=True)
        made = []
        reply = talk.realtime.generate_reply()
        talk.realtime.on(
            "generation_created", lambda e: made.append((e.user_initiated, reply.done()))
        )
        await reply

        assert [(False, False)] == made

    async def test_refused_connection_has_status_in_text(self, start_conversation):
        """The error's text is ``HTTP 401: ...``, and no attribute holds the status."""
        talk = await start_conversation("unauthorized", bare=True)
        errors = []
        talk.realtime.on("error", errors.append)
        await talk.settle(1)

        assert [False] == [e.recoverable for e in errors]
        assert str(errors[0].error).startswith("HTTP 401")

    async def test_event_comes_before_its_effect(self, start_conversation):
        """A new call is seen while the output of the old one still exists."""
        talk = await start_conversation("slow:5", bare=True)
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
