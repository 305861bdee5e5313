# SPDX-License-Identifier: Apache-2.0
"""A voice agent with retries and traces.

    pip install '.[agent]'
    export OPENAI_API_KEY=... LIVEKIT_URL=... LIVEKIT_API_KEY=... LIVEKIT_API_SECRET=...
    python examples/agent.py dev

Spans are stored on this computer, and `traced-retry report` shows them. To see them in Jaeger,
`export OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318`.
"""

from __future__ import annotations

from livekit.agents import Agent, AgentServer, AgentSession, JobContext, cli
from livekit.plugins import openai

import traced_retry

server = AgentServer()


@server.rtc_session(agent_name="support")
async def entrypoint(ctx: JobContext) -> None:
    """Handle one call. LiveKit runs it in a process of its own."""
    traced_retry.enable(ctx)
    session: AgentSession[None] = AgentSession(llm=openai.realtime.RealtimeModel())
    await session.start(Agent(instructions="You help with orders. Be brief."), room=ctx.room)
    await session.generate_reply(instructions="Greet the caller.")


if __name__ == "__main__":
    cli.run_app(server)
