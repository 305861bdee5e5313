# SPDX-License-Identifier: Apache-2.0
"""A real AgentSession with a real plugin, over a real socket to a simulator."""

from __future__ import annotations

import contextlib

import aiohttp
import pytest
from livekit.agents import Agent, AgentSession
from support.providers import CONN_OPTIONS, KEY, PROVIDERS

import traced_retry


@pytest.fixture
def provider(request):
    """Return the provider of ``start_conversation``, by its name if a test is parametrized."""
    return PROVIDERS[getattr(request, "param", "openai")]


@pytest.fixture
async def start_conversation(provider, recorder):
    """Return a function that starts a conversation. Each is closed after the test.

    Its keyword arguments ``provider``, ``model`` and ``simulator`` replace those of the fixture
    ``provider``. ``bare`` leaves traced-retry out. ``ready`` waits until the plugin is connected.
    ``options`` are the model's own, and all other keyword arguments are settings of the policy.
    """
    fixture = provider
    async with contextlib.AsyncExitStack() as stack:

        async def start_conversation(
            script,
            *,
            provider=fixture,
            model=None,
            simulator=None,
            agent=None,
            bare=False,
            ready=True,
            options=None,
            on_exhausted=None,
            on_waiting=None,
            **policy,
        ):
            server = await stack.enter_async_context((simulator or provider.simulator)(script))
            http = await stack.enter_async_context(aiohttp.ClientSession())
            stack.enter_context(provider.redirected(server))
            realtime_model = (model or provider.model)(
                api_key=KEY,
                http_session=http,
                conn_options=CONN_OPTIONS,
                **provider.address(server),
                **(options or {}),
            )
            if not bare:
                traced_retry.wrap(
                    realtime_model,
                    policy=traced_retry.RetryPolicy(**policy),
                    on_exhausted=on_exhausted,
                    on_waiting=on_waiting,
                    **recorder.providers,
                )
            session = await stack.enter_async_context(AgentSession(llm=realtime_model))
            await session.start(agent or Agent(instructions="SECRET instructions"))
            conversation = provider.conversation(server, realtime_model, session)
            if ready:
                await provider.until_ready(conversation)
            return conversation

        yield start_conversation
