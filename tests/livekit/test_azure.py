# SPDX-License-Identifier: Apache-2.0
"""Azure VoiceLive with the real plugin and a real AgentSession: on the wire and at the ear."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import pytest
from livekit.agents import llm
from support.conversation import codes, ended
from support.providers import VOICELIVE

from traced_retry.livekit.azure import VoiceLiveAdapter

HOME = "livekit.plugins.azure.realtime.realtime_model"


@pytest.fixture
def provider():
    """Return the provider of every conversation here."""
    return VOICELIVE


class Row(NamedTuple):
    """The expected result of one reply."""

    heard: list[str]
    """The texts that the agent says."""
    requests: int
    """The number of requests that the server receives."""
    outcome: str
    stop_reason: str | None
    code: str | None
    """The code of the error that the agent gets."""
    seconds: tuple[float, float]
    """The shortest and the longest time."""


ALONE = {
    # script: texts heard, requests the server heard, outcome, stop reason,
    # the code the agent gets, seconds at least and at most
    "ok": Row(["reply 1"], 1, "succeeded", None, None, (0, 0.1)),
    "late:7": Row(["reply 1"], 1, "succeeded", None, None, (7, 7.1)),
    "slow:3": Row(["reply 1"], 1, "succeeded", None, None, (3, 3.1)),
    "late:12": Row([], 2, "exhausted", "deadline", None, (20, 20)),
    "late:25": Row([], 2, "exhausted", "deadline", None, (20, 20)),
    "silence": Row([], 2, "exhausted", "deadline", None, (20, 20)),
    "error:server_error": Row([], 4, "exhausted", "max_attempts", None, (0, 7.1)),
    "error:odd_type/odd_code": Row([], 4, "exhausted", "max_attempts", "odd_code", (0, 7.1)),
    "error:invalid_value": Row(
        [], 1, "not_recoverable", "not_recoverable", "invalid_value", (0, 0)
    ),
    "uncorrelated": Row([], 4, "exhausted", "max_attempts", "server_error", (0, 7.1)),
    "rate_limit": Row([], 4, "exhausted", "max_attempts", "rate_limit_exceeded", (0, 7.1)),
    "rate_limit:30": Row([], 1, "exhausted", "deadline", "rate_limit_exceeded", (0, 0.1)),
    "quota": Row([], 1, "not_recoverable", "not_recoverable", "insufficient_quota", (0, 0.1)),
    "unauthorized": Row([], 0, "not_recoverable", "not_recoverable", None, (1.1, 1.2)),
    "failed": Row([], 4, "exhausted", "max_attempts", "server_error", (0, 7.1)),
    "incomplete": Row([], 1, "not_recoverable", "not_recoverable", "content_filter", (0, 0.1)),
    "drop_during": Row(["reply"], 1, "not_recoverable", "output_started", None, (0, 0.1)),
}

THEN_OK = {
    # script: requests the server heard, error codes of our failed attempts, seconds
    "unauthorized,ok": (1, [], (0.1, 0.2)),
    "late:12,ok": (2, ["timeout"], (10, 11.1)),
    "silence,ok": (2, ["timeout"], (10, 11.1)),
    "error:server_error,ok": (2, ["server_error"], (0, 1.1)),
    "error:odd_type/odd_code,ok": (2, ["odd_code"], (0, 1.1)),
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
    async def test_lasting_fault_fails_reply_in_time(self, script, start_conversation, recorder):
        """The failure of a lasting fault is known in time with its code, and nothing is heard."""
        row = ALONE[script]
        talk = await start_conversation(script, ready="unauthorized" not in script)
        began = asyncio.get_running_loop().time()

        error = await talk.reply(instructions="SECRET")
        took = asyncio.get_running_loop().time() - began
        await talk.settle(30)

        assert row.heard == talk.heard
        assert [(row.outcome, row.stop_reason)] == ended(recorder)
        assert row.requests == len(talk.server.requests)
        assert {"send"} == {a["traced_retry.action"] for a in recorder.attempts}
        assert row.seconds[0] <= took <= row.seconds[1]
        if row.outcome != "succeeded":
            assert isinstance(error, llm.RealtimeError)
            assert row.code == error.code
        assert 0 == recorder.open_spans

    @pytest.mark.parametrize("script", THEN_OK)
    async def test_passing_fault_is_recovered_once(self, script, start_conversation, recorder):
        """After a fault that passes the reply is heard exactly once."""
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
    async def test_plugin_alone_has_expected_result(self, script, start_conversation):
        """The table shows the plugin's behavior without traced-retry."""
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

    async def test_connection_that_always_drops_ends_at_deadline(
        self, start_conversation, recorder
    ):
        """The plugin reconnects and sends again every 0.1 s until our deadline."""
        talk = await start_conversation("drop_before")
        began = asyncio.get_running_loop().time()

        error = await talk.reply()
        took = asyncio.get_running_loop().time() - began

        assert isinstance(error, llm.RealtimeError)
        assert [("exhausted", "deadline")] == ended(recorder)
        assert ["connection_lost", "connection_lost"] == codes(recorder)
        assert pytest.approx(20) == took
        assert 2 == len({request.event_id for request in talk.server.requests})

    async def test_server_that_stays_down_fails_reply(self, start_conversation, recorder):
        """The plugin gives up after 1.1 s, and LiveKit closes the agent's session."""
        talk = await start_conversation("silence")
        reply = talk.realtime.generate_reply()
        await talk.received()
        await talk.server.close()

        with pytest.raises(llm.RealtimeError):
            await reply
        assert [("not_recoverable", "not_recoverable")] == ended(recorder)
        assert ["connection_lost"] == codes(recorder)
        assert 0 == recorder.open_spans

    async def test_request_while_disconnected_is_sent_once(self, start_conversation, recorder):
        """The plugin keeps the request until it is connected, and sends it once."""
        talk = await start_conversation("ok,drop_queued:1,ok")
        await talk.reply()
        await talk.server.wait_for("connection_lost")

        assert None is await talk.reply()
        await talk.settle()

        assert ["reply 1", "reply 2"] == talk.heard
        assert [("succeeded", None)] * 2 == ended(recorder)


