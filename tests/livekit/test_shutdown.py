# SPDX-License-Identifier: Apache-2.0
"""``AgentSession.shutdown(drain=True)`` while a reply is retried.

LiveKit waits for the pending replies, and kills the job's process if that takes 10 s.
"""

from __future__ import annotations

import asyncio
import inspect
import random

import pytest
from livekit.agents import AgentServer, AgentSession
from support.conversation import ended, now

from traced_retry.livekit.hook import DRAIN_WITHIN
from traced_retry.livekit.speech import agent_activity


@pytest.fixture(autouse=True)
def longest_waits(monkeypatch):
    """Each wait is as long as the jitter allows."""
    monkeypatch.setattr(random, "uniform", lambda _, most: most)


async def shut_down(talk, *, drain=True):
    """Shut the agent session down, and return the seconds until it is closed."""
    began, closed = now(), asyncio.Event()
    talk.session.on("close", lambda _: closed.set())
    talk.session.shutdown(drain=drain)
    await closed.wait()
    return now() - began


FAILING = ",".join(["error:server_error"] * 9)


class TestDrain:
    async def test_retries_end_before_livekit_kills_the_process(self, start_conversation, recorder):
        """A reply that would be retried for 20 s ends after 9 s, with the provider's error.

        With the plugin alone, the reply fails and the session closes at once. Without the limit,
        the session closes after 12 s.
        """
        talk = await start_conversation(FAILING, base_delay=4.0, deadline=20.0)
        reply = await talk.ask_agent()

        assert DRAIN_WITHIN <= await shut_down(talk) < 10
        assert "The server had an error" in str(reply.exception())
        assert [("exhausted", "deadline")] == ended(recorder)
        assert 0 == recorder.open_spans

    async def test_retry_in_time_is_heard(self, start_conversation, recorder):
        """A goodbye that fails once is heard before the session closes.

        The plugin alone loses this reply.
        """
        talk = await start_conversation("error:server_error,ok", base_delay=4.0)
        await talk.ask_agent()

        assert await shut_down(talk) < DRAIN_WITHIN
        assert ["reply 2"] == talk.heard
        assert [("recovered", None)] == ended(recorder)

    async def test_slow_first_answer_is_heard(self, start_conversation, recorder):
        """A first request is not given up earlier than without retries."""
        talk = await start_conversation("late:9.5")
        await talk.ask_agent()

        assert DRAIN_WITHIN < await shut_down(talk) < 10
        assert ["reply 1"] == talk.heard
        assert [("recovered", None)] == ended(recorder)

    async def test_hedged_answer_that_never_comes_is_not_waited_for(
        self, start_conversation, recorder
    ):
        """The failure is known before LiveKit ends the job's process."""
        talk = await start_conversation("silence")
        await talk.ask_agent()

        assert DRAIN_WITHIN < await shut_down(talk) < 10
        assert [("exhausted", "max_attempts")] == ended(recorder)

    async def test_without_drain_it_ends_at_once(self, start_conversation, recorder):
        """LiveKit interrupts the pending replies, as without retries."""
        talk = await start_conversation(FAILING, base_delay=4.0)
        await talk.ask_agent()

        assert await shut_down(talk, drain=False) < 1
        assert [("interrupted", "interrupted")] == ended(recorder)


class TestContract:
    """What the limit relies on, in the installed livekit-agents. See CONTRIBUTING."""

    async def test_activity_of_a_session_is_found(self, start_conversation):
        """The activity listens to the realtime session's errors."""
        talk = await start_conversation("ok")

        assert talk.session._activity is agent_activity(talk.realtime)

    def test_limit_is_shorter_than_livekits(self):
        """``shutdown_process_timeout`` is 10 s, and ``shutdown`` drains by default."""
        timeout = inspect.signature(AgentServer).parameters["shutdown_process_timeout"].default
        drain = inspect.signature(AgentSession.shutdown).parameters["drain"].default

        assert DRAIN_WITHIN < timeout == 10.0
        assert drain
