# SPDX-License-Identifier: Apache-2.0
"""Azure VoiceLive with the real plugin and a real AgentSession: on the wire and at the ear."""

from __future__ import annotations

import asyncio

import pytest
from livekit.agents import Agent, function_tool, llm
from livekit.plugins.azure import realtime as azure
from support.conversation import codes, ended
from support.providers import VOICELIVE

from traced_retry.livekit.azure import VoiceLiveAdapter

HOME = "livekit.plugins.azure.realtime.realtime_model"


@pytest.fixture
def provider():
    """Return the provider of every conversation here."""
    return VOICELIVE


ALONE = {
    # script: texts heard, requests the server heard, outcome, stop reason,
    # the code the agent gets, seconds at least and at most
    "ok": (["reply 1"], 1, "succeeded", None, None, (0, 0.1)),
    "late:7": (["reply 1"], 1, "succeeded", None, None, (7, 7.1)),
    "slow:3": (["reply 1"], 1, "succeeded", None, None, (3, 3.1)),
    "late:12": ([], 2, "exhausted", "deadline", None, (20, 20)),
    "late:25": ([], 2, "exhausted", "deadline", None, (20, 20)),
    "silence": ([], 2, "exhausted", "deadline", None, (20, 20)),
    "error:server_error": ([], 4, "exhausted", "max_attempts", None, (0, 7.1)),
    "error:odd_code": ([], 4, "exhausted", "max_attempts", "odd_code", (0, 7.1)),
    "error:invalid_value": ([], 1, "not_recoverable", "not_recoverable", "invalid_value", (0, 0)),
    "uncorrelated": ([], 4, "exhausted", "max_attempts", "server_error", (0, 7.1)),
    "rate_limit": ([], 4, "exhausted", "max_attempts", "rate_limit_exceeded", (0, 7.1)),
    "rate_limit:30": ([], 1, "exhausted", "deadline", "rate_limit_exceeded", (0, 0.1)),
    "quota": ([], 1, "not_recoverable", "not_recoverable", "insufficient_quota", (0, 0.1)),
    "unauthorized": ([], 0, "not_recoverable", "not_recoverable", None, (1.1, 1.2)),
    "failed": ([], 4, "exhausted", "max_attempts", "server_error", (0, 7.1)),
    "incomplete": ([], 1, "not_recoverable", "not_recoverable", "content_filter", (0, 0.1)),
    "drop_during": (["reply"], 1, "not_recoverable", "output_started", None, (0, 0.1)),
}

NOT_TOLD_BY_THE_HANDLE = {"unauthorized"}
"""Told by span, metric, log and on_exhausted: LiveKit closes its session first."""

THEN_OK = {
    # script: requests the server heard, error codes of our failed attempts, seconds
    "unauthorized,ok": (1, [], (0.1, 0.2)),
    "late:12,ok": (2, ["timeout"], (10, 11.1)),
    "silence,ok": (2, ["timeout"], (10, 11.1)),
    "error:server_error,ok": (2, ["server_error"], (0, 1.1)),
    "error:odd_code,ok": (2, ["odd_code"], (0, 1.1)),
    "uncorrelated,ok": (2, ["server_error"], (0, 1.1)),
    "rate_limit,ok": (2, ["rate_limit_exceeded"], (0, 1.1)),
    "rate_limit:4.5,ok": (2, ["rate_limit_exceeded"], (4.5, 4.6)),
    "active:3,ok": (2, ["conversation_already_has_active_response"], (3, 3.1)),
    # The plugin sends it again by itself; one attempt of ours waits on.
    "drop_before,ok": (2, [], (0.1, 0.2)),
    "drop_before,drop_before,late:3,ok": (3, [], (3.2, 3.3)),
    "malformed,ok": (2, [], (0.1, 0.2)),
    # ... and where that meets another fault, our next attempt is the answer.
    "drop_before,rate_limit,ok": (3, ["rate_limit_exceeded"], (0.1, 1.2)),
    "drop_before,silence,ok": (3, ["timeout"], (10, 11.1)),
}

BARE = {
    # script: what is heard of the plugin alone, the code that the agent gets, seconds
    "ok": (["reply 1"], None, 0),
    "late:7": (["reply 1"], None, 7),
    "late:12,ok": ([], RuntimeError, 10),
    "silence,ok": ([], RuntimeError, 10),
    "late:25": ([], RuntimeError, 10),
    "error:server_error,ok": ([], RuntimeError, 0),
    "uncorrelated,ok": ([], RuntimeError, 10),
    "rate_limit,ok": ([], "rate_limit_exceeded", 0),
    "drop_before,ok": (["reply 2"], None, 0.1),
    "drop_before,silence,ok": ([], RuntimeError, 10),
    "unauthorized": ([], None, 1.1),  # the session is closed; its handle does not say why
    "unauthorized,ok": (["reply 1"], None, 0.1),
}


