# SPDX-License-Identifier: Apache-2.0
"""Which adapter a session gets: by the modules its class comes from, the nearest first."""

from __future__ import annotations

import importlib
from typing import Any, Final

from livekit.agents import llm

from traced_retry.livekit.adapter import Adapter

ADAPTERS: Final = {
    # The engine moved from the plugin into the framework after 1.7.0; either may be the home of
    # the class that a session of OpenAI, xAI, Azure OpenAI or LiveKit inference derives from.
    "livekit.agents.llm._realtime.openai": "traced_retry.livekit.openai:OpenAIAdapter",
    "livekit.plugins.openai.realtime.realtime_model": "traced_retry.livekit.openai:OpenAIAdapter",
    "livekit.plugins.azure.realtime.realtime_model": "traced_retry.livekit.azure:VoiceLiveAdapter",
    "livekit.plugins.google.realtime.realtime_api": "traced_retry.livekit.google:GoogleAdapter",
    "livekit.plugins.ultravox.realtime.realtime_model": (
        "traced_retry.livekit.ultravox:UltravoxAdapter"
    ),
    "livekit.plugins.aws.experimental.realtime.realtime_model": (
        "traced_retry.livekit.aws:AWSAdapter"
    ),
    "livekit.plugins.phonic.realtime.realtime_model": "traced_retry.livekit.phonic:PhonicAdapter",
    "traced_retry.core.decorator": "traced_retry.livekit.adapter:OwnRetryAdapter",
}


def adapter_class(session: llm.RealtimeSession[Any]) -> type[Adapter]:
    """The adapter for a session; :class:`Adapter`, which only observes, where none is known."""
    for cls in type(session).__mro__:
        if home := ADAPTERS.get(cls.__module__):
            module, _, name = home.partition(":")
            found: type[Adapter] = getattr(importlib.import_module(module), name)
            return found
    return Adapter
