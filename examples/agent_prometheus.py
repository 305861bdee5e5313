# SPDX-License-Identifier: Apache-2.0
"""The same agent with metrics that Prometheus scrapes from http://127.0.0.1:9464/metrics.

    pip install '.[agent]'
    export OPENAI_API_KEY=... LIVEKIT_URL=... LIVEKIT_API_KEY=... LIVEKIT_API_SECRET=...
    python examples/agent_prometheus.py start

Only one import and the server differ from agent.py. LiveKit empties the folder at start.
"""

from __future__ import annotations

from livekit.agents import Agent, AgentServer, AgentSession, JobContext, cli
from livekit.plugins import openai

import traced_retry
from traced_retry.export import prometheus

server = AgentServer(
    setup_fnc=prometheus.set_up("openai"),
    prometheus_port=9464,
    prometheus_multiproc_dir="prometheus-files",
)


@server.rtc_session(agent_name="support")
async def entrypoint(ctx: JobContext) -> None:
    """Handle one call. LiveKit runs it in a process of its own."""
    traced_retry.enable(ctx)
    session: AgentSession[None] = AgentSession(llm=openai.realtime.RealtimeModel())
    await session.start(Agent(instructions="You help with orders. Be brief."), room=ctx.room)
    await session.generate_reply(instructions="Greet the caller.")


if __name__ == "__main__":
    cli.run_app(server)
