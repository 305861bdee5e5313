# SPDX-License-Identifier: Apache-2.0
"""OpenAI and those who speak its protocol: each with its real plugin and its own server.

Replies of all of these carry the id of their request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from livekit.agents import inference
from livekit.plugins import openai, xai

from traced_retry.simulator import OpenAISimulator
from traced_retry.simulator.azure import VoiceLiveSimulator
from traced_retry.simulator.openai_compatible import (
    AzureOpenAIBetaSimulator,
    AzureOpenAISimulator,
    XAISimulator,
)


def gpt(**kwargs):
    """OpenAI itself, in text alone."""
    return openai.realtime.RealtimeModel(modalities=["text"], **kwargs)


def grok(**kwargs):
    """Grok, at xAI, always asks for audio; the simulator answers in text, as a model may."""
    return xai.realtime.RealtimeModel(**kwargs)


def azure_openai(*, base_url, conn_options, **kwargs):
    """Azure OpenAI takes no connection options; its first reconnect comes after 0.1 s as well."""
    return openai.realtime.RealtimeModel.with_azure(
        azure_deployment="my-deployment", azure_endpoint=base_url, modalities=["text"], **kwargs
    )


def azure_openai_beta(**kwargs):
    """A client that names an api_version speaks the beta's protocol."""
    return azure_openai(api_version="2024-10-01-preview", **kwargs)


def gateway(**kwargs):
    """LiveKit inference signs a token with the key pair; nothing is asked of LiveKit Cloud."""
    _needs_inference()
    return inference.RealtimeModel(
        "openai/gpt-realtime", api_secret="SECRET" * 6, modalities=["text"], **kwargs
    )


def gateway_to_grok(**kwargs):
    """Grok behind LiveKit inference."""
    _needs_inference()
    return inference.RealtimeModel("xai/grok-voice-latest", api_secret="SECRET" * 6, **kwargs)


def voicelive(*, api_key, base_url, conn_options, http_session):
    """A text-only VoiceLive model that talks to the simulator; it opens a session of its own."""
    azure = pytest.importorskip("livekit.plugins.azure.realtime", reason="not in this version")
    return azure.RealtimeModel(
        api_key=api_key, endpoint=base_url, modalities=["text"], conn_options=conn_options
    )


def _needs_inference():
    if not hasattr(inference, "RealtimeModel"):
        pytest.skip("LiveKit inference got its realtime model after livekit-agents 1.7.0")


async def connected(talk):
    """Wait until the server has spoken on this conversation's connection.

    azure-ai-voicelive 1.3.1 leaks its HTTP session where it is closed while connecting.
    """
    spoken = asyncio.Event()
    talk.realtime.on("azure_server_event_received", lambda _: spoken.set())
    await spoken.wait()


@dataclass(frozen=True)
class Kin:
    """One of them."""

    model: Callable[..., Any]
    simulator: type[OpenAISimulator]
    provider: str
    """``gen_ai.provider.name``."""


OPENAI = Kin(gpt, OpenAISimulator, "openai")
VOICELIVE = Kin(voicelive, VoiceLiveSimulator, "azure_voicelive")
ENGINE = {
    # Those that share the engine of OpenAI's plugin.
    "xai": Kin(grok, XAISimulator, "x_ai"),
    "azure openai": Kin(azure_openai, AzureOpenAISimulator, "azure.ai.openai"),
    "azure openai beta": Kin(azure_openai_beta, AzureOpenAIBetaSimulator, "azure.ai.openai"),
    "inference": Kin(gateway, OpenAISimulator, "livekit"),
    "inference xai": Kin(gateway_to_grok, XAISimulator, "livekit"),
}
ALL = {"openai": OPENAI, **ENGINE, "voicelive": VOICELIVE}
