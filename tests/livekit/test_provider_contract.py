# SPDX-License-Identifier: Apache-2.0
"""The behaviour that several providers share, each with its real plugin and its own simulator.

The tables of faults and the facts about one plugin are in the test file of that provider.
"""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from livekit.agents import Agent, function_tool, llm
from support.conversation import codes, ended, now
from support.providers import OPENAI_COMPATIBLE, PROVIDERS, SHARED_ENGINE

from traced_retry import semconv
from traced_retry.livekit.aws import AWSAdapter
from traced_retry.livekit.google import GoogleAdapter
from traced_retry.livekit.registry import adapter_class


def providers(names):
    """Run the test with each of these providers."""
    return pytest.mark.parametrize("provider", names, indirect=True)


def scripts(by_provider):
    """Run the test with each script of each provider."""
    cases = [(name, script) for name, scripts in by_provider.items() for script in scripts]
    return pytest.mark.parametrize(("provider", "script"), cases, indirect=["provider"])


@providers(PROVIDERS)
class TestAdapter:
    async def test_registry_finds_adapter_of_session(self, provider, start_conversation):
        """The registry finds the adapter by the module of the session's class."""
        talk = await start_conversation("ok", bare=True)

        assert provider.adapter is adapter_class(talk.realtime)

    async def test_no_required_attribute_is_missing(self, provider, start_conversation):
        """A plugin version that moves a private attribute fails here with the attribute's name."""
        talk = await start_conversation("ok", bare=True)

        assert [] == provider.adapter(talk.realtime, None).missing_attributes()

    async def test_spans_and_metrics_name_provider(self, provider, start_conversation, recorder):
        """The reply, its attempt and the counts carry the provider's name."""
        talk = await start_conversation("ok")
        await talk.reply(instructions="SECRET")

        assert [provider.name] == [reply[semconv.PROVIDER] for reply in recorder.replies]
        assert [provider.name] == [attempt[semconv.PROVIDER] for attempt in recorder.attempts]
        assert {provider.name: 1} == recorder.counted(semconv.METRIC_REPLIES, semconv.PROVIDER)


@providers(PROVIDERS)
class TestSessionEnds:
    async def test_closing_realtime_session_fails_pending_attempt(
        self, start_conversation, recorder
    ):
        """An attempt in progress ends with its session."""
        talk = await start_conversation("silence")
        reply = await talk.ask_plugin(instructions="SECRET")
        await asyncio.sleep(1)
        await talk.realtime.aclose()

        with pytest.raises(llm.RealtimeError):
            await reply
        assert [("not_recoverable", "session_closed")] == ended(recorder)
        assert 0 == recorder.open_spans

    async def test_closing_agent_session_leaves_nothing_open(self, start_conversation, recorder):
        """A pending reply leaves no task, span or late speech if the agent's session closes."""
        talk = await start_conversation("silence")
        await talk.ask_agent(instructions="SECRET")
        await talk.session.aclose()
        await asyncio.sleep(0)
        ours = [t for t in asyncio.all_tasks() if "Reply.run" in repr(t.get_coro())]
        await talk.settle()

        assert [] == ours
        assert [] == talk.heard
        assert 1 == len(ended(recorder))
        assert 0 == recorder.open_spans


class TestTools:
    @providers(OPENAI_COMPATIBLE)
    async def test_tool_call_and_answer_are_retried(self, start_conversation, recorder):
        """A tool call is a reply, and its result requests another one. Both are retried."""
        agent, called = with_tool()
        script = "rate_limit,tool:look_up,error:server_error,ok"
        talk = await start_conversation(script, agent=agent)
        await talk.session.run(user_input="SECRET question")

        assert [True] == called
        assert ["reply 4"] == talk.heard
        assert [("recovered", None)] * 2 == ended(recorder)

    @providers(["google", "ultravox", "phonic", "gpt-live"])
    async def test_tool_result_is_answered_without_request(self, start_conversation, recorder):
        """The server answers the result by itself, so this reply is counted as the server's."""
        agent, called = with_tool()
        talk = await start_conversation("tool:look_up,ok", agent=agent)
        await talk.reply(instructions="SECRET")
        await talk.settle()

        assert [True] == called
        assert ["reply 2"] == talk.heard
        assert [("succeeded", None)] == ended(recorder)
        assert [("succeeded", None)] == ended(recorder, "provider")
        assert 0 == recorder.open_spans


def with_tool():
    """Return an agent with one tool, and the list of the tool's calls."""
    called = []

    class Helper(Agent):
        @function_tool
        async def look_up(self) -> str:
            """Look it up."""
            called.append(True)
            return "found"

    return Helper(instructions="SECRET"), called