class TestEachFault:
    @pytest.mark.parametrize("script", ALONE)
    async def test_alone(self, script, start_conversation, recorder):
        """A fault that lasts: the failure is known in time, with its code; nothing is heard."""
        heard, requests, outcome, stop_reason, code, (least, most) = ALONE[script]
        talk = await start_conversation(script, ready="unauthorized" not in script)
        began = asyncio.get_running_loop().time()

        error = await talk.reply(instructions="SECRET")
        took = asyncio.get_running_loop().time() - began
        await talk.settle(30)

        assert heard == talk.heard
        assert [(outcome, stop_reason)] == ended(recorder)
        assert requests == len(talk.server.requests)
        assert {"send"} == {a["traced_retry.action"] for a in recorder.attempts}
        assert least <= took <= most
        if outcome != "succeeded" and script not in NOT_TOLD_BY_THE_HANDLE:
            assert isinstance(error, llm.RealtimeError)
            assert code == error.code
        assert 0 == recorder.open_spans

    @pytest.mark.parametrize("script", THEN_OK)
    async def test_followed_by_ok(self, script, start_conversation, recorder):
        """A fault that passes: the reply is heard exactly once."""
        requests, failed, (least, most) = THEN_OK[script]
        talk = await start_conversation(script, ready="unauthorized" not in script)
        began = asyncio.get_running_loop().time()

        assert None is await talk.reply(instructions="SECRET")
        took = asyncio.get_running_loop().time() - began
        await talk.settle(30)

        assert [f"reply {requests}"] == talk.heard
        assert [("recovered" if failed else "succeeded", None)] == ended(recorder)
        assert [*failed, None] == codes(recorder)
        assert requests == len(talk.server.requests)
        assert least <= took <= most
        assert 0 == recorder.open_spans

    @pytest.mark.parametrize("script", BARE)
    async def test_the_plugin_alone(self, script, start_conversation):
        """What it is like without us."""
        heard, told, seconds = BARE[script]
        talk = await start_conversation(script, bare=True, ready="unauthorized" not in script)
        began = asyncio.get_running_loop().time()

        error = await talk.reply()
        took = asyncio.get_running_loop().time() - began
        await talk.settle(30)

        assert heard == talk.heard
        assert pytest.approx(seconds, abs=0.05) == took
        code = getattr(error, "code", None)
        assert told == (RuntimeError if error is not None and code is None else code)

    async def test_dropped_for_ever(self, start_conversation, recorder):
        """The plugin comes back and sends again every 0.1 s; the deadline ends it for us."""
        talk = await start_conversation("drop_before")
        began = asyncio.get_running_loop().time()

        error = await talk.reply()
        took = asyncio.get_running_loop().time() - began

        assert isinstance(error, llm.RealtimeError)
        assert [("exhausted", "deadline")] == ended(recorder)
        assert ["connection_lost", "connection_lost"] == codes(recorder)
        assert pytest.approx(20) == took
        assert 2 == len({request.event_id for request in talk.server.requests})

    async def test_a_server_that_does_not_come_back(self, start_conversation, recorder):
        """The plugin gives up after 1.1 s, and so do we; LiveKit closes the agent's session."""
        talk = await start_conversation("silence")
        reply = talk.realtime.generate_reply()
        await talk.received()
        await talk.server.close()

        with pytest.raises(llm.RealtimeError):
            await reply
        assert [("not_recoverable", "not_recoverable")] == ended(recorder)
        assert ["connection_lost"] == codes(recorder)
        assert 0 == recorder.open_spans

    async def test_asked_while_the_socket_is_down(self, start_conversation, recorder):
        """The plugin keeps it until it is connected; it is sent once."""
        talk = await start_conversation("ok,drop_queued:1,ok")
        await talk.reply()
        await talk.server.wait_for("connection_lost")

        assert None is await talk.reply()
        await talk.settle()

        assert ["reply 1", "reply 2"] == talk.heard
        assert [("succeeded", None)] * 2 == ended(recorder)


