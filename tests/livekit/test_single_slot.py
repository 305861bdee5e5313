# SPDX-License-Identifier: Apache-2.0
"""What Ultravox and Phonic have in common: after silence their adapters listen on, and that is all.

With the real plugins and a real AgentSession: on the wire and at the ear. What each of them has of
its own is in test_ultravox.py and test_phonic.py.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import NamedTuple

import pytest
from livekit.agents import llm
from support.conversation import actions, ended, late, now
from support.providers import PHONIC, ULTRAVOX, ProviderCase

LISTENS = ["send", "listen", "listen", "listen"]


@dataclass(frozen=True)
class Kind:
    """One of the two, and what becomes of a reply there."""

    provider: ProviderCase
    slot: str
    """Where the plugin keeps the future of the reply that it waits for."""
    gives_up: float
    """Seconds after which the plugin does."""
    second: float
    """Seconds after which we listen on for the first time, and have not yet for the second."""
    late: str
    """A reply in that time."""
    listens: list[str]
    """What is done until the deadline."""
    rows: dict
    """{script: (heard, outcome, stop reason, actions, seconds, late replies), and without us:
    (heard, whether the agent is told of failure, seconds)}"""
    fatal: dict
    """{script: error.type}. The connection is lost or refused: the session is dead, and LiveKit
    closes the agent's before it reads our future, so the handle is silent, with us or without."""


class Row(NamedTuple):
    """The expected result of one reply."""

    heard: int
    """The number of texts that the agent says."""
    outcome: str
    stop_reason: str | None
    actions: list[str]
    seconds: float
    late: int
    """The number of late replies."""
    heard_alone: int
    """The number of texts without traced-retry."""
    fails_alone: bool
    """Whether the agent gets an error without traced-retry."""
    seconds_alone: float
    """The time without traced-retry."""


KINDS = {
    "ultravox": Kind(
        ULTRAVOX,
        "_pending_generation_fut",
        gives_up=5.0,
        second=8.0,
        late="late:7",
        listens=LISTENS,
        rows={
            "ok": Row(1, "succeeded", None, ["send"], 0.0, 0, 1, False, 0.0),
            "late:4.8": Row(1, "succeeded", None, ["send"], 4.8, 0, 1, False, 4.8),
            "late:4.95": Row(1, "recovered", None, LISTENS[:2], 4.95, 0, 1, False, 4.95),
            "late:7": Row(1, "recovered", None, LISTENS[:2], 7.0, 0, 1, True, 5.0),
            "late:12": Row(1, "recovered", None, LISTENS[:3], 12.0, 0, 1, True, 5.0),
            "late:19.9": Row(1, "recovered", None, LISTENS, 19.9, 0, 1, True, 5.0),
            "late:25": Row(1, "exhausted", "deadline", LISTENS, 20.0, 1, 1, True, 5.0),
            "silence,ok": Row(0, "exhausted", "deadline", LISTENS, 20.0, 0, 0, True, 5.0),
            "silence": Row(0, "exhausted", "deadline", LISTENS, 20.0, 0, 0, True, 5.0),
            "malformed": Row(0, "exhausted", "deadline", LISTENS, 20.0, 0, 0, True, 5.0),
            "slow:8": Row(1, "succeeded", None, ["send"], 8.0, 0, 1, False, 8.0),
        },
        fatal={
            "drop_before": "connection_lost",
            "rate_limit": "rate_limit",
            "quota": "quota",
            "unauthorized": "authentication",
        },
    ),
    "phonic": Kind(
        PHONIC,
        "_pending_generate_reply_fut",
        gives_up=10.0,
        second=12.0,
        late="late:12",
        listens=LISTENS[:2],
        rows={
            "ok": Row(1, "succeeded", None, ["send"], 0.0, 0, 1, False, 0.0),
            "late:7": Row(1, "succeeded", None, ["send"], 7.0, 0, 1, False, 7.0),
            "late:9.95": Row(1, "recovered", None, LISTENS[:2], 9.95, 0, 1, False, 9.95),
            "late:12": Row(1, "recovered", None, LISTENS[:2], 12.0, 0, 1, True, 10.0),
            "late:19.9": Row(1, "recovered", None, LISTENS[:2], 19.9, 0, 1, True, 10.0),
            "late:25": Row(1, "exhausted", "deadline", LISTENS[:2], 20.0, 1, 1, True, 10.0),
            "silence,ok": Row(0, "exhausted", "deadline", LISTENS[:2], 20.0, 0, 0, True, 10.0),
            "silence": Row(0, "exhausted", "deadline", LISTENS[:2], 20.0, 0, 0, True, 10.0),
            "malformed": Row(0, "exhausted", "deadline", LISTENS[:2], 20.0, 0, 0, True, 10.0),
            "slow:12": Row(1, "succeeded", None, ["send"], 12.0, 0, 1, False, 12.0),
        },
        # The plugin has no reconnect, and drops the code of an error message.
        fatal={
            "drop_before": "connection_lost",
            "error:internal_error": "_OTHER",
            "rate_limit": "_OTHER",
            "quota": "_OTHER",
            "unauthorized": "authentication",
        },
    ),
}


