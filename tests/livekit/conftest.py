# SPDX-License-Identifier: Apache-2.0
"""A real AgentSession, with a real plugin, over a real socket to a simulator."""

from __future__ import annotations

import contextlib

import aiohttp
import pytest
from livekit.agents import Agent, AgentSession, APIConnectOptions
from livekit.plugins import openai
from support.conversation import Conversation

import traced_retry
from traced_retry.simulator import OpenAISimulator


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
