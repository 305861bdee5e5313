# SPDX-License-Identifier: Apache-2.0
"""The demo: a real AgentSession, with LiveKit's own OpenAI plugin, talks to a server that fails.

Each conversation is one reply. It runs over a real WebSocket to a simulator on 127.0.0.1, and is
judged by two witnesses that know nothing of each other: the server, which counts the requests it
was sent, and the agent's own chat history, which has what was heard.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import aiohttp
from livekit.agents import Agent, AgentSession, APIConnectOptions
from livekit.agents import telemetry as livekit_telemetry
from livekit.plugins import openai
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider

import traced_retry
from traced_retry.export.setup import store_providers
from traced_retry.report import Reply, read
from traced_retry.simulator import OpenAISimulator

POLICY: Final = traced_retry.RetryPolicy(
    base_delay=0.4, max_delay=1.0, attempt_timeout=1.5, deadline=6.0
)
"""Impatient, for nobody should wait half a minute for a demo; the defaults suit a real call."""


@dataclass(frozen=True)
class Scene:
    """One conversation of the demo."""

    script: str
    """What the server does to each request; see ``traced-retry simulate --help``."""
    story: str
    """The same for people."""
    interrupt_after: float | None = None
    """Seconds after which the caller starts to speak; None: the caller waits."""
    linger: float = 0.0
    """Seconds to go on listening afterwards, for a reply that would come too late."""


SCENES: Final = (
    Scene("ok", "All is well."),
    Scene("rate_limit:0.5,ok", "The provider is busy and says for how long."),
    Scene("error:server_error,ok", "The provider has a hiccup."),
    Scene("uncorrelated,ok", "It does not say which request it meant."),
    Scene("late:1.2,ok", "The answer is slow, but comes."),
    Scene("late:2.2,ok", "The answer comes after we asked again.", linger=1.0),
    Scene("drop_before,ok", "The connection is lost during the request."),
    Scene("active:0.8,ok", "Another response is still active."),
    Scene("rate_limit:5", "The caller loses patience while we wait.", interrupt_after=0.7),
    Scene("rate_limit", "The provider stays busy."),
    Scene("quota", "The account is out of quota."),
    Scene("failed_message,ok", "The response dies after it began, before its first word."),
)


@dataclass(frozen=True)
class Act:
    """One conversation, played."""

    scene: Scene
    reply: Reply
    """As the store has it."""
    requests_sent: int
    """As the server counted them."""
    replies_heard: int
    """As the agent's chat history has them."""

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "provider": self.reply.provider,
            "script": self.scene.script,
            "outcome": self.reply.outcome,
            "stop_reason": self.reply.stop_reason,
            "attempts": self.reply.attempt_count,
            "requests_sent": self.requests_sent,
            "replies_heard": self.replies_heard,
            "seconds": round(self.reply.seconds, 3),
            "trace_id": self.reply.trace_id,
        }


@dataclass
class Demo:
    """The whole play; :meth:`run` it once.

    Args:
        store: the file to which spans are appended.
        on_scene: told of each scene before it is played.
        on_act: told of each scene played.
    """

    store: Path
    on_scene: Callable[[Scene], None] = lambda _: None
    on_act: Callable[[Act], None] = lambda _: None
    acts: list[Act] = field(default_factory=list)

    async def run(self, scenes: tuple[Scene, ...] = SCENES) -> list[Act]:
        """Play all scenes, one after the other.

        Raises:
            ExportError: the store or the ``OTEL_*`` variables cannot be used.
        """
        tracer_provider, meter_provider = store_providers(self.store, "traced-retry-demo")
        livekit_telemetry.set_tracer_provider(tracer_provider, allow_pii=False)
        try:
            async with aiohttp.ClientSession() as http:
                for scene in scenes:
                    self.on_scene(scene)
                    # In a task of its own, for the span that LiveKit's session leaves current.
                    playing = self._play(scene, http, tracer_provider, meter_provider)
                    self.acts.append(await asyncio.create_task(playing))
                    self.on_act(self.acts[-1])
        finally:
            await asyncio.to_thread(tracer_provider.shutdown)
            await asyncio.to_thread(meter_provider.shutdown)
        return self.acts

    async def _play(
        self,
        scene: Scene,
        http: aiohttp.ClientSession,
        tracer_provider: TracerProvider,
        meter_provider: MeterProvider,
    ) -> Act:
        async with OpenAISimulator(scene.script) as server:
            model = traced_retry.wrap(
                openai.realtime.RealtimeModel(
                    api_key="a-key-for-the-simulator",
                    base_url=server.url,
                    modalities=["text"],
                    http_session=http,
                    conn_options=APIConnectOptions(retry_interval=0.1),
                ),
                # As in production, where each call is a process with a budget of its own.
                policy=replace(POLICY, budget=traced_retry.RetryBudget()),
                meter_provider=meter_provider,
            )
            session: AgentSession[None] = AgentSession(llm=model)
            await session.start(Agent(instructions="Be brief."))
            await server.wait_for("connected")
            handle = session.generate_reply(instructions="Say hello.")
            if scene.interrupt_after is not None:
                await asyncio.sleep(scene.interrupt_after)
                await handle.interrupt()
            await handle
            await asyncio.sleep(scene.linger)
            said = [i.text_content for i in session.history.items if i.type == "message"]
            await session.aclose()
            requests = len(server.requests)
        await asyncio.to_thread(tracer_provider.force_flush)
        replies = await asyncio.to_thread(read, self.store)
        heard = sum(text is not None and text.startswith("reply ") for text in said)
        return Act(scene, replies[-1], requests, heard)


def play(
    store: Path,
    on_scene: Callable[[Scene], None] = lambda _: None,
    on_act: Callable[[Act], None] = lambda _: None,
) -> tuple[list[Act], float]:
    """Run the demo; returns its acts and how many seconds it took."""
    began = time.monotonic()
    acts = asyncio.run(Demo(store, on_scene, on_act).run())
    return acts, time.monotonic() - began