@pytest.fixture(params=KINDS)
def kind(request):
    """One of the two."""
    return KINDS[request.param]


def scripts(of):
    """The test for each kind with each of its scripts: ``of`` a kind, a list of them."""
    each = [(name, script) for name, kind in KINDS.items() for script in of(kind)]
    return pytest.mark.parametrize(("kind", "script"), each, indirect=["kind"])


LISTENING = pytest.mark.parametrize("listening", [False, True], ids=["in the attempt", "listening"])


@pytest.fixture
def provider(kind):
    """Return the provider of the slot."""
    return kind.provider


class TestEachFault:
    @scripts(lambda kind: kind.rows)
    async def test_each_fault_has_expected_result(self, kind, script, start_conversation, recorder):
        """A reply is heard once if the server answers in time, and otherwise fails in time."""
        row = kind.rows[script]
        talk = await start_conversation(script)

        error, took = await talk.timed_reply(instructions="SECRET")
        await talk.settle()

        assert row.heard == len(talk.heard)
        assert [(row.outcome, row.stop_reason)] == ended(recorder)
        assert row.actions == actions(recorder)
        assert row.seconds == took
        assert (row.outcome == "exhausted") == isinstance(error, llm.RealtimeError)
        assert row.late == late(recorder)
        assert 1 == len(talk.server.requests)
        assert [] == getattr(talk.server, "cancels", [])  # Phonic has no way to
        assert 0 == recorder.open_spans

    @scripts(lambda kind: kind.rows)
    async def test_plugin_alone_hears_reply_after_reported_failure(
        self, kind, script, start_conversation
    ):
        """A reply after the plugin's timeout is reported as failed, and heard nevertheless."""
        row = kind.rows[script]
        talk = await start_conversation(script, bare=True)

        error, took = await talk.timed_reply()
        await talk.settle()

        assert row.heard_alone == len(talk.heard)
        assert row.fails_alone == isinstance(error, llm.RealtimeError)
        assert row.seconds_alone == took

    @scripts(lambda kind: kind.fatal)
    async def test_lost_or_refused_connection_fails_reply_at_once(
        self, kind, script, start_conversation, recorder
    ):
        """The plugin neither reconnects nor retries a refused connection."""
        talk = await start_conversation(script)

        _, took = await talk.timed_reply(instructions="SECRET")
        await talk.settle()

        assert [("not_recoverable", "not_recoverable")] == ended(recorder)
        assert [kind.fatal[script]] == [a["error.type"] for a in recorder.attempts]
        assert ["send"] == actions(recorder)
        assert 0.0 == took
        assert [] == talk.heard
        assert 1 == len(talk.closed)
        assert 0 == recorder.open_spans

    @scripts(lambda kind: kind.fatal)
    async def test_each_request_on_closed_session_gets_error_at_once(
        self, script, start_conversation
    ):
        """The first and every later request get an error that LiveKit catches."""
        talk = await start_conversation(script)

        for _ in range(2):
            began = now()
            with pytest.raises(
                llm.RealtimeError, match=r"session failed|connection was lost|refused"
            ):
                await talk.realtime.generate_reply()
            assert began == now()
            await talk.settle(1)

    async def test_loss_in_middle_of_reply_reaches_agent(self, start_conversation, recorder):
        """The agent gets the failure before its session closes."""
        talk = await start_conversation("drop_during")

        error, _ = await talk.timed_reply()
        await talk.settle()

        assert isinstance(error, llm.RealtimeError)
        assert [("not_recoverable", "output_started")] == ended(recorder)
        assert 1 == len(talk.server.requests)
        assert 1 == len(talk.closed)


