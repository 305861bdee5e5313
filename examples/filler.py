# SPDX-License-Identifier: Apache-2.0
"""Play a soft tone, a recording or a sentence while the caller waits for a late reply."""

from __future__ import annotations

import os
from typing import Any

from livekit.agents import AgentSession, llm, tts

import traced_retry


def humming(model: llm.RealtimeModel, **settings: Any) -> AgentSession:
    """Return a session that plays a tone. ``settings`` are further arguments of ``wrap``.

    ``traced_retry.enable(ctx, on_waiting=traced_retry.Filler())`` does the same for all models.
    """
    return _filling(model, traced_retry.Filler(), settings)


def typing(
    model: llm.RealtimeModel, recording: str | os.PathLike[str], **settings: Any
) -> AgentSession:
    """Return a session that repeats a recording without a pause, such as the sound of typing."""
    return _filling(model, traced_retry.Filler(recording, pause=0), settings)


async def asking_for_patience(
    model: llm.RealtimeModel, voice: tts.TTS, **settings: Any
) -> AgentSession:
    """Return a session that says a sentence once for each late reply.

    Take a voice from another provider than the model's, because an outage may affect both.
    """
    filler = traced_retry.Filler.sentence("One moment, please.", voice)
    await filler.load()  # Otherwise the first caller waits for the synthesis, too.
    return _filling(model, filler, settings)


def _filling(
    model: llm.RealtimeModel, filler: traced_retry.Filler, settings: dict[str, Any]
) -> AgentSession:
    return AgentSession(llm=traced_retry.wrap(model, on_waiting=filler, **settings))