WITH_IDS_LEAKS = ["error:server_error", "unauthorized", "malformed", "quota", "silence"]
SLOT_LEAKS = ["ok", "late:25", "drop_before", "rate_limit", "quota", "unauthorized"]


class TestPrivacy:
    @scripts(
        {
            **dict.fromkeys(OPENAI_COMPATIBLE, WITH_IDS_LEAKS),
            "google": ["silence", "rate_limit", "quota", "error:1007", "ok"],
            "ultravox": SLOT_LEAKS,
            "phonic": [*SLOT_LEAKS, "error:internal_error"],
            "aws": ["rate_limit", "unauthorized", "silence", "drop_before"],
            "gpt-live": [*SLOT_LEAKS, "error:server_error", "malformed"],
        }
    )
    async def test_no_content_and_no_key_in_telemetry(
        self, provider, script, start_conversation, recorder, caplog
    ):
        """Spans, metrics, our log and errors hold no instructions, key or text of the server.

        Phonic's own logger writes the key, which we cannot prevent.
        """
        # AWS's plugin cannot be closed while it restarts, so it gets one request. User input would
        # be another one.
        twice = provider.adapter is not AWSAdapter
        script = f"{script},{script}" if twice else script
        talk = await start_conversation(script, ready="unauthorized" not in script)
        user_input = {"user_input": "SECRET"} if twice else {}
        error = await talk.reply(instructions="SECRET instructions", **user_input)
        if twice:
            with contextlib.suppress(llm.RealtimeError):
                await talk.realtime.generate_reply(instructions="SECRET instructions")
            await talk.settle()

        # Google's plugin puts the server's text into its own error events, with and without us.
        events = [] if provider.adapter is GoogleAdapter else talk.errors
        reported = [
            repr([s.to_json() for s in recorder.spans() if s.name.startswith("generate_reply")]),
            repr([recorder.points(m) for m in recorder.metric_names()]),
            repr([vars(r) for r in caplog.records if r.name == semconv.SCOPE]),
            repr(error),
            *[f"{e.error.error} {e.error.error!r}" for e in events],
            *[f"{e.error and e.error.error}" for e in talk.closed if events],
        ]
        assert 1 <= len(recorder.replies)
        assert not [text for text in reported if "SECRET" in text or "billing" in text]


@providers(OPENAI_COMPATIBLE)
class TestInterruption:
    @pytest.mark.parametrize(
        ("script", "cancels"), [("late:5,ok", 1), ("rate_limit:10,ok", 0)], ids=["attempt", "wait"]
    )
    async def test_interruption_before_reply_ends_it(
        self, script, cancels, start_conversation, recorder
    ):
        """An interruption ends an attempt or a wait, and its late response is not heard.

        The late response is cancelled by its id. OpenAI's plugin also cancels without one.
        """
        talk = await start_conversation(script)
        handle = await talk.ask_agent()
        await asyncio.sleep(1)
        handle.interrupt()
        await handle
        await talk.settle()

        assert [("interrupted", "interrupted")] == ended(recorder)
        assert [] == talk.heard
        assert 1 == len(talk.server.requests)
        assert cancels == len([id_ for id_ in talk.server.cancels if id_ is not None])

    async def test_cancel_at_creation_of_response_cancels_response(
        self, start_conversation, recorder
    ):
        """A reply that is cancelled in the moment of ``response.created`` is not spoken."""
        talk = await start_conversation("slow:5")
        talk.realtime.on("generation_created", lambda _: reply.cancel())
        reply = talk.realtime.generate_reply()

        with pytest.raises(asyncio.CancelledError):
            await reply
        await talk.settle()

        assert [("interrupted", "interrupted")] == ended(recorder)
        assert 1 == len(talk.server.cancels)
        assert [] == talk.server.completed

    async def test_interruption_while_speaking_counts_as_success(
        self, start_conversation, recorder
    ):
        """A reply that the caller interrupts after its first word has succeeded."""
        talk = await start_conversation("slow:5")
        handle = await talk.ask_agent()
        await asyncio.sleep(1)
        handle.interrupt()
        await handle
        await talk.settle()

        assert [("succeeded", None)] == ended(recorder)
        assert 0 == recorder.open_spans