class TestPolicy:
    async def test_zero_retries_behave_as_plugin_alone(self, kind, start_conversation, recorder):
        """The plugin's own timeout fails the reply, and the late reply is counted."""
        talk = await start_conversation(kind.late, max_retries=0)

        error, took = await talk.timed_reply()
        await talk.settle()

        assert "generate_reply timed out" in str(error)
        assert kind.gives_up == took
        assert [("exhausted", "max_attempts")] == ended(recorder)
        assert 1 == late(recorder)

    @pytest.mark.parametrize("on_silence", ["listen", "restart"])
    async def test_restart_only_listens(self, on_silence, kind, start_conversation, recorder):
        """No restart exists here, so the adapter only listens."""
        talk = await start_conversation("silence", on_silence=on_silence)

        await talk.timed_reply()

        assert kind.listens == actions(recorder)


class TestLateReplies:
    async def test_late_reply_is_counted_and_linked(
        self, request, start_conversation, recorder, caplog
    ):
        """It counts once, with one WARN record and an exemplar that lead to the failed reply."""
        talk = await start_conversation("late:25")

        await talk.timed_reply()
        await talk.settle()

        (span,) = recorder.spans("generate_reply")
        assert [(span.context.trace_id, span.context.span_id)] == exemplars(recorder)
        name = request.node.callspec.params["kind"]
        assert {name: 1} == recorder.counted("traced_retry.late_replies", "gen_ai.provider.name")
        (record,) = [r for r in caplog.records if "heard after" in r.getMessage()]
        assert f"{span.context.trace_id:032x}" == record.trace_id


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


@LISTENING
class TestSomethingComesBetween:
    async def test_newer_request_supersedes_reply(
        self, listening, kind, start_conversation, recorder
    ):
        """It takes the slot, and the older caller is cancelled."""
        talk = await start_conversation("silence,ok")
        first = await talk.ask_plugin()
        await asyncio.sleep(kind.second if listening else 0.0)
        await (await talk.ask_plugin())
        await talk.settle(1)

        assert first.cancelled()
        assert [("superseded", "superseded"), ("succeeded", None)] == ended(recorder)
        assert [] == getattr(talk.server, "cancels", [])

    async def test_session_close_fails_pending_reply(
        self, listening, kind, start_conversation, recorder
    ):
        """Closing the realtime session ends a pending reply."""
        talk = await start_conversation("silence")
        reply = await talk.ask_plugin()
        await asyncio.sleep(kind.second if listening else 1.0)
        await talk.realtime.aclose()

        with pytest.raises(llm.RealtimeError):
            await reply
        assert [("not_recoverable", "session_closed")] == ended(recorder)
        assert 0 == recorder.open_spans


