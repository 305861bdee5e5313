# SPDX-License-Identifier: Apache-2.0
"""Let the next model answer, exactly once, if a reply failed permanently."""

from __future__ import annotations

import asyncio
from typing import Any

from livekit.agents import AgentSession, llm

import traced_retry


def answering_elsewhere(models: list[llm.RealtimeModel], **settings: Any) -> AgentSession:
    """Return a session with the first of ``models``. ``settings`` go to ``traced_retry.wrap``."""
    switching = False

    async def answer_elsewhere(failed: traced_retry.FailedReply) -> None:
        nonlocal switching
        # Stop if its beginning was heard, the caller is gone, or the next model failed too.
        if failed.stop_reason in ("output_started", "session_closed") or switching:
            return
        switching, serving = True, model.metrics_metadata
        try:
            await asyncio.sleep(0.1)  # after a fatal error the adapter switches by itself
            if model.metrics_metadata == serving:
                await model.restart_session(switch_model=True)
            await session.generate_reply()
        finally:
            switching = False

    # The adapter alone requests some replies again, and not others. The recipe requests all.
    model = llm.RealtimeModelFallbackAdapter(models, regenerate_on_swap=False)
    session = AgentSession(llm=traced_retry.wrap(model, on_exhausted=answer_elsewhere, **settings))
    return session