class TestExactlyOnce:
    async def test_a_late_reply_is_cancelled_by_its_id(self, start_conversation):
        """After our retry was heard, the first request's response comes and is not."""
        talk = await start_conversation("late:12,ok")

        await talk.reply()
        await talk.settle()

        assert ["reply 2"] == talk.heard
        (cancelled,) = talk.server.cancels
        assert cancelled is not None

    async def test_given_up_means_never_heard(self, start_conversation):
        """After the agent was told of failure, late replies are cancelled by id, unspoken."""
        talk = await start_conversation("late:25")
        spoken = []
        talk.realtime.on("generation_created", spoken.append)

        assert isinstance(await talk.reply(), llm.RealtimeError)
        await talk.settle(30)

        assert [] == talk.heard == spoken
        assert 2 == len(talk.server.cancels)
        assert None not in talk.server.cancels

    async def test_our_own_timeout_is_harmless(self, start_conversation, recorder):
        """It sends nothing, and the late response is cancelled by its id."""
        talk = await start_conversation("late:4,ok", attempt_timeout=2.0)

        assert None is await talk.reply()
        await talk.settle()

        assert ["reply 2"] == talk.heard
        assert ["timeout", None] == codes(recorder)
        assert [True] == [cancelled is not None for cancelled in talk.server.cancels]

    async def test_our_own_timeout_on_a_lost_connection(self, start_conversation, recorder):
        """What we abandoned is not sent again by the plugin."""
        talk = await start_conversation("ok,drop_queued:1,ok", attempt_timeout=0.4)
        await talk.reply()
        await talk.server.wait_for("connection_lost")

        await talk.reply()
        await talk.settle(30)

        assert ["reply 1", "reply 2"] == talk.heard
        assert [("succeeded", None), ("recovered", None)] == ended(recorder)
        assert {"connection_lost", None} == set(codes(recorder))
        assert 2 == len(talk.server.requests)

    async def test_two_replies_at_once(self, start_conversation, recorder):
        """The server takes one at a time; the other waits for the end of the first."""
        talk = await start_conversation("slow:3,ok")
        first, second = talk.realtime.generate_reply(), talk.realtime.generate_reply()

        await asyncio.gather(first, second)
        await talk.settle()

        assert ["reply 1", "reply 3"] == talk.server.completed
        assert [("succeeded", None), ("recovered", None)] == sorted(ended(recorder))[::-1]
        assert [] == talk.server.cancels

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


class TestInterruption:
    @pytest.mark.parametrize(("script", "late"), [("late:5,ok", 1), ("rate_limit:10,ok", 0)])
    async def test_before_the_reply(self, script, late, start_conversation, recorder):
        """Barge-in in an attempt or in a wait: over at once, and never heard."""
        talk = await start_conversation(script, ready="unauthorized" not in script)
        handle = talk.ask()
        await talk.received()
        await asyncio.sleep(1)
        handle.interrupt()
        await handle
        assert [] == talk.server.cancels
        await talk.settle()

        assert [("interrupted", "interrupted")] == ended(recorder)
        assert [] == talk.heard
        assert 1 == len(talk.server.requests)
        assert late == len(talk.server.cancels)
        assert None not in talk.server.cancels

    async def test_on_a_lost_connection(self, start_conversation, recorder):
        """The plugin does not send again what nobody wants any more."""
        talk = await start_conversation("ok,drop_queued:3,ok")
        await talk.reply()
        await talk.server.wait_for("connection_lost")
        handle = talk.ask()
        await asyncio.sleep(1)
        handle.interrupt()
        await handle
        await talk.settle()

        assert [("succeeded", None), ("interrupted", "interrupted")] == ended(recorder)
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
        talk = await start_conversation(script, ready="unauthorized" not in script)
        reply = talk.realtime.generate_reply()
        await talk.received()
        await asyncio.sleep(1)
        await talk.realtime.aclose()

        with pytest.raises(llm.RealtimeError):
            await reply
        assert [("not_recoverable", "session_closed")] == ended(recorder)
        assert 0 == recorder.open_spans

    async def test_asked_after_the_end(self, start_conversation, recorder):
        """The plugin refuses by itself; the span says so."""
        talk = await start_conversation("ok")
        await talk.realtime.aclose()

        with pytest.raises(llm.RealtimeError):
            await talk.realtime.generate_reply()

        assert [("not_recoverable", "session_closed")] == ended(recorder)
        assert ["session_closed"] == codes(recorder)

    @pytest.mark.parametrize("script", ["silence", "rate_limit:10"])
    async def test_the_caller_closes(self, script, start_conversation, recorder):
        """The agent's session closes with a reply in mid-air: nothing stays open."""
        talk = await start_conversation(script, ready="unauthorized" not in script)
        talk.ask()
        await talk.received()
        await talk.session.aclose()
        await talk.settle()

        assert 1 == len(ended(recorder))
        assert [] == talk.heard
        assert 0 == recorder.open_spans


