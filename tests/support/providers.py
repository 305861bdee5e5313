# SPDX-License-Identifier: Apache-2.0
"""Every provider with its real plugin and its own simulator."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import warnings
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
from google.genai import types
from livekit.agents import APIConnectOptions, inference
from livekit.plugins import google, openai, ultravox, xai
from support.conversation import Conversation, NovaSonicConversation

from traced_retry.livekit.adapter import Adapter
from traced_retry.livekit.aws import AWSAdapter
from traced_retry.livekit.azure import VoiceLiveAdapter
from traced_retry.livekit.duplex import DuplexAdapter
from traced_retry.livekit.google import GoogleAdapter
from traced_retry.livekit.openai import OpenAIAdapter
from traced_retry.livekit.phonic import PhonicAdapter
from traced_retry.livekit.ultravox import UltravoxAdapter
from traced_retry.simulator import OpenAISimulator
from traced_retry.simulator.azure import VoiceLiveSimulator
from traced_retry.simulator.google import GoogleSimulator
from traced_retry.simulator.gpt_live import GPTLiveSimulator
from traced_retry.simulator.openai_compatible import (
    AzureOpenAIBetaSimulator,
    AzureOpenAISimulator,
    XAISimulator,
)
from traced_retry.simulator.phonic import PhonicSimulator, redirected
from traced_retry.simulator.ultravox import UltravoxSimulator

KEY = "sk-SECRET"
CONN_OPTIONS = APIConnectOptions(max_retry=3, retry_interval=0.5, timeout=5.0)

# --- models. Each takes api_key, base_url, http_session, conn_options and the plugin's own options.


def openai_model(**kwargs):
    """Make OpenAI's model, for text only."""
    return openai.realtime.RealtimeModel(**{"modalities": ["text"], **kwargs})


def xai_model(**kwargs):
    """Make xAI's model. It always requests audio, and the simulator answers in text."""
    return xai.realtime.RealtimeModel(**kwargs)


def azure_openai_model(*, base_url, conn_options, **kwargs):
    """Make Azure OpenAI's model, which takes no connection options."""
    return openai.realtime.RealtimeModel.with_azure(
        azure_deployment="my-deployment", azure_endpoint=base_url, modalities=["text"], **kwargs
    )


def azure_openai_beta_model(**kwargs):
    """Make Azure OpenAI's model with an api_version, which selects the protocol of the beta."""
    return azure_openai_model(api_version="2024-10-01-preview", **kwargs)


def inference_model(**kwargs):
    """Make LiveKit inference's model for OpenAI. It signs its token itself, without a request."""
    _skip_without_inference()
    return inference.RealtimeModel(
        "openai/gpt-realtime", api_secret="SECRET" * 6, modalities=["text"], **kwargs
    )


def inference_xai_model(**kwargs):
    """Make LiveKit inference's model for xAI."""
    _skip_without_inference()
    return inference.RealtimeModel("xai/grok-voice-latest", api_secret="SECRET" * 6, **kwargs)


def voicelive_model(*, api_key, base_url, conn_options, http_session):
    """Make Azure VoiceLive's model, for text only. It opens an HTTP session of its own."""
    azure = pytest.importorskip("livekit.plugins.azure.realtime", reason="not in this version")
    return azure.RealtimeModel(
        api_key=api_key, endpoint=base_url, modalities=["text"], conn_options=conn_options
    )


def google_model(*, api_key, http_options, http_session, conn_options, **options):
    """Make Google's model, for text only."""
    return google.realtime.RealtimeModel(
        api_key=api_key,
        http_options=types.HttpOptions(**http_options),
        **{"modalities": [types.Modality.TEXT], **options},
    )


def ultravox_model(*, api_key, base_url, http_session, conn_options):
    """Make Ultravox's model, for text only."""
    return ultravox.realtime.RealtimeModel(
        api_key=api_key, base_url=base_url, http_session=http_session, output_medium="text"
    )


def gpt_live_model(**kwargs):
    """Make GPT-Live's model."""
    if not hasattr(openai.realtime, "GPTLiveModel"):
        pytest.skip("OpenAI's plugin got its duplex model after livekit-agents 1.7.0")
    return openai.realtime.GPTLiveModel(**kwargs)


def phonic_model(*, api_key, base_url, http_session, conn_options):
    """Make Phonic's model. ``redirected`` sends it to the simulator."""
    return phonic_plugin().realtime.RealtimeModel(api_key=api_key)


def nova_sonic_model(*, api_key, base_url, http_session, conn_options):
    """Make Nova Sonic's model. The simulator's ``redirected`` sends it there."""
    return nova_sonic_plugin().RealtimeModel()


