# SPDX-License-Identifier: Apache-2.0
"""A job process, as LiveKit makes one per call: forked from a server that has all imported."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from dataclasses import dataclass, field
from types import SimpleNamespace

POLICY = {"max_retries": 2, "base_delay": 0.05, "max_delay": 0.1, "deadline": 25.0}
"""Quick to try again, so that a failure takes no time; the rest is as it would be."""

PRELOAD = [
    "traced_retry.export.enable",
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.exporter.otlp.proto.http.metric_exporter",
    *(f"livekit.plugins.{name}" for name in ("openai", "xai", "google", "ultravox", "phonic")),
    "livekit.plugins.azure.realtime",
    "livekit.plugins.aws.experimental.realtime",
    # What plugins and we import only when a session begins: else many processes do so at once, and
    # a first reply takes seconds.
    *(f"traced_retry.livekit.{name}" for name in ("openai", "google", "ultravox", "phonic")),
    *("traced_retry.livekit.azure", "traced_retry.livekit.aws", "traced_retry.simulator.aws"),
    *("phonic.conversations.client", "httpcore", "httpcore2", "h11", "anyio._backends._asyncio"),
]


@dataclass(frozen=True)
class Job:
    """What one process does.

    Attributes:
        provider: a name of ``traced_retry.simulator.PROVIDERS``.
        replies: how many it asks for, one after the other.
        texts: how many it has spoken as they are, before that, by a plugin that can.
        turns: how many turns of the caller the provider answers by itself, after that.
        pause: seconds between two of them.
        patience: seconds that an attempt may take. No less than a busy machine needs, for an answer
            that comes later is another outcome.
        budget: how many retries it may send at once; None: any number.
        url: of its simulator.
        ca: the certificate that vouches for it; AWS's client trusts that alone.
        environment: the variables it reads, ``OTEL_*`` among them.
    """

    provider: str
    replies: int = 1
    texts: int = 0
    turns: int = 0
    pause: float = 0.0
    patience: float = 8.0
    budget: float | None = None
    url: str = ""
    ca: bytes = b""
    environment: dict[str, str] = field(default_factory=dict)


def run(job, caller=None):
    """The process's main function.

    Args:
        job: as above.
        caller: a semaphore that is released each time the caller should speak.
    """
    os.environ.update(job.environment)
    asyncio.run(_call(job, caller))


async def _call(job, caller):
    import aiohttp
    from livekit.agents import Agent, AgentSession

    import traced_retry
    from traced_retry.core.budget import RetryBudget

    budget = RetryBudget(job.budget) if job.budget else None
    policy = traced_retry.RetryPolicy(attempt_timeout=job.patience, budget=budget, **POLICY)
    traced_retry.enable(policy=policy)
    with contextlib.ExitStack() as stack:
        async with aiohttp.ClientSession() as http:
            session = AgentSession(llm=_model(job, http, stack))
            await session.start(Agent(instructions="Be brief."))
            for _ in range(job.texts):
                await session.say("Good morning.")
            for _ in range(job.replies):
                with contextlib.suppress(Exception):  # what fails is counted, not raised
                    await session.generate_reply(instructions="Say hello.")
                await asyncio.sleep(job.pause)
            for _ in range(job.turns):
                answer = asyncio.get_running_loop().create_future()
                session.once("speech_created", lambda event, to=answer: to.set_result(event))
                caller.release()
                speech = (await answer).speech_handle
                with contextlib.suppress(Exception):
                    await speech
            await session.aclose()


def _model(job, http, stack):  # noqa: PLR0911 - a provider each
    from livekit.agents import APIConnectOptions

    fast = APIConnectOptions(max_retry=3, retry_interval=0.2, timeout=5.0)
    openai_like = {"api_key": "sk-x", "http_session": http, "modalities": ["text"]}
    if job.provider == "openai":
        from livekit.plugins import openai

        return openai.realtime.RealtimeModel(base_url=job.url, conn_options=fast, **openai_like)
    if job.provider == "azure-openai":
        from livekit.plugins import openai

        return openai.realtime.RealtimeModel.with_azure(
            azure_deployment="deployed", azure_endpoint=job.url, **openai_like
        )
    if job.provider == "xai":
        from livekit.plugins import xai

        return xai.realtime.RealtimeModel(
            api_key="x", base_url=job.url, http_session=http, conn_options=fast
        )
    if job.provider == "azure-voicelive":
        from livekit.plugins.azure import realtime

        return realtime.RealtimeModel(
            api_key="x", endpoint=job.url, modalities=["text"], conn_options=fast
        )
    if job.provider == "aws":
        from livekit.plugins.aws.experimental.realtime import RealtimeModel

        from traced_retry.simulator.aws import AWSSimulator

        there = SimpleNamespace(url=job.url, ca=job.ca)  # it runs in another process
        stack.enter_context(AWSSimulator.redirected(there))
        return RealtimeModel()
    if job.provider == "google":
        from google.genai import types
        from livekit.plugins import google

        # The simulator's certificate is made by another process, at its start.
        unverified = ssl._create_unverified_context()
        return google.realtime.RealtimeModel(
            api_key="x",
            modalities=[types.Modality.TEXT],
            http_options=types.HttpOptions(base_url=job.url, async_client_args={"ssl": unverified}),
        )
    if job.provider == "ultravox":
        from livekit.plugins import ultravox

        return ultravox.realtime.RealtimeModel(
            api_key="x", base_url=job.url, http_session=http, output_medium="text"
        )
    from livekit.plugins import phonic

    from traced_retry.simulator.phonic import redirected

    stack.enter_context(redirected(job.url))
    return phonic.realtime.RealtimeModel(api_key="x")
