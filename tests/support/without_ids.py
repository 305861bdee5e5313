# SPDX-License-Identifier: Apache-2.0
"""Models whose replies carry no id of the request, each with its simulator, running."""

from __future__ import annotations

import asyncio
import importlib
import warnings

import aiohttp
import pytest
from livekit.agents import Agent, AgentSession
from livekit.plugins import ultravox
from support.conversation import Conversation

import traced_retry
from traced_retry.simulator.phonic import PhonicSimulator, redirected
from traced_retry.simulator.ultravox import UltravoxSimulator

KEY = "sk-SECRET"


class Talk(Conversation):
    """With one of them."""

    async def asked(self, **kwargs):
        """Ask the plugin itself for a reply, and wait until the server has heard that."""
        before = len(self.server.requests)
        reply = self.realtime.generate_reply(**kwargs)
        await self.server.wait_for(lambda: len(self.server.requests) > before)
        return reply


async def talk_over(stack, recorder, server, model, *, agent=None, bare=False, **policy):
    """A :class:`Talk`, with the model wrapped unless it is to be ``bare``."""
    if not bare:
        policy = traced_retry.RetryPolicy(**policy)
        traced_retry.wrap(model, policy=policy, **recorder.providers)
    session = await stack.enter_async_context(AgentSession(llm=model))
    await session.start(agent or Agent(instructions="SECRET instructions"))
    return Talk(server, model, session)


async def an_ultravox(stack, script, **simulator):
    """Ultravox, in text alone."""
    server = await stack.enter_async_context(UltravoxSimulator(script, **simulator))
    return server, await an_ultravox_at(stack, server.url)


async def an_ultravox_at(stack, url):
    """Its model alone, for a server there."""
    http = await stack.enter_async_context(aiohttp.ClientSession())
    return ultravox.realtime.RealtimeModel(
        api_key=KEY, base_url=url, http_session=http, output_medium="text"
    )


def phonic_plugin():
    """The plugin, imported: its client is on websockets.legacy, which is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("phonic.conversations.client")  # which it does at its first use
        return importlib.import_module("livekit.plugins.phonic")


async def a_phonic(stack, script, **simulator):
    """Phonic."""
    phonic = phonic_plugin()
    server = await stack.enter_async_context(PhonicSimulator(script, **simulator))
    stack.enter_context(redirected(server.url))
    return server, phonic.realtime.RealtimeModel(api_key=KEY)


async def a_nova_sonic(stack, script):
    """Nova Sonic; the virtual clock must not overtake its client's threads."""
    home = "livekit.plugins.aws.experimental.realtime.realtime_model"
    plugin = pytest.importorskip(home, reason="livekit-plugins-aws[realtime] needs Python 3.12")
    if not hasattr(plugin, "_BedrockRuntimeConfig"):
        pytest.skip("the simulator stands in for another client than that of 1.7.0")
    from traced_retry.simulator.aws import AWSSimulator

    asyncio.get_running_loop().patience = 0.05
    server = await stack.enter_async_context(AWSSimulator(script))
    stack.enter_context(server.redirected())
    return server, plugin.RealtimeModel()
