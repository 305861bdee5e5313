# SPDX-License-Identifier: Apache-2.0
"""Models whose replies carry no id of the request, each with its simulator, running."""

from __future__ import annotations

import asyncio
import importlib
import warnings

import aiohttp
import pytest
from livekit.plugins import ultravox

from traced_retry.simulator.phonic import PhonicSimulator, redirected
from traced_retry.simulator.ultravox import UltravoxSimulator


async def an_ultravox(stack, script, **simulator):
    """Ultravox, in text alone."""
    server = await stack.enter_async_context(UltravoxSimulator(script, **simulator))
    http = await stack.enter_async_context(aiohttp.ClientSession())
    return server, ultravox.realtime.RealtimeModel(
        api_key="sk-SECRET", base_url=server.url, http_session=http, output_medium="text"
    )


async def a_phonic(stack, script):
    """Phonic."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its client is on websockets.legacy
        phonic = importlib.import_module("livekit.plugins.phonic")
        importlib.import_module("phonic.conversations.client")
    server = await stack.enter_async_context(PhonicSimulator(script))
    stack.enter_context(redirected(server.url))
    return server, phonic.realtime.RealtimeModel(api_key="sk-SECRET")


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