@providers(OPENAI_COMPATIBLE)
class TestExactlyOnce:
    async def test_late_response_after_retry_is_cancelled_by_id(self, start_conversation):
        """The response to the first request comes after the retry was heard, and is not heard."""
        talk = await start_conversation("late:12,ok")
        await talk.reply()
        await talk.settle()

        assert ["reply 2"] == talk.heard
        (cancelled,) = talk.server.cancels
        assert cancelled is not None

    async def test_late_responses_after_failure_are_cancelled_by_id(self, start_conversation):
        """After the agent has the failure, no response is announced or heard."""
        talk = await start_conversation("late:25")

        assert isinstance(await talk.reply(), llm.RealtimeError)
        await talk.settle()

        assert [] == talk.heard
        assert [] == talk.generations
        assert len(talk.server.requests) == len(talk.server.cancels)
        assert None not in talk.server.cancels

    async def test_attempt_timeout_cancels_only_by_id(self, start_conversation, recorder):
        """Our own timeout sends no ``response.cancel`` without an id: that stops any response."""
        talk = await start_conversation("late:4,ok", attempt_timeout=2.0)

        assert None is await talk.reply()
        await talk.settle()

        assert ["reply 2"] == talk.heard
        assert ["timeout", None] == codes(recorder)
        assert [True] == [cancelled is not None for cancelled in talk.server.cancels]


@providers(["openai", "voicelive"])
async def test_response_that_lost_its_id_is_heard_once(start_conversation, recorder):
    """The server echoes ids otherwise. The plugin alone speaks the reply and reports a failure."""
    talk = await start_conversation("ok,unlabelled,ok")
    await talk.reply()

    assert isinstance(await talk.reply(), llm.RealtimeError)
    await talk.settle()

    assert ["reply 1", "reply 2"] == talk.heard
    assert [("succeeded", None), ("exhausted", "unsafe_to_resend")] == ended(recorder)


@providers(OPENAI_COMPATIBLE)
class TestClosedWait:
    async def test_closing_realtime_session_fails_waiting_reply(self, start_conversation, recorder):
        """A reply that waits for its next attempt ends with its session."""
        talk = await start_conversation("rate_limit:10")
        reply = await talk.ask_plugin()
        await asyncio.sleep(1)
        await talk.realtime.aclose()

        with pytest.raises(llm.RealtimeError):
            await reply
        assert [("not_recoverable", "session_closed")] == ended(recorder)
        assert 0 == recorder.open_spans

    async def test_closing_agent_session_ends_waiting_reply(self, start_conversation, recorder):
        """A reply that waits for its next attempt leaves nothing open if the agent closes."""
        talk = await start_conversation("rate_limit:10")
        await talk.ask_agent()
        await talk.session.aclose()
        await talk.settle()

        assert 1 == len(ended(recorder))
        assert [] == talk.heard
        assert 0 == recorder.open_spans

    async def test_request_after_close_fails_at_once(self, start_conversation, recorder):
        """A closed session fails at once. OpenAI's plugin alone waits for 10 s."""
        talk = await start_conversation("ok")
        await talk.realtime.aclose()
        began = now()

        with pytest.raises(llm.RealtimeError):
            await talk.realtime.generate_reply()

        assert began == now()
        assert [("not_recoverable", "session_closed")] == ended(recorder)
        assert ["session_closed"] == codes(recorder)


@providers(["openai", *SHARED_ENGINE])
async def test_plugin_alone_loses_late_reply(start_conversation):
    """Without traced-retry the agent gets an error after 10 s, and the late reply is not heard."""
    talk = await start_conversation("late:12,ok", bare=True)

    error = await talk.reply()
    await talk.settle()

    assert isinstance(error, llm.RealtimeError)
    assert [] == talk.heard


FATAL = {
    "openai": ["quota", "malformed", "unauthorized"],
    "xai": ["quota"],
    "voicelive": ["quota"],
    "google": ["quota", "unauthorized"],
    "ultravox": ["quota", "drop_before"],
    "phonic": ["unauthorized", "drop_before"],
    "aws": ["unauthorized"],
    "gpt-live": ["quota", "malformed"],
}


@scripts(FATAL)
async def test_attempt_that_ends_with_its_session_is_not_recoverable(
    script, start_conversation, recorder
):
    """Alerts filter by ``recoverable``, so a lost session must not look like a passing fault."""
    talk = await start_conversation(script)
    await talk.reply(instructions="SECRET")
    await talk.settle()

    assert [("not_recoverable", "not_recoverable")] == ended(recorder)
    last = recorder.attempts[-1]
    assert (False, "stop") == (last[semconv.RECOVERABLE], last[semconv.DECISION])
    counted = recorder.counted(semconv.METRIC_ATTEMPTS, semconv.RECOVERABLE)
    assert 1 == counted[False]
