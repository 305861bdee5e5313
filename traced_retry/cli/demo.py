# SPDX-License-Identifier: Apache-2.0
"""The demo: a real AgentSession with LiveKit's OpenAI plugin talks to a server that fails.

Each conversation is one reply over a real WebSocket to a simulator on 127.0.0.1. Two independent
sources judge it: the server counts the requests it received, and the agent's chat history has the
replies that were heard.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import aiohttp
from livekit.agents import Agent, AgentSession, APIConnectOptions
from livekit.agents import telemetry as livekit_telemetry
from livekit.agents.voice import SpeechHandle
from livekit.plugins import openai

import traced_retry
from traced_retry.export.setup import StoreProviders, store_providers
from traced_retry.report import Reply, read
from traced_retry.simulator import OpenAISimulator

POLICY: Final = traced_retry.RetryPolicy(
    base_delay=0.4, max_delay=1.0, attempt_timeout=1.5, deadline=6.0
)
"""Short limits, so that the demo ends soon. The defaults suit a real call."""


@dataclass(frozen=True)
class Scenario:
    """One conversation of the demo."""

    script: str
    """The fault of each request: see ``traced-retry simulate --help``."""
    description: str
    """The same in words."""
    interrupt_after: float | None = None
    """Seconds until the caller starts to speak. With None the caller waits."""
    linger: float = 0.0
    """Seconds to keep the session open afterwards, for a late reply."""


SCENARIOS: Final = (
    Scenario("ok", "The provider answers."),
    Scenario("rate_limit:0.5,ok", "The provider is busy and names a wait."),
    Scenario("error:server_error,ok", "The provider reports an error."),
    Scenario("turn:failed,ok", "The caller speaks, and the provider's own reply fails."),
    Scenario("late:1.2,ok", "The answer is slow, but comes."),
    Scenario("late:2.2,ok", "The answer comes after the request was sent again.", linger=1.0),
    Scenario("drop_before,ok", "The connection is lost during the request."),
    Scenario("active:0.8,ok", "Another response is still active."),
    Scenario(
        "rate_limit:5", "The caller speaks during the wait before a retry.", interrupt_after=0.7
    ),
    Scenario("rate_limit", "The provider stays busy."),
    Scenario("quota", "The account is out of quota."),
    Scenario("failed_message,ok", "The response fails after its start, before its first word."),
)


@dataclass(frozen=True)
class ScenarioResult:
    """The result of one conversation."""

    scenario: Scenario
    reply: Reply
    """The reply in the store."""
    requests_sent: int
    """The requests that the server counted."""
    replies_heard: int
    """The replies in the agent's chat history."""

    def as_dict(self) -> dict[str, Any]:
        """Return the object that ``--json`` prints."""
        return {
            "provider": self.reply.provider,
            "script": self.scenario.script,
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
    """One run of the demo. Call :meth:`run` once.

    Args:
        store: the file that gets the spans.
        on_start: called with each scenario before it starts.
        on_result: called with each result.
    """

    store: Path
    on_start: Callable[[Scenario], None] = lambda _: None
    on_result: Callable[[ScenarioResult], None] = lambda _: None
    results: list[ScenarioResult] = field(default_factory=list)

    async def run(self, scenarios: tuple[Scenario, ...] = SCENARIOS) -> list[ScenarioResult]:
        """Run all scenarios, one after the other.

        Raises:
            ExportError: if the store or the ``OTEL_*`` variables cannot be used.
        """
        providers = store_providers(self.store, "traced-retry-demo")
        livekit_telemetry.set_tracer_provider(providers.tracer_provider, allow_pii=False)
        try:
            async with aiohttp.ClientSession() as http:
                for scenario in scenarios:
                    self.on_start(scenario)
                    # LiveKit's session leaves its span current, so each scenario has its own task.
                    running = self._run(scenario, http, providers)
                    self.results.append(await asyncio.create_task(running))
                    self.on_result(self.results[-1])
        finally:
            await asyncio.to_thread(providers.tracer_provider.shutdown)
            await asyncio.to_thread(providers.meter_provider.shutdown)
        return self.results

    async def _run(
        self, scenario: Scenario, http: aiohttp.ClientSession, providers: StoreProviders
    ) -> ScenarioResult:
        async with OpenAISimulator(scenario.script) as server:
            model = traced_retry.wrap(
                openai.realtime.RealtimeModel(
                    api_key="a-key-for-the-simulator",
                    base_url=server.url,
                    modalities=["text"],
                    http_session=http,
                    conn_options=APIConnectOptions(retry_interval=0.1),
                ),
                # In production each call is a process with its own budget.
                policy=replace(POLICY, budget=traced_retry.RetryBudget()),
                meter_provider=providers.meter_provider,
            )
            session: AgentSession[None] = AgentSession(llm=model)
            await session.start(Agent(instructions="Be brief."))
            await server.wait_for("connected")
            if scenario.script.startswith("turn:"):
                handle = await _speech_after(session, server.caller_speaks())
            else:
                handle = session.generate_reply(instructions="Say hello.")
            if scenario.interrupt_after is not None:
                await asyncio.sleep(scenario.interrupt_after)
                await handle.interrupt()
            await handle
            await asyncio.sleep(scenario.linger)
            said = [i.text_content for i in session.history.items if i.type == "message"]
            await session.aclose()
            requests = len(server.requests)
        # A flush of the whole provider would wait for a server that does not answer.
        await asyncio.to_thread(providers.store.force_flush)
        replies = await asyncio.to_thread(read, self.store)
        heard = sum(text is not None and text.startswith("reply ") for text in said)
        return ScenarioResult(scenario, replies[-1], requests, heard)


async def _speech_after(session: AgentSession[None], speaking: Awaitable[None]) -> SpeechHandle:
    """Let the caller speak, and return the handle of the reply that the provider starts."""
    created: asyncio.Future[SpeechHandle] = asyncio.get_running_loop().create_future()
    session.once("speech_created", lambda event: created.set_result(event.speech_handle))
    await speaking
    return await created


def run_demo(
    store: Path,
    on_start: Callable[[Scenario], None] = lambda _: None,
    on_result: Callable[[ScenarioResult], None] = lambda _: None,
) -> tuple[list[ScenarioResult], float]:
    """Run the demo, and return its results and its duration in seconds."""
    started = time.monotonic()
    results = asyncio.run(Demo(store, on_start, on_result).run())
    return results, time.monotonic() - started