def phonic_plugin():
    """Return Phonic's plugin without the deprecation warning of websockets.legacy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        # The plugin imports its client on first use.
        importlib.import_module("phonic.conversations.client")
        return importlib.import_module("livekit.plugins.phonic")


def nova_sonic_plugin():
    """Return Nova Sonic's plugin, or skip the test if it is missing or too old."""
    home = "livekit.plugins.aws.experimental.realtime.realtime_model"
    plugin = pytest.importorskip(home, reason="livekit-plugins-aws[realtime] needs Python 3.12")
    if not hasattr(plugin, "_BedrockRuntimeConfig"):
        pytest.skip("the simulator replaces another client than that of 1.7.0")
    return plugin


def nova_sonic_simulator(script):
    """Make Nova Sonic's simulator, and keep the virtual clock from overtaking its threads."""
    nova_sonic_plugin()
    from traced_retry.simulator.aws import AWSSimulator

    asyncio.get_running_loop().patience = 0.05
    return AWSSimulator(script)


def _skip_without_inference():
    if not hasattr(inference, "RealtimeModel"):
        pytest.skip("LiveKit inference got its realtime model after livekit-agents 1.7.0")


def _url(server):
    return {"base_url": server.url}


# --- waiting until the plugin is connected --------------------------------------------------------


async def _is_ready(_):
    """Return at once: the plugin keeps a request until it is connected."""


async def _receives_event(conversation):
    """Wait for the server's first event.

    azure-ai-voicelive 1.3.1 leaks its HTTP session if it is closed while connecting.
    """
    received = asyncio.Event()
    conversation.realtime.on("azure_server_event_received", lambda _: received.set())
    await received.wait()


async def _opens_stream(_):
    """Wait 1 s: the plugin opens its stream after 0.55 s."""
    await asyncio.sleep(1)


# --- the cases ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProviderCase:
    """One provider."""

    model: Callable[..., Any]
    simulator: Callable[..., Any]
    name: str
    """``gen_ai.provider.name``."""
    adapter: type[Adapter]
    address: Callable[[Any], dict[str, Any]] = _url
    """Return the model's arguments that lead it to this simulator."""
    redirected: Callable[[Any], AbstractContextManager[Any]] = contextlib.nullcontext
    """Send the plugin's connections to this simulator, if it has no setting for the address."""
    until_ready: Callable[[Conversation], Awaitable[None]] = _is_ready
    conversation: type[Conversation] = Conversation


OPENAI = ProviderCase(openai_model, OpenAISimulator, "openai", OpenAIAdapter)
VOICELIVE = ProviderCase(
    voicelive_model,
    VoiceLiveSimulator,
    "azure_voicelive",
    VoiceLiveAdapter,
    until_ready=_receives_event,
)
GOOGLE = ProviderCase(
    google_model,
    GoogleSimulator,
    "gcp.gemini",
    GoogleAdapter,
    address=lambda server: {"http_options": server.http_options},
)
ULTRAVOX = ProviderCase(ultravox_model, UltravoxSimulator, "ultravox", UltravoxAdapter)
PHONIC = ProviderCase(
    phonic_model,
    PhonicSimulator,
    "phonic",
    PhonicAdapter,
    redirected=lambda server: redirected(server.url),
)
GPT_LIVE = ProviderCase(gpt_live_model, GPTLiveSimulator, "openai", DuplexAdapter)
NOVA_SONIC = ProviderCase(
    nova_sonic_model,
    nova_sonic_simulator,
    "aws.bedrock",
    AWSAdapter,
    redirected=lambda server: server.redirected(),
    until_ready=_opens_stream,
    conversation=NovaSonicConversation,
)

SHARED_ENGINE = {
    "xai": ProviderCase(xai_model, XAISimulator, "x_ai", OpenAIAdapter),
    "azure openai": ProviderCase(
        azure_openai_model, AzureOpenAISimulator, "azure.ai.openai", OpenAIAdapter
    ),
    "azure openai beta": ProviderCase(
        azure_openai_beta_model, AzureOpenAIBetaSimulator, "azure.ai.openai", OpenAIAdapter
    ),
    "inference": ProviderCase(inference_model, OpenAISimulator, "livekit", OpenAIAdapter),
    "inference xai": ProviderCase(inference_xai_model, XAISimulator, "livekit", OpenAIAdapter),
}
"""The providers that share the engine of OpenAI's plugin."""
OPENAI_COMPATIBLE = {"openai": OPENAI, **SHARED_ENGINE, "voicelive": VOICELIVE}
"""The providers with OpenAI's protocol. Their replies carry the id of the request."""
WITHOUT_IDS = {
    "google": GOOGLE,
    "ultravox": ULTRAVOX,
    "phonic": PHONIC,
    "aws": NOVA_SONIC,
    "gpt-live": GPT_LIVE,
}
"""The providers whose replies carry no id of the request."""
PROVIDERS = {**OPENAI_COMPATIBLE, **WITHOUT_IDS}
