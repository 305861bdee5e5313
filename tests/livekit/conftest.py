# SPDX-License-Identifier: Apache-2.0
"""A real AgentSession, with a real plugin, over a real socket to a simulator."""

from __future__ import annotations

import asyncio
import contextlib

import aiohttp
import pytest
from livekit.agents import Agent, AgentSession, APIConnectOptions
from livekit.plugins import openai

import traced_retry
from traced_retry.simulator import OpenAISimulator


class Conversation:
    """One agent talking to one server."""

    def __init__(self, server, model, session):
        self.server = server
        self.model = model
        self.session = session
        self.errors = []
        session.on("error", self.errors.append)

    @property
    def realtime(self):
        """The plugin's session under the agent's."""
        return self.session._activity._rt_session

    @property
    def heard(self):
        """What the agent said, in order: the text of its messages."""
        return [
            item.text_content
            for item in self.session.history.items
            if item.type == "message" and item.role == "assistant"
        ]

    def ask(self, **kwargs):
        """Ask for a reply; returns its SpeechHandle."""
        return self.session.generate_reply(**kwargs)

    async def reply(self, **kwargs):
        """Ask for a reply and wait until it is over; returns its exception, if any."""
        handle = self.ask(**kwargs)
        await handle
        return handle.exception()

    async def settle(self, seconds=15.0):
        """Let time pass: whatever would be heard late is heard now."""
        await asyncio.sleep(seconds)


@pytest.fixture
async def converse(recorder):
    """Of a script and a policy's settings makes a :class:`Conversation`, closed after the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def converse(
            script, *, agent=None, bare=False, model=None, simulator=OpenAISimulator, **policy
        ):
            server = await stack.enter_async_context(simulator(script))
            http = await stack.enter_async_context(aiohttp.ClientSession())
            make = model or openai.realtime.RealtimeModel
            realtime_model = make(
                api_key="sk-SECRET",
                base_url=server.url,
                http_session=http,
                conn_options=APIConnectOptions(max_retry=3, retry_interval=0.5, timeout=5.0),
                **({} if model else {"modalities": ["text"]}),
            )
            if not bare:
                traced_retry.wrap(
                    realtime_model,
                    policy=traced_retry.RetryPolicy(**policy),
                    **recorder.providers,
                )
            session = await stack.enter_async_context(AgentSession(llm=realtime_model))
            await session.start(agent or Agent(instructions="SECRET instructions"))
            return Conversation(server, realtime_model, session)

        yield converse
