# SPDX-License-Identifier: Apache-2.0
"""One conversation over a real WebSocket, as a program: ``python run_conversation.py SCRIPT``.

It knows nothing of traced-retry but for the simulator, so that it can be run under
``opentelemetry-instrument``. It prints what the server heard, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys

import aiohttp
from livekit.agents import Agent, AgentSession
from livekit.plugins import openai

from traced_retry.simulator import OpenAISimulator

SECRET = "the caller's name is Rumpelstiltskin"


async def run_conversation(script: str = "ok") -> dict[str, int]:
    """Ask for one reply; returns how many requests were heard, and how many completed."""
    async with OpenAISimulator(script) as server, aiohttp.ClientSession() as http:
        model = openai.realtime.RealtimeModel(
            api_key="sk-secret", base_url=server.url, modalities=["text"], http_session=http
        )
        session: AgentSession[None] = AgentSession(llm=model)
        await session.start(Agent(instructions=SECRET))
        await server.wait_for("connected")
        handle = session.generate_reply(instructions=SECRET, user_input=SECRET)
        await handle
        await session.aclose()
        return {"requests": len(server.requests), "completed": len(server.completed)}


if __name__ == "__main__":
    logging.getLogger("livekit").setLevel(logging.CRITICAL)
    sys.stdout.write(json.dumps(asyncio.run(run_conversation(*sys.argv[1:]))) + "\n")
