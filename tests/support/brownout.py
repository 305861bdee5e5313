# SPDX-License-Identifier: Apache-2.0
"""Calls to a provider that fails a share of its requests, with the breaker and without it."""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass, field

from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.trace import NoOpTracerProvider
from support.scripted import ProviderError

from traced_retry import RetryBudget, RetryPolicy
from traced_retry.core import breaker
from traced_retry.core.breaker import CircuitOpenError
from traced_retry.core.failure import failure
from traced_retry.core.loop import Reply
from traced_retry.core.request import CallRequest
from traced_retry.core.telemetry import Target, Telemetry
from traced_retry.testing.clock import VirtualClockLoop

PAUSE = 5.0
"""Mean seconds between the end of a reply and the caller's next words."""
SPOKEN = 3.0
"""Mean seconds that a reply is spoken, until the caller can ask the next one."""
LATENCY = (0.4, 1.2)
"""Seconds to the first output of a good reply, drawn evenly."""
TIME_OUT = 5.0
"""Seconds after which a silent attempt fails. The other failures are reported at once."""


@dataclass
class Result:
    """The replies from the start of the failures to their end."""

    replies: int = 0
    heard: int = 0
    refused: int = 0
    """Replies that failed at once because the circuit was open."""
    silence: list[float] = field(default_factory=list)
    """Seconds until the failure of each reply that was lost."""
    requests: list[float] = field(default_factory=list)
    """Seconds from the start of the failures to each request."""
    opened: float | None = None
    """Seconds from the start of the failures to the first refused reply."""
    closed: float = 0.0
    """Seconds from the end of the failures to the last refused reply, or 0 if there is none."""

    @property
    def share(self):
        """The share of the replies that were heard."""
        return self.heard / self.replies


def seen_by(path, number):
    """Return the setting for which this process opens the file as another process would."""
    return f"{path.parent}/{'./' * number}{path.name}"


def open_circuit(path, key, now):
    """Have two other processes fail until ``now``, so that the circuit of ``key`` opens."""
    others = [breaker.circuit(seen_by(path, number), *key) for number in (98, 99)]
    failed = failure(ProviderError("server_error"), "server_error")
    for number in range(breaker.FAILURES):
        others[number % 2].fail(failed, now - breaker.SPAN, now)
    assert others[0].is_open(now)


class _Calls:
    """The calls, and the provider that they share."""

    def __init__(self, loop, seed, failing, silent, seconds):
        self.loop = loop
        self.rng = random.Random(seed)
        self.failing, self.silent = failing, silent
        self.began = loop.time() + 30  # The calls talk for a while before the failures begin.
        self.ends = self.began + seconds
        self.result = Result()
        self.telemetry = Telemetry(NoOpTracerProvider(), NoOpMeterProvider())

    def request(self):
        """Answer a request, or fail it."""
        now, future = self.loop.time(), self.loop.create_future()
        bad = self.began <= now < self.ends
        if bad:
            self.result.requests.append(now - self.began)
        if not bad or self.rng.random() >= self.failing:
            self.loop.call_later(self.rng.uniform(*LATENCY), _succeed, future)
        elif self.rng.random() < self.silent:
            self.loop.call_later(TIME_OUT, _fail, future, TimeoutError("timed out"))
        else:
            self.loop.call_later(0.1, _fail, future, ProviderError("server_error"))
        return future

    async def ask(self, policy):
        """Ask for a reply, and listen to it."""
        at, result = self.loop.time(), self.result
        counts = self.began <= at < self.ends - 20  # Later ones may be heard after the end.
        result.replies += counts
        trace = self.telemetry.reply(Target("openai"))
        request = CallRequest(self.request)
        try:
            await Reply(request, policy, trace, jitter=lambda b: self.rng.uniform(0, b)).start()
            result.heard += counts
            await asyncio.sleep(self.rng.expovariate(1 / SPOKEN))
        except CircuitOpenError:
            result.refused += counts
            result.opened = result.opened or at - self.began
            result.closed = max(result.closed, at - self.ends)
            result.silence += [self.loop.time() - at] * counts
        except (ProviderError, TimeoutError):
            result.silence += [self.loop.time() - at] * counts

    async def call(self, policy):
        """Ask again and again, with pauses."""
        await asyncio.sleep(self.rng.uniform(0, PAUSE + SPOKEN))
        while self.loop.time() < self.ends + 30:
            await self.ask(policy)
            await asyncio.sleep(self.rng.expovariate(1 / PAUSE))

    async def run(self, policies):
        """Make one call with each policy."""
        await asyncio.gather(*map(self.call, policies))
        return self.result


def _fail(future, error):
    if not future.done():
        future.set_exception(error)


def _succeed(future):
    if not future.done():
        future.set_result("hello")


def live_through(path, *, calls, failing, seconds, seed=1, silent=0.5, budget=RetryBudget):
    """Play ``calls`` calls, and return the result.

    ``path`` is the breaker's file, or None without a breaker. ``failing`` is the share of the
    requests that fail for ``seconds``, and ``silent`` the share of these that fail by time-out.
    ``budget`` makes the retry budget of each call.
    """
    loop = VirtualClockLoop()
    logger = logging.getLogger("traced_retry")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    policies = [
        RetryPolicy(budget=budget(), breaker=None if path is None else seen_by(path, number))
        for number in range(calls)
    ]
    try:
        played = _Calls(loop, seed, failing, silent, seconds)
        return loop.run_until_complete(played.run(policies))
    finally:
        logger.setLevel(level)
        loop.close()
        breaker.forget()
