# SPDX-License-Identifier: Apache-2.0
"""A response that fails after it began: the next one goes on in the same streams, or it is told."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import aiohttp
import pytest
from livekit.agents import Agent, function_tool, llm
from support.conversation import codes, ended, now
from support.providers import OPENAI_COMPATIBLE, PROVIDERS, VOICELIVE

from traced_retry import semconv


@pytest.fixture(params=OPENAI_COMPATIBLE)
def provider(request):
    """Return each provider whose replies carry the id of their request."""
    return PROVIDERS[request.param]


RECOVERS = {
    # script: the failed attempts' codes. Then it is heard: one generation, one reply.
    "failed,ok": ["server_error"],
    "failed_later,ok": ["server_error"],
    "failed_later:rate_limit_exceeded,ok": ["rate_limit_exceeded"],
    "failed_message,ok": ["server_error"],
    "failed_later,failed_message,failed_later,ok": ["server_error"] * 3,
    "failed_message,failed_later,failed_message,ok": ["server_error"] * 3,
    "failed_message,error:server_error,silence,ok": ["server_error", "server_error", "timeout"],
    "failed_later,drop_before,ok": ["server_error", "connection_lost"],
    "failed_later,slow:1": ["server_error"],
}


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


TOLD = {
    # script: heard, requests, outcome, stop reason, the code the agent gets
    "failed_later": Row([], 4, "exhausted", "max_attempts", "server_error"),
    "failed_message": Row([], 4, "exhausted", "max_attempts", "server_error"),
    "failed_later:insufficient_quota,ok": Row(
        [],
        1,
        "not_recoverable",
        "not_recoverable",
        "insufficient_quota",
    ),
    "failed_later,error:invalid_value,ok": Row(
        [],
        2,
        "not_recoverable",
        "not_recoverable",
        "invalid_value",
    ),
    "incomplete,ok": Row([], 1, "not_recoverable", "not_recoverable", "content_filter"),
    "failed_during,ok": Row(["reply"], 1, "not_recoverable", "output_started", "server_error"),
    "failed_later,failed_during": Row(
        ["reply"],
        2,
        "not_recoverable",
        "output_started",
        "server_error",
    ),
    "drop_during,ok": Row(["reply"], 1, "not_recoverable", "output_started", None),
    "stalled": Row([], 2, "exhausted", "deadline", None),
}


QUEUED = {
    # script: what is heard of two replies asked at once, and what became of each
    "failed_later,ok": (["reply 2", "reply 3"], ("recovered", None)),
    "failed_message,ok": (["reply 2", "reply 3"], ("recovered", None)),
    "failed_during,ok": (["reply", "reply 2"], ("not_recoverable", "output_started")),
    "failed_later:invalid_value,ok": (["reply 2"], ("not_recoverable", "not_recoverable")),
    "incomplete,ok": (["reply 2"], ("not_recoverable", "not_recoverable")),
    "stalled,ok": (["reply 2", "reply 3"], ("recovered", None)),
}


def helper(called):
    """An agent with one tool, which notes that it was called."""

    class Helper(Agent):
        @function_tool
        async def look_up(self) -> str:
            """Look it up."""
            called.append(True)
            return "found"

    return Helper(instructions="SECRET")


class TestBeforeTheFirstWord:
    @pytest.mark.parametrize("script", RECOVERS)
    async def test_failure_before_output_is_recovered_in_same_streams(
        self, script, provider, start_conversation, recorder
    ):
        """The agent gets one generation and one event, and hears one whole reply."""
        talk = await start_conversation(script, deadline=60.0)
        events = []
        talk.realtime.on("generation_created", events.append)

        assert None is await talk.reply(instructions="SECRET")
        await talk.settle()

        failed = RECOVERS[script]
        if provider is VOICELIVE:  # its plugin sends a dropped request again by itself
            failed = [code for code in failed if code != "connection_lost"]
        number = len(talk.server.requests)
        assert [f"reply {number}"] == talk.heard
        assert [("recovered", None)] == ended(recorder)
        assert [*failed, None] == codes(recorder)
        assert {provider.name} == {a[semconv.PROVIDER] for a in recorder.attempts}
        assert 1 == len([event for event in events if event.user_initiated])
        assert 0 == recorder.open_spans

    async def test_history_has_item_id_of_heard_reply(self, start_conversation):
        """The history has the id of the server's item, or the next turn would delete it there."""
        talk = await start_conversation("failed_message,ok,ok")
        spoken = []
        talk.server._on_event = lambda direction, event: spoken.extend(
            item["id"]
            for item in event.get("response", {}).get("output", ())
            if item["status"] == "completed"
        )
        await talk.reply()
        await talk.reply(user_input="and?")

        (connection,) = talk.server._open
        said = [i for i in talk.session.history.items if getattr(i, "role", "") == "assistant"]
        assert ["reply 2", "reply 3"] == [item.text_content for item in said]
        assert spoken == [item.id for item in said]
        assert set(spoken) <= set(connection.items)

    @pytest.mark.parametrize("script", TOLD)
    async def test_final_failure_is_reported_with_code(self, script, start_conversation, recorder):
        """Span, metric and the handle's exception() report the provider's code."""
        row = TOLD[script]
        talk = await start_conversation(script)

        error = await talk.reply(instructions="SECRET")
        await talk.settle()

        assert [(row.outcome, row.stop_reason)] == ended(recorder)
        assert row.heard == talk.heard
        assert row.requests == len(talk.server.requests)
        assert isinstance(error, llm.RealtimeError)
        assert row.code == error.code
        assert 0 == recorder.open_spans

    async def test_tool_call_of_next_attempt_reaches_agent(self, start_conversation, recorder):
        """The stream of function calls continues as the messages do."""
        called = []
        talk = await start_conversation("failed_later,tool:look_up,ok", agent=helper(called))

        assert None is await talk.reply(instructions="SECRET")
        await talk.settle()

        assert [True] == called
        assert ["reply 3"] == talk.heard
        assert [("recovered", None), ("succeeded", None)] == ended(recorder)


