# SPDX-License-Identifier: Apache-2.0
"""A ``_do_generate_reply``-like function that does what a script says, call by call."""

from __future__ import annotations

import asyncio

HANG = object()
SUPERSEDED = object()


class ProviderError(Exception):
    """What a provider's client raises: a code, and maybe how long to wait."""

    def __init__(self, code=None, *, retry_after=None, message="SECRET transcript and sk-key"):
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


class Scripted:
    """Each call does the next step; the last one repeats.

    A step is an exception (raised), ``HANG`` (never resolves), ``SUPERSEDED`` (the provider
    cancels it), ``(seconds, step)`` (that step, later) or else the value of the reply.
    """

    def __init__(self, *steps):
        self.steps = steps
        self.calls = 0
        self.futures = []
        self.times = []

    def _step(self):
        loop = asyncio.get_running_loop()
        self.times.append(loop.time())
        step = self.steps[min(self.calls, len(self.steps) - 1)]
        self.calls += 1
        return loop, step

    def future(self) -> asyncio.Future:
        """As LiveKit's plugins: a plain function that returns a future."""
        loop, step = self._step()
        future = loop.create_future()
        self.futures.append(future)
        seconds, step = step if isinstance(step, tuple) else (0, step)
        if step is not HANG:
            loop.call_later(seconds, self._resolve, future, step)
        return future

    async def coroutine(self):
        """The same as an async function."""
        return await self.future()

    @property
    def cancelled(self):
        """How many of the futures handed out were cancelled."""
        return sum(future.cancelled() for future in self.futures)

    @staticmethod
    def _resolve(future, step):
        if future.done():
            return
        if step is SUPERSEDED:
            future.cancel()
        elif isinstance(step, BaseException):
            future.set_exception(step)
        else:
            future.set_result(step)
