# SPDX-License-Identifier: Apache-2.0
"""Those who share OpenAI's engine, each with its real plugin: xAI, Azure OpenAI, inference."""

from __future__ import annotations

import asyncio

import pytest
from livekit.agents import llm
from support.conversation import codes, ended
from support.providers import PROVIDERS, SHARED_ENGINE

from traced_retry.livekit.openai import OpenAIAdapter
from traced_retry.livekit.registry import adapter_class


@pytest.fixture(params=SHARED_ENGINE)
def provider(request):
    """Return each provider that shares the engine of OpenAI's plugin."""
    return PROVIDERS[request.param]


ROWS = {
    # script: texts heard, outcome, stop reason, codes of the attempts, the code the agent gets,
    # seconds at least and at most
    "ok": (["reply 1"], "succeeded", None, [None], None, (0, 0.1)),
    "late:7": (["reply 1"], "succeeded", None, [None], None, (7, 7.1)),
    "late:12,ok": (["reply 2"], "recovered", None, ["timeout", None], None, (10, 11.1)),
    "silence,ok": (["reply 2"], "recovered", None, ["timeout", None], None, (10, 11.1)),
    "late:25": ([], "exhausted", "deadline", ["timeout"] * 2, None, (20, 20)),
    "rate_limit,ok": (["reply 2"], "recovered", None, ["rate_limit_exceeded", None], None, (0, 1)),
    "error:server_error,ok": (["reply 2"], "recovered", None, ["server_error", None], None, (0, 1)),
    "uncorrelated,ok": (["reply 2"], "recovered", None, ["server_error", None], None, (0, 1)),
    "drop_before,ok": (["reply 2"], "recovered", None, ["connection_lost", None], None, (0.1, 1.2)),
    "error:invalid_value": (
        [],
        "not_recoverable",
        "not_recoverable",
        ["invalid_value"],
        "invalid_value",
        (0, 0.1),
    ),
    "quota": (
        [],
        "not_recoverable",
        "not_recoverable",
        ["insufficient_quota"],
        "insufficient_quota",
        (0, 0.1),
    ),
    "unauthorized": (
        [],
        "not_recoverable",
        "not_recoverable",
        ["authentication"],
        None,
        (1.1, 4.2),
    ),
    "failed": ([], "exhausted", "max_attempts", ["server_error"] * 4, "server_error", (0, 7.1)),
    "drop_during": (
        ["reply"],
        "not_recoverable",
        "output_started",
        ["connection_lost"],
        None,
        (0, 0.2),
    ),
}


class TestEachFault:
    @pytest.mark.parametrize("script", ROWS)
    async def test_row(self, script, start_conversation, provider, recorder):
        """They keep the promise as OpenAI does, under their own name."""
        heard, outcome, stop_reason, failed, code, (least, most) = ROWS[script]
        talk = await start_conversation(script)
        began = asyncio.get_running_loop().time()

        error = await talk.reply(instructions="SECRET")
        took = asyncio.get_running_loop().time() - began
        await talk.settle(30)

        assert heard == talk.heard
        assert [(outcome, stop_reason)] == ended(recorder)
        assert failed == codes(recorder)
        assert code == getattr(error, "code", None)
        assert least <= took <= most
        assert {provider.name} == {a["gen_ai.provider.name"] for a in recorder.attempts}
        assert {"send"} == {a["traced_retry.action"] for a in recorder.attempts}
        assert None not in talk.server.cancels
        assert 0 == recorder.open_spans

    @pytest.mark.parametrize("script", ["late:5,ok", "rate_limit:10,ok"])
    async def test_barge_in(self, script, start_conversation, recorder):
        """In an attempt or in a wait: over at once, and never heard."""
        talk = await start_conversation(script)
        handle = talk.ask()
        await talk.received()
        await asyncio.sleep(1)
        handle.interrupt()
        await handle
        await talk.settle()

        assert [("interrupted", "interrupted")] == ended(recorder)
        assert [] == talk.heard
        assert 1 == len(talk.server.requests)

    async def test_barge_in_as_the_reply_comes(self, start_conversation, recorder):
        """In the very moment the response was created: it is cancelled, and not spoken."""
        talk = await start_conversation("slow:5")
        talk.realtime.on("generation_created", lambda _: reply.cancel())
        reply = talk.realtime.generate_reply()

        with pytest.raises(asyncio.CancelledError):
            await reply
        await talk.settle()

        assert [("interrupted", "interrupted")] == ended(recorder)
        assert 1 == len(talk.server.cancels)
        assert [] == talk.server.completed

    async def test_session_closed(self, start_conversation, recorder):
        """A pending reply ends with its session."""
        talk = await start_conversation("silence")
        reply = talk.realtime.generate_reply()
        await talk.received()
        await talk.realtime.aclose()

        with pytest.raises(llm.RealtimeError):
            await reply
        assert [("not_recoverable", "session_closed")] == ended(recorder)
        assert 0 == recorder.open_spans

    async def test_the_plugin_alone(self, start_conversation):
        """Without us a late reply is lost."""
        talk = await start_conversation("late:12,ok", bare=True)

        error = await talk.reply()
        await talk.settle()

        assert isinstance(error, llm.RealtimeError)
        assert [] == talk.heard


class TestContract:
    async def test_private_attributes(self, start_conversation):
        """Found by the registry as OpenAI's; what the adapter needs is there."""
        talk = await start_conversation("ok", bare=True)

        assert OpenAIAdapter is adapter_class(talk.realtime)
        assert [] == OpenAIAdapter(talk.realtime, None).missing()

    async def test_raw_events_have_present_names(self, start_conversation):
        """The engine translates the beta's names before it shows an event."""
        talk = await start_conversation("ok", bare=True)
        seen = set()
        talk.realtime.on("openai_server_event_received", lambda e: seen.add(e["type"]))
        await talk.reply()

        assert {"response.created", "response.output_text.delta", "response.done"} <= seen


@pytest.mark.parametrize("provider", ["xai"], indirect=True)
class TestSay:
    """xAI speaks scripted text by itself: no request, and no id in its response."""

    async def test_beside_retries(self, start_conversation, recorder):
        """What is said is heard once, is no reply of ours, and leaves the next one alone."""
        talk = await start_conversation("rate_limit,ok")

        await talk.session.say("good morning")
        await talk.reply()
        await talk.settle()

        assert ["good morning", "reply 2"] == talk.heard
        assert [("recovered", None)] == ended(recorder)

    async def test_while_a_reply_is_awaited(self, start_conversation, recorder):
        """It has a slot of its own among the plugin's futures; the reply keeps its."""
        talk = await start_conversation("late:3,ok")
        reply = talk.realtime.generate_reply()
        await talk.received()
        said = await talk.realtime.say("one moment")
        answered = await reply
        await talk.settle()

        assert said.response_id != answered.response_id
        assert ["one moment", "reply 1"] == talk.server.completed
        assert [("succeeded", None)] == ended(recorder)