class TestAfterATool:
    async def test_failure_after_tool_call_is_not_retried(self, start_conversation, recorder):
        """A tool may not run twice. LiveKit requests the reply to its result separately."""
        called = []
        talk = await start_conversation("failed_tool:look_up,ok", agent=helper(called))

        error = await talk.reply(instructions="SECRET")
        await talk.settle()

        assert [True] == called
        assert ["reply 2"] == talk.heard
        assert 2 == len(talk.server.requests)
        assert [("not_recoverable", "output_started"), ("succeeded", None)] == ended(recorder)
        assert "server_error" == error.code
        assert 0 == recorder.open_spans


class TestTheNextReply:
    @pytest.mark.parametrize("script", QUEUED)
    async def test_reply_behind_failing_one_is_heard_in_turn(
        self, script, start_conversation, recorder
    ):
        """The second reply waits, is requested once, and is heard in its turn."""
        heard, (outcome, stop) = QUEUED[script]
        talk = await start_conversation(script)

        first, second = talk.ask(instructions="SECRET"), talk.ask(instructions="SECRET")
        await asyncio.gather(first, second)
        await talk.settle()

        assert heard == talk.heard
        assert [(outcome, stop), ("succeeded", None)] == ended(recorder)
        assert (outcome == "recovered") == (first.exception() is None)
        assert second.exception() is None
        assert 0 == recorder.open_spans

    async def test_stalled_response_is_cancelled_by_id(self, start_conversation):
        """A stalled response would stay active at the server, which rejects later requests."""
        talk = await start_conversation("stalled,ok", first_word_timeout=None)

        assert isinstance(await talk.reply(), llm.RealtimeError)
        assert None is await talk.reply()

        assert ["reply 2"] == talk.heard
        assert 2 == len(talk.server.requests)
        assert [True] == [cancelled is not None for cancelled in talk.server.cancels]


class TestCutShort:
    @pytest.mark.parametrize("seconds", [59, 61, 7200])
    async def test_stall_of_60_s_after_output_fails_reply(
        self, seconds, provider, start_conversation, recorder
    ):
        """After 60 s without a sign the reply fails, and its response is cancelled by its id."""
        talk = await start_conversation(f"slow:{seconds},ok")
        began = now()
        handle = talk.ask(instructions="SECRET")
        await handle

        assert min(seconds, 60) == round(now() - began)
        if seconds < 60:
            assert [("succeeded", None)] == ended(recorder)
            assert None is handle.exception()
        else:
            assert [("not_recoverable", "output_started")] == ended(recorder)
            assert isinstance(handle.exception(), llm.RealtimeError)
            assert 1 == len(talk.server.cancels)
        assert 0 == recorder.open_spans
        assert None is await talk.reply()

    @pytest.mark.parametrize("provider", ["openai", "xai", "inference"], indirect=True)
    async def test_fatal_error_after_output_fails_reply(self, start_conversation, recorder):
        """A reply that is heard in part fails, as after a lost connection."""
        talk = await start_conversation("slow:3")
        handle = talk.ask(instructions="SECRET")
        await talk.received()
        await asyncio.sleep(1)
        (connection,) = talk.server._open
        fatal = "insufficient_quota"
        await connection.reject(None, fatal, "You exceeded your current quota.", fatal)
        await handle
        await talk.settle()

        assert ["reply"] == talk.heard
        assert ["not_recoverable"] == [outcome for outcome, _ in ended(recorder)]
        assert [fatal] == codes(recorder)


