# SPDX-License-Identifier: Apache-2.0
"""Never run: mypy reads it, and so sees the public API as a user's code does."""

from __future__ import annotations

import asyncio
import dataclasses

from livekit.agents import JobContext, llm
from opentelemetry.trace import TracerProvider

import traced_retry


def classify(failure: traced_retry.Failure) -> traced_retry.Failure | None:
    """A user's own word on a failure."""
    if failure.code == "busy":
        return dataclasses.replace(failure, recoverable=True, retry_after=2.0)
    return None


def enable(ctx: JobContext) -> bool:
    """Every argument of enable."""
    traced_retry.enable()
    policy = traced_retry.RetryPolicy(budget=traced_retry.RetryBudget(25, per_reply=0.2))
    tracing: traced_retry.Tracing = traced_retry.enable(
        ctx, policy=policy, preset="jaeger", service_name="support", on_exhausted=on_exhausted
    )
    traced_retry.enable(on_waiting=on_waiting)
    traced_retry.enable(on_waiting=traced_retry.Filler("typing.ogg", pause=0))
    assert tracing.destination + ""
    return tracing.flush(1.0)


async def on_exhausted(failed: traced_retry.FailedReply) -> None:
    """An async callback."""
    code: str = failed.codes[-1]
    assert code + (failed.trace_id or "")
    assert failed.seconds + 1.0


async def on_waiting(waiting: traced_retry.WaitingReply) -> None:
    """An async callback."""
    assert waiting.seconds + 1.0
    assert waiting.provider + (waiting.model or "") + (waiting.trace_id or "")


def wrap(model: llm.RealtimeModel, provider: TracerProvider) -> llm.RealtimeModel:
    """Every argument of wrap."""
    policy = traced_retry.RetryPolicy(deadline=8, on_silence="listen", classify=classify)
    policy = dataclasses.replace(policy, breaker="auto")
    traced_retry.instrument(policy=policy)
    traced_retry.uninstrument()
    traced_retry.disable()
    return traced_retry.wrap(
        model, policy=policy, tracer_provider=provider, on_exhausted=on_exhausted
    )


@traced_retry.retry(provider="mine", policy=traced_retry.RetryPolicy.from_env())
async def ask(question: str) -> int:
    """Keeps its signature."""
    return len(question)


@traced_retry.retry(provider="mine", on=(ConnectionError, TimeoutError))
def ask_future(question: str) -> asyncio.Future[int]:
    """Likewise."""
    raise NotImplementedError


async def use() -> int:
    """The decorated functions' results are typed."""
    return await ask("hello") + await ask_future("hello")


class Session(traced_retry.RetryingRealtimeSession):
    """A plugin author's session."""

    resend_after_timeout = True

    def _do_generate_reply(self, *, instructions: str = "") -> asyncio.Future[int]:
        raise NotImplementedError
