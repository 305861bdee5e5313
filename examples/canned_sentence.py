# SPDX-License-Identifier: Apache-2.0
"""Play a recorded sentence instead of silence if a reply failed permanently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from livekit.agents import AgentSession, ErrorEvent, llm
from livekit.agents.utils.audio import audio_frames_from_file

import traced_retry

SENTENCE = "Sorry, I lost the line. Could you say that again?"
# A recording, because the outage may affect the provider's voice too.
RECORDING = Path(__file__).with_name("sorry.ogg")


def apologising(model: llm.RealtimeModel, **settings: Any) -> AgentSession:
    """Return a session with ``model``. ``settings`` go to ``traced_retry.wrap``."""

    def apologise(failed: traced_retry.FailedReply) -> None:
        if failed.stop_reason != "session_closed":  # otherwise the caller is gone
            frames = audio_frames_from_file(str(RECORDING))
            session.say(SENTENCE, audio=frames)

    session = AgentSession(llm=traced_retry.wrap(model, on_exhausted=apologise, **settings))

    @session.on("error")
    def let_it_finish(event: ErrorEvent) -> None:
        # After a fatal error LiveKit closes the session, and cuts the sentence short, unless the
        # session is closing already.
        if not event.error.recoverable:
            session.shutdown(drain=True)

    return session
