# SPDX-License-Identifier: Apache-2.0
"""A response that fails after it began: the next one goes on in the same streams, or it is told."""

from __future__ import annotations

import pytest
from livekit.agents import llm
from support.conversation import codes, ended

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

TOLD = {
    # script: heard, requests, outcome, stop reason, the code the agent gets
    "failed_later": ([], 4, "exhausted", "max_attempts", "server_error"),
    "failed_message": ([], 4, "exhausted", "max_attempts", "server_error"),
    "failed_later:insufficient_quota,ok": (
        [],
        1,
        "not_recoverable",
        "not_recoverable",
        "insufficient_quota",
    ),
    "failed_later,error:invalid_value,ok": (
        [],
        2,
        "not_recoverable",
        "not_recoverable",
        "invalid_value",
    ),
    "incomplete,ok": ([], 1, "not_recoverable", "not_recoverable", "content_filter"),
    "failed_during,ok": (["reply"], 1, "not_recoverable", "output_started", "server_error"),
    "failed_later,failed_during": (
        ["reply"],
        2,
        "not_recoverable",
        "output_started",
        "server_error",
    ),
    "drop_during,ok": (["reply"], 1, "not_recoverable", "output_started", None),
    "stalled": ([], 1, "exhausted", "deadline", None),
}


def _note(items, event):
    """Keep the ids of the server's conversation."""
    if event["type"] == "conversation.item.added":
        items.add(event["item"]["id"])
    elif event["type"] == "conversation.item.deleted":
        items.discard(event["item_id"])


class TestBeforeTheFirstWord:
    @pytest.mark.parametrize("script", RECOVERS)
    async def test_it_recovers(self, script, converse, recorder):
        """The agent sees one generation and one event, and hears one reply, whole."""
        talk = await converse(script, deadline=60.0)
        events = []
        talk.realtime.on("generation_created", events.append)

        assert None is await talk.reply(instructions="SECRET")
        await talk.settle()

        number = len(talk.server.requests)
        assert [f"reply {number}"] == talk.heard
        assert [("recovered", None)] == ended(recorder)
        assert [*RECOVERS[script], None] == codes(recorder)
        assert 1 == len([event for event in events if event.user_initiated])
        assert 0 == recorder.open_spans

    async def test_the_history_knows_what_was_heard(self, converse):
        """Under the id of the server's item: else the next turn would delete it there."""
        talk = await converse("failed_message,ok,ok")
        items = set()
        talk.realtime.on("openai_server_event_received", lambda event: _note(items, event))
        await talk.reply()
        await talk.reply(user_input="and?")

        said = [i for i in talk.session.history.items if getattr(i, "role", "") == "assistant"]
        assert ["reply 2", "reply 3"] == [item.text_content for item in said]
        assert {item.id for item in said} <= items

    @pytest.mark.parametrize("script", TOLD)
    async def test_it_is_told(self, script, converse, recorder):
        """By span and metric, and by the handle's exception(), with the provider's code."""
        heard, requests, outcome, stop, code = TOLD[script]
        talk = await converse(script)

        error = await talk.reply(instructions="SECRET")
        await talk.settle()

        assert [(outcome, stop)] == ended(recorder)
        assert heard == talk.heard
        assert requests == len(talk.server.requests)
        assert isinstance(error, llm.RealtimeError)
        assert code == error.code
        assert 0 == recorder.open_spans
