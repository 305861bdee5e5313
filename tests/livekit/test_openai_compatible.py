# SPDX-License-Identifier: Apache-2.0
"""Those who share OpenAI's engine, each with its real plugin: xAI, Azure OpenAI, inference."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import pytest
from support.conversation import codes, ended
from support.providers import PROVIDERS, SHARED_ENGINE

from traced_retry.simulator.openai_compatible import XAISimulator


@pytest.fixture(params=SHARED_ENGINE)
def provider(request):
    """Return each provider that shares the engine of OpenAI's plugin."""
    return PROVIDERS[request.param]


class Row(NamedTuple):
    """The expected result of one reply."""

    heard: list[str]
    """The texts that the agent says."""
    outcome: str
    stop_reason: str | None
    failed: list[str | None]
    """The code of each attempt."""
    code: str | None
    """The code of the error that the agent gets."""
    seconds: tuple[float, float]
    """The shortest and the longest time."""


ROWS = {
    # script: texts heard, outcome, stop reason, codes of the attempts, the code the agent gets,
    # seconds at least and at most
    "ok": Row(["reply 1"], "succeeded", None, [None], None, (0, 0.1)),
    "late:7": Row(["reply 1"], "recovered", None, ["timeout", None], None, (7, 7.1)),
    "late:12,ok": Row(["reply 2"], "recovered", None, ["timeout", None], None, (2.5, 2.6)),
    "silence,ok": Row(["reply 2"], "recovered", None, ["timeout", None], None, (2.5, 2.6)),
    "late:25": Row([], "exhausted", "deadline", ["timeout"] * 4, None, (20, 20)),
    "rate_limit,ok": Row(
        ["reply 2"], "recovered", None, ["rate_limit_exceeded", None], None, (0, 1)
    ),
    "error:server_error,ok": Row(
        ["reply 2"], "recovered", None, ["server_error", None], None, (0, 1)
    ),
    "uncorrelated,ok": Row(["reply 2"], "recovered", None, ["server_error", None], None, (0, 1)),
    "drop_before,ok": Row(
        ["reply 2"], "recovered", None, ["connection_lost", None], None, (0.1, 1.2)
    ),
    "error:invalid_value": Row(
        [],
        "not_recoverable",
        "not_recoverable",
        ["invalid_value"],
        "invalid_value",
        (0, 0.1),
    ),
    "quota": Row(
        [],
        "not_recoverable",
        "not_recoverable",
        ["insufficient_quota"],
        "insufficient_quota",
        (0, 0.1),
    ),
    "unauthorized": Row(
        [],
        "not_recoverable",
        "not_recoverable",
        ["authentication"],
        None,
        (1.1, 4.2),
    ),
    "failed": Row([], "exhausted", "max_attempts", ["server_error"] * 4, "server_error", (0, 7.1)),
    "drop_during": Row(
        ["reply"],
        "not_recoverable",
        "output_started",
        ["connection_lost"],
        None,
        (0, 0.2),
    ),
}
ONE_AT_A_TIME = {
    # The same for xAI, whose server may run two responses at once.
    "late:7": Row(["reply 1"], "succeeded", None, [None], None, (7, 7.1)),
    "late:12,ok": Row(["reply 2"], "recovered", None, ["timeout", None], None, (10, 10.2)),
    "silence,ok": Row(["reply 2"], "recovered", None, ["timeout", None], None, (10, 10.2)),
    "late:25": Row([], "exhausted", "deadline", ["timeout"] * 2, None, (20, 20)),
}


class TestEachFault:
    @pytest.mark.parametrize("script", ROWS)
    async def test_each_fault_has_expected_result(
        self, script, start_conversation, provider, recorder
    ):
        """Each fault has the same result as with OpenAI, under the provider's own name."""
        row = ROWS[script]
        if provider.simulator is XAISimulator:
            row = ONE_AT_A_TIME.get(script, row)
        talk = await start_conversation(script)
        began = asyncio.get_running_loop().time()

        error = await talk.reply(instructions="SECRET")
        took = asyncio.get_running_loop().time() - began
        await talk.settle(30)

        assert row.heard == talk.heard
        assert [(row.outcome, row.stop_reason)] == ended(recorder)
        assert row.failed == codes(recorder)
        assert row.code == getattr(error, "code", None)
        assert row.seconds[0] <= took <= row.seconds[1]
        assert {provider.name} == {a["gen_ai.provider.name"] for a in recorder.attempts}
        assert {"send", "hedge"} >= {a["traced_retry.action"] for a in recorder.attempts}
        assert None not in talk.server.cancels
        assert 0 == recorder.open_spans


class TestContract:
    async def test_raw_events_have_current_names(self, start_conversation):
        """The engine translates the beta's names before it emits an event."""
        talk = await start_conversation("ok", bare=True)
        seen = set()
        talk.realtime.on("openai_server_event_received", lambda e: seen.add(e["type"]))
        await talk.reply()

        assert {"response.created", "response.output_text.delta", "response.done"} <= seen


@pytest.mark.parametrize("provider", ["xai"], indirect=True)
class TestSay:
    """xAI speaks scripted text by itself: no request, and no id in its response."""

    async def test_say_before_retried_reply_is_heard_once(self, start_conversation, recorder):
        """The text is heard once, is no reply of ours, and leaves the next reply unchanged."""
        talk = await start_conversation("rate_limit,ok")

        await talk.session.say("good morning")
        await talk.reply()
        await talk.settle()

        assert ["good morning", "reply 2"] == talk.heard
        assert [("recovered", None)] == ended(recorder)

    async def test_say_during_pending_reply_has_own_future(self, start_conversation, recorder):
        """The text has its own slot among the plugin's futures, and the reply keeps its slot."""
        talk = await start_conversation("late:3,ok")
        reply = talk.realtime.generate_reply()
        await talk.received()
        said = await talk.realtime.say("one moment")
        answered = await reply
        await talk.settle()

        assert said.response_id != answered.response_id
        assert ["one moment", "reply 1"] == talk.server.completed
        assert [("succeeded", None)] == ended(recorder)