class TestWhatTheAgentSees:
    async def test_agent_close_while_listening_leaves_nothing_open(
        self, kind, start_conversation, recorder
    ):
        """The agent's session closes with a reply in a window of listening."""
        talk = await start_conversation("silence")
        talk.session.generate_reply()
        await talk.received()
        await asyncio.sleep(kind.second)
        await talk.session.aclose()

        assert 1 == len(ended(recorder))
        assert 0 == recorder.open_spans

    async def test_failed_reply_frees_slot_for_next(self, kind, start_conversation, recorder):
        """A failed reply leaves the slot free for the next."""
        talk = await start_conversation(f"silence,ok,{kind.late}")

        for _ in range(3):
            await talk.timed_reply()
        await talk.settle()

        assert ["reply 2", "reply 3"] == talk.heard
        assert ["exhausted", "succeeded", "recovered"] == [end for end, _ in ended(recorder)]


class TestContract:
    """What both adapters rely on, in the installed plugins."""

    async def test_plugin_timeout_leaves_our_future_in_slot(self, kind, start_conversation):
        """The plugin's own future fails then, and ours in the slot waits on and is resolved."""
        talk = await start_conversation(kind.late, bare=True)
        theirs = await talk.ask_plugin()
        ours = asyncio.Future()
        setattr(talk.realtime, kind.slot, ours)

        with pytest.raises(llm.RealtimeError, match="timed out"):
            await theirs
        assert ours is getattr(talk.realtime, kind.slot)
        assert (await ours).user_initiated

    async def test_current_generation_holds_stream_until_whole(self, start_conversation):
        """``_current_generation`` holds the stream of the future until the reply is whole."""
        talk = await start_conversation("slow:1", bare=True)
        await talk.server.wait_for("connected")
        reply = await talk.realtime.generate_reply()

        assert reply.message_stream is talk.realtime._current_generation.message_ch
        await talk.settle(2)
        assert None is talk.realtime._current_generation


SPEAKS = {
    # provider: the events of a reply without output
    "ultravox": [("state", {"state": "speaking"}), ("state", {"state": "listening"})],
    "phonic": [("assistant_started_speaking", {}), ("assistant_finished_speaking", {})],
}
WORDS = {"phonic": ("audio_chunk", {"audio": "", "text": "SECRET"})}


class TestOutput:
    async def reply(self, start_conversation, events, **kwargs):
        """Send these events as the answer to the first request."""
        talk = await start_conversation("silence,ok", **kwargs)
        handle = await talk.ask_agent()
        (connection,) = talk.server._open
        for event, fields in events:
            await connection.send(event, **fields)
        await talk.settle(1)
        assert handle.done()
        return talk, handle.exception()

    @pytest.mark.parametrize("bare", [False, True])
    @pytest.mark.parametrize("kind", SPEAKS, indirect=True)
    async def test_reply_without_output_fails_at_its_end(
        self, kind, bare, start_conversation, recorder
    ):
        """Nobody heard it, and it is not requested again. The plugin alone reports nothing."""
        name = kind.provider.name
        talk, error = await self.reply(start_conversation, SPEAKS[name], bare=bare)

        assert bare == (error is None)
        assert 1 == len(talk.server.requests)
        if not bare:
            assert [("exhausted", "unsafe_to_resend")] == ended(recorder)
            assert "empty_response" == recorder.attempts[0]["error.type"]
            assert None is await talk.reply()

    @pytest.mark.parametrize("bare", [False, True])
    @pytest.mark.parametrize("kind", WORDS, indirect=True)
    async def test_text_of_audio_model_is_not_heard(self, kind, bare, start_conversation, recorder):
        """Words without sound are not heard. The plugin alone reports nothing."""
        first, last = SPEAKS[kind.provider.name]
        events = [first, WORDS[kind.provider.name], last]
        _, error = await self.reply(start_conversation, events, bare=bare)

        assert bare == (error is None)
        if not bare:
            assert "empty_response" == recorder.attempts[0]["error.type"]

    @pytest.mark.parametrize("kind", ["ultravox"], indirect=True)
    async def test_interrupted_reply_without_output_is_no_failure(
        self, start_conversation, recorder
    ):
        """The caller spoke before the first word."""
        first, last = SPEAKS["ultravox"]
        events = [first, ("playback_clear_buffer", {}), last]
        await self.reply(start_conversation, events)

        assert [("succeeded", None)] == ended(recorder)
