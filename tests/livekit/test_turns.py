# SPDX-License-Identifier: Apache-2.0
"""Replies that the provider starts, because the caller spoke: traced, recovered and reported."""

from __future__ import annotations

import asyncio

import pytest
from support.conversation import actions, codes, ended

from traced_retry import semconv


async def speak(talk, seconds=30.0, **caller):
    """Have the caller speak once, and let time pass."""
    await talk.server.wait_for("connected")
    await asyncio.sleep(1.0)  # The plugin configures its session.
    await talk.server.caller_speaks(**caller)
    await talk.settle(seconds)


class TestOpenAI:
    async def test_answer_to_caller_is_counted(self, start_conversation, recorder):
        """The server's own reply has one span with one attempt, which listened."""
        talk = await start_conversation("turn:ok")
        await speak(talk)

        assert ["answer 1"] == talk.heard
        assert [("succeeded", None)] == ended(recorder)
        assert ["listen"] == actions(recorder)
        assert ["provider"] == [r[semconv.INITIATOR] for r in recorder.replies]

    @pytest.mark.parametrize(
        "fault",
        ["failed", "failed_later", "failed_message", "rate_limit", "drop_before", "stalled"],
    )
    async def test_failed_answer_is_requested_again(self, fault, start_conversation, recorder):
        """The caller hears the reply once, in the streams that the agent already has."""
        talk = await start_conversation(f"ok,turn:{fault}")
        await speak(talk)

        assert ["reply 1"] == talk.heard
        assert [("recovered", None)] == ended(recorder)
        assert ["listen", "send"] == actions(recorder)