class TestExactlyOnce:
    async def test_abandoned_request_is_not_resent_after_reconnect(
        self, start_conversation, recorder
    ):
        """The plugin does not send a request again that we have abandoned."""
        talk = await start_conversation("ok,drop_queued:1,ok", attempt_timeout=0.4)
        await talk.reply()
        await talk.server.wait_for("connection_lost")

        await talk.reply()
        await talk.settle(30)

        assert ["reply 1", "reply 2"] == talk.heard
        assert [("succeeded", None), ("recovered", None)] == ended(recorder)
        assert {"connection_lost", None} == set(codes(recorder))
        assert 2 == len(talk.server.requests)

    async def test_two_concurrent_replies_are_answered_in_turn(self, start_conversation, recorder):
        """The server takes one request at a time, so the second reply waits for the first."""
        talk = await start_conversation("slow:3,ok")
        first, second = talk.realtime.generate_reply(), talk.realtime.generate_reply()

        await asyncio.gather(first, second)
        await talk.settle()

        assert ["reply 1", "reply 3"] == talk.server.completed
        assert [("succeeded", None), ("recovered", None)] == sorted(ended(recorder))[::-1]
        assert [] == talk.server.cancels


class TestInterruption:
    async def test_interrupted_request_is_not_resent_after_reconnect(
        self, start_conversation, recorder
    ):
        """The plugin does not send an interrupted request again."""
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


class TestNames:
    @pytest.mark.parametrize(
        ("endpoint", "address", "port"),
        [
            ("https://mine.services.ai.azure.com/", "mine.services.ai.azure.com", 443),
            ("wss://mine.example:8443", "mine.example", 8443),
            ("http://127.0.0.1:1", "127.0.0.1", 1),
            ("http://[::1]/", "::1", 80),
        ],
    )
    async def test_target_has_plain_name_and_address(
        self, endpoint, address, port, start_conversation
    ):
        """The target has a plain name, and the server's address from the model's endpoint."""
        talk = await start_conversation("ok")
        talk.model._opts.endpoint = endpoint
        target = VoiceLiveAdapter(talk.realtime, None).target()

        assert ("azure_voicelive", "gpt-realtime") == (target.provider, target.model)
        assert (address, port) == (target.server_address, target.server_port)


class TestContract:
    """What the VoiceLive adapter relies on, in the installed plugin. See CONTRIBUTING."""

    async def test_request_is_registered_under_sent_id(self, start_conversation):
        """generate_reply adds exactly the sent event_id to _response_created_futures."""
        talk = await start_conversation("ok", bare=True)
        before = set(talk.realtime._response_created_futures)
        reply = talk.realtime.generate_reply()
        (ours,) = set(talk.realtime._response_created_futures) - before
        await reply

        assert ours == talk.server.requests[0].event_id

    @pytest.mark.parametrize("end", ["cancel", "exception", "at once"])
    async def test_abandoned_request_is_cancelled_by_id(self, end, start_conversation):
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

    async def test_dropped_request_is_resent_under_same_id(self, start_conversation):
        """The plugin sends the request again under its id, and the same future resolves."""
        talk = await start_conversation("drop_before,ok", bare=True)

        await talk.realtime.generate_reply()

        assert 2 == len(talk.server.requests)
        assert 1 == len({request.event_id for request in talk.server.requests})

    async def test_raw_events_are_mappings(self, start_conversation):
        """Raw events read like JSON, with the beta's names of events."""
        talk = await start_conversation("ok", bare=True)
        events = []
        talk.realtime.on("azure_server_event_received", lambda e: events.append({**e}))
        await talk.reply()

        (created,) = [e for e in events if e["type"] == "response.created"]
        asked_by = created["response"]["metadata"]["client_event_id"]
        assert asked_by == talk.server.requests[0].event_id
        assert {"response.text.delta", "response.done"} <= {e["type"] for e in events}

    async def test_refused_connection_has_http_status(self, start_conversation):
        """The HTTP status is in the cause of the cause of the error event's error."""
        talk = await start_conversation("unauthorized", bare=True, ready=False)
        events = []
        talk.realtime.on("error", events.append)
        await talk.reply()

        assert 401 == events[0].error.__cause__.__cause__.status
        assert events[0].recoverable
