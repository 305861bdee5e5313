# SPDX-License-Identifier: Apache-2.0
"""Which adapter a session gets: by the modules its class comes from, the nearest first."""

from __future__ import annotations

import importlib
import logging
from typing import Any, Final

from livekit.agents import llm

from traced_retry.core.guard import log_once
from traced_retry.livekit.adapter import Adapter

ADAPTERS: Final = {
    # The engine moved from the plugin into the framework after 1.7.0. Either may define the base
    # class of a session of OpenAI, xAI, Azure OpenAI or LiveKit inference.
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
    "livekit.agents.llm.duplex_adapter": "traced_retry.livekit.duplex:DuplexAdapter",
    "livekit.plugins.phonic.realtime.realtime_model": "traced_retry.livekit.phonic:PhonicAdapter",
    "traced_retry.core.decorator": "traced_retry.livekit.adapter:OwnRetryAdapter",
}


TESTED: Final = ("livekit.plugins.xai.", "livekit.agents.inference.")
"""Prefixes of modules with subclasses of OpenAI's session that are tested with its adapter."""


def adapter_class(session: llm.RealtimeSession[Any]) -> type[Adapter]:
    """Return the adapter for a session.

    It is :class:`Adapter`, which only observes, if the plugin is unknown, or if an unknown subclass
    overrides a method that the plugin's adapter relies on.
    """
    derived: list[type] = []
    for cls in type(session).__mro__:
        if home := ADAPTERS.get(cls.__module__):
            module, _, name = home.partition(":")
            found: type[Adapter] = getattr(importlib.import_module(module), name)
            return found if _keeps(derived, found.relied_methods) else Adapter
        if not cls.__module__.startswith(TESTED):
            derived.append(cls)
    return Adapter


def _keeps(derived: list[type], methods: tuple[str, ...]) -> bool:
    """Return whether no class of ``derived`` overrides one of ``methods``. Log it otherwise."""
    for cls in derived:
        if overridden := [name for name in methods if name in vars(cls)]:
            log_once(
                f"{cls.__module__}.{cls.__qualname__} overrides {', '.join(overridden)} of a known "
                "session: its replies are traced and never sent again",
                logging.WARNING,
            )
            return False
    return True
