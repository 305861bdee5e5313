# SPDX-License-Identifier: Apache-2.0
"""Play a recorded sentence instead of silence if a reply failed permanently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from livekit.agents import AgentSession, ErrorEvent, llm
from livekit.agents.utils.audio import audio_frames_from_file

import traced_retry

SENTENCE = "Sorry, I lost the line. Could you say that again?"
# It is a recording because the outage may affect the provider's voices as well.
RECORDING = Path(__file__).with_name("sorry.ogg")


def apologise(failed: traced_retry.FailedReply) -> None:
    """Play the sentence. ``traced_retry.enable(ctx, on_exhausted=apologise)`` is enough, too."""
    if failed.session is not None and failed.stop_reason != "session_closed":
        failed.session.say(SENTENCE, audio=audio_frames_from_file(str(RECORDING)))


def apologising(model: llm.RealtimeModel, **settings: Any) -> AgentSession:
    """Return a session with ``model``. ``settings`` are further arguments of ``wrap``."""
    session = AgentSession(llm=traced_retry.wrap(model, on_exhausted=apologise, **settings))

    @session.on("error")
    def let_it_finish(event: ErrorEvent) -> None:
        # After a fatal error LiveKit closes the session, and cuts the sentence short, unless the
        # session is closing already.
        if not event.error.recoverable:
            session.shutdown(drain=True)

    return session