async def lose(server):
    """Have the server drop every connection."""
    for connection in list(server._open):
        await connection.hang_up(aiohttp.WSCloseCode.INTERNAL_ERROR, by_script=True)
    for client in list(getattr(server, "_clients", ())):  # of the AWS simulator
        client.abort()


@pytest.mark.parametrize("provider", ["ultravox", "phonic", "aws"], indirect=True)
class TestCutShortWithoutIds:
    """Nothing is asked again and no stream is touched; the failure is told."""

    async def test_loss_after_output_is_reported(self, start_conversation, recorder, caplog):
        """Span, metric, log, on_exhausted and the handle's exception() report the loss."""
        failed = []
        talk = await start_conversation("drop_during,ok", on_exhausted=failed.append)

        error = await talk.reply(instructions="SECRET")
        await talk.settle()

        assert isinstance(error, llm.RealtimeError)
        assert [("not_recoverable", "output_started")] == ended(recorder)
        assert ["connection_lost"] == codes(recorder)
        names = (semconv.OUTCOME, semconv.STOP_REASON)
        told = {("not_recoverable", "output_started"): 1}
        assert told == recorder.counted(semconv.METRIC_REPLIES, *names)
        assert ["output_started"] == [reply.stop_reason for reply in failed]
        ours = [r for r in caplog.records if r.name == semconv.SCOPE]
        assert ["WARNING"] == [r.levelname for r in ours]
        assert 1 == len(talk.server.requests)
        assert 0 == recorder.open_spans
        spans = [s.to_json() for s in recorder.spans() if s.name.startswith(semconv.SPAN_REPLY)]
        assert "SECRET" not in repr([spans, error, failed, [vars(r) for r in ours]])

    async def test_whole_reply_is_recorded_at_its_end(self, start_conversation, recorder):
        """The reply is recorded as it ends, and its time ends with the first words."""
        talk = await start_conversation("slow:3")
        handle = talk.ask(instructions="SECRET")
        await asyncio.sleep(2.9)
        assert [] == ended(recorder)
        await asyncio.sleep(0.2)

        assert [("succeeded", None)] == ended(recorder)
        assert 0 == recorder.open_spans
        (span,) = recorder.spans(semconv.SPAN_REPLY)
        assert span.end_time - span.start_time < 2e9
        await handle
        assert None is handle.exception()

    async def test_loss_after_end_of_reply_is_ignored(self, start_conversation, recorder):
        """A connection that is lost after the reply's end does not change it."""
        talk = await start_conversation("ok")
        error = await talk.reply(instructions="SECRET")
        await lose(talk.server)
        await talk.settle()

        assert None is error
        assert [("succeeded", None)] == ended(recorder)

    async def test_interruption_counts_reply_as_heard(self, start_conversation, recorder):
        """The reply ends at once and counts as heard."""
        talk = await start_conversation("slow:5")
        talk.ask(instructions="SECRET")
        await asyncio.sleep(1)
        talk.session.interrupt()
        await asyncio.sleep(0.05)
        over = ended(recorder)
        await lose(talk.server)
        await talk.settle()

        assert [("succeeded", None)] == over
        assert over == ended(recorder)
        assert 0 == recorder.open_spans

    async def test_session_close_counts_reply_as_heard(self, start_conversation, recorder):
        """A reply in progress counts as heard if the session is closed."""
        talk = await start_conversation("slow:5")
        talk.ask(instructions="SECRET")
        await asyncio.sleep(1)
        await talk.realtime.aclose()
        await talk.settle()

        assert [("succeeded", None)] == ended(recorder)
        assert 0 == recorder.open_spans

    async def test_reply_without_end_closes_span_after_60_s(self, start_conversation, recorder):
        """No span stays open for longer than 60 s, and the reply counts as heard."""
        talk = await start_conversation("slow:600")
        talk.ask(instructions="SECRET")
        await asyncio.sleep(59)
        assert [] == ended(recorder)
        await asyncio.sleep(2)

        assert [("succeeded", None)] == ended(recorder)
        assert 0 == recorder.open_spans
        await lose(talk.server)
        await talk.settle()
        assert 1 == len(ended(recorder))