class TestNames:
    @pytest.mark.parametrize(
        ("endpoint", "address", "port"),
        [
            ("https://mine.services.ai.azure.com/", "mine.services.ai.azure.com", 443),
            ("wss://mine.example:8443", "mine.example", 8443),
            ("http://127.0.0.1:1", "127.0.0.1", 1),
        ],
    )
    async def test_target(self, endpoint, address, port, start_conversation):
        """A plain name, and the server's address from the model's endpoint."""
        talk = await start_conversation("ok")
        talk.model._opts.endpoint = endpoint
        target = VoiceLiveAdapter(talk.realtime, None).target()

        assert ("azure_voicelive", "gpt-realtime") == (target.provider, target.model)
        assert (address, port) == (target.server_address, target.server_port)

    @pytest.mark.parametrize("script", ["error:server_error", "unauthorized", "malformed", "quota"])
    async def test_no_content_and_no_key(self, script, start_conversation, recorder, caplog):
        """Neither instructions nor key are in spans, metrics or our log."""
        talk = await start_conversation(f"{script},{script},silence")
        error = await talk.reply(instructions="SECRET instructions")

        told = [
            repr([s.to_json() for s in recorder.spans() if s.name.startswith("generate_reply")]),
            repr([recorder.points(m) for m in recorder.metric_names()]),
            repr([vars(r) for r in caplog.records if r.name == "traced_retry"]),
            repr(error),
        ]
        assert not [t for t in told if "SECRET" in t]


class TestContract:
    """What the VoiceLive adapter relies on, in the installed plugin. See CONTRIBUTING."""

    async def test_private_attributes(self, start_conversation):
        """A plugin version that moves one fails here, by its name."""
        talk = await start_conversation("ok", bare=True)

        assert [] == VoiceLiveAdapter(talk.realtime, None).missing()

    def test_module(self):
        """The registry finds the adapter by the module that the session's class comes from."""
        assert HOME == azure.RealtimeSession.__module__

    async def test_a_request_shows_up_by_its_id(self, start_conversation):
        """generate_reply adds exactly the sent event_id to _response_created_futures."""
        talk = await start_conversation("ok", bare=True)
        before = set(talk.realtime._response_created_futures)
        reply = talk.realtime.generate_reply()
        (ours,) = set(talk.realtime._response_created_futures) - before
        await reply

        assert ours == talk.server.requests[0].event_id

    @pytest.mark.parametrize("end", ["cancel", "exception", "at once"])
    async def test_an_abandoned_request_is_cancelled_by_id(self, end, start_conversation):
        """Ending the future sends nothing; the late response is cancelled by id, not surfaced."""
        talk = await start_conversation("late:1", bare=True)
        surfaced = []
        talk.realtime.on("generation_created", surfaced.append)
        reply = talk.realtime.generate_reply()
        if end != "at once":
            await talk.received()
        if end == "cancel":
            reply.cancel()
        else:
            reply.set_exception(llm.RealtimeError("abandoned"))
            reply.exception()
        await asyncio.sleep(0.5)
        assert [] == talk.server.cancels
        await talk.settle()

        # One that was not sent yet when its future ended is never sent.
        sent = 0 if end == "at once" else 1
        assert [] == surfaced
        assert sent == len(talk.server.requests) == len(talk.server.cancels)
        assert None not in talk.server.cancels

    async def test_a_dropped_request_is_sent_again(self, start_conversation):
        """By the plugin itself, under its id; the same future resolves."""
        talk = await start_conversation("drop_before,ok", bare=True)

        await talk.realtime.generate_reply()

        assert 2 == len(talk.server.requests)
        assert 1 == len({request.event_id for request in talk.server.requests})

    async def test_events_are_mappings(self, start_conversation):
        """Raw events read like JSON, with the beta's names of events."""
        talk = await start_conversation("ok", bare=True)
        events = []
        talk.realtime.on("azure_server_event_received", lambda e: events.append({**e}))
        await talk.reply()

        (created,) = [e for e in events if e["type"] == "response.created"]
        asked_by = created["response"]["metadata"]["client_event_id"]
        assert asked_by == talk.server.requests[0].event_id
        assert {"response.text.delta", "response.done"} <= {e["type"] for e in events}

    async def test_a_refused_connection_shows_its_status(self, start_conversation):
        """In the cause of the cause of the error event's error."""
        talk = await start_conversation("unauthorized", bare=True, ready=False)
        events = []
        talk.realtime.on("error", events.append)
        await talk.reply()

        assert 401 == events[0].error.__cause__.__cause__.status
        assert events[0].recoverable
