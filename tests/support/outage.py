# SPDX-License-Identifier: Apache-2.0
"""A provider that is down for ten minutes, on a clock that jumps: what a budget makes of it."""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass

from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.trace import NoOpTracerProvider
from support.scripted import ProviderError

from traced_retry import RetryPolicy
from traced_retry.core.loop import Reply
from traced_retry.core.request import CallRequest
from traced_retry.core.telemetry import Target, Telemetry
from traced_retry.testing.clock import VirtualClockLoop

DOWN = 600.0
"""Seconds that every request fails: half of them at once, half after five seconds of silence."""
BLIPS = 0.05
"""The share of requests that fail in the ten minutes after that."""


@dataclass
class Told:
    """What became of it."""

    replies: int = 0
    """Asked during the outage."""
    requests: int = 0
    """Sent for those."""
    refilled: float | None = None
    """Seconds from the end of the outage until the bucket was full."""
    blips: int = 0
    """Replies after the outage that needed a retry, ..."""
    recovered: int = 0
    """... and those of them that were heard."""


async def _live_through(budget, replies, seed):
    rng, told = random.Random(seed), Told()
    loop = asyncio.get_running_loop()
    telemetry = Telemetry(NoOpTracerProvider(), NoOpMeterProvider())
    policy = RetryPolicy(budget=budget)

    def request(asked_in_outage, tries):
        future = loop.create_future()
        told.requests += asked_in_outage
        tries.append(loop.time())
        down = loop.time() < DOWN
        if down and rng.random() < 0.5:
            loop.call_later(5.0, _fail, future, "server_error")
        elif down or rng.random() < BLIPS:
            _fail(future, "server_error")
        else:
            future.set_result("hello")
        return future

    async def ask(outage):
        began, tries = loop.time(), []
        told.replies += outage
        call = CallRequest(lambda: request(outage, tries))
        reply = Reply(call, policy, telemetry.reply(Target("openai")), jitter=_drawn(rng))
        try:
            await reply.start()
            heard = True
        except ProviderError:
            heard = False
        if not outage and began > DOWN + 20:  # what began before may have met the outage
            told.blips += len(tries) > 1 or not heard
            told.recovered += len(tries) > 1 and heard

    tasks = []
    for number in range(2 * replies):
        tasks.append(asyncio.ensure_future(ask(number < replies)))
        await asyncio.sleep(DOWN / replies)
        after = loop.time() - DOWN
        full = budget is not None and budget.remaining()["openai"] >= budget.capacity
        if told.refilled is None and after > 0 and full:
            told.refilled = after
    await asyncio.gather(*tasks)
    return told


def _fail(future, code):
    if not future.done():
        future.set_exception(ProviderError(code))


def _drawn(rng):
    return lambda bound: rng.uniform(0, bound)


def live_through(budget, *, replies=10_000, seed=1):
    """Ask ``replies`` evenly over the outage, and as often after it; what became of them."""
    loop = VirtualClockLoop()
    logger = logging.getLogger("traced_retry")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # ten thousand failures are not worth reading
    try:
        return loop.run_until_complete(_live_through(budget, replies, seed))
    finally:
        logger.setLevel(level)
        loop.close()
