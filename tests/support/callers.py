# SPDX-License-Identifier: Apache-2.0
"""Calls in job processes of their own, with OpenAI's real plugin, forked as LiveKit forks jobs."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from dataclasses import asdict, dataclass

import aiohttp
from livekit.agents import llm
from livekit.plugins import openai
from support.fresh import _context

import traced_retry

PAUSE = 1.5
"""Seconds between the end of a reply and the next request."""


@dataclass
class Asked:
    """One reply, as its process reports it."""

    process: int
    began: float
    """The system's monotonic time in seconds."""
    seconds: float
    """The time until it was heard, or until the waiting code got the error."""
    stop_reason: str | None = None
    notified: float = 0.0
    """Seconds until ``on_exhausted`` was called."""


class Callers:
    """Job processes that request replies from a server all the time.

    Use it as an async context manager. All processes are killed at the end. ``breaker`` is the path
    of the breaker's file, or None.
    """

    def __init__(self, number, url, breaker, *, pause=PAUSE):
        self.replies = []
        """Every reply that has ended."""
        self._arguments = url, None if breaker is None else str(breaker), pause
        self._number = number
        self._processes = []
        self._changed = asyncio.Event()
        self._text = b""

    async def __aenter__(self):
        self._here, there = _context.Pipe(duplex=False)
        os.set_blocking(self._here.fileno(), False)
        asyncio.get_running_loop().add_reader(self._here.fileno(), self._read)
        for number in range(self._number):
            process = _context.Process(target=_run, args=(number, there, *self._arguments))
            process.start()
            self._processes.append(process)
        there.close()
        return self

    async def __aexit__(self, *_):
        asyncio.get_running_loop().remove_reader(self._here.fileno())
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        self._here.close()

    def send(self, number, signal_):
        """Send a signal to one process."""
        os.kill(self._processes[number].pid, signal_)

    async def until(self, condition):
        """Wait until the condition holds. It is checked at each reply."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def _read(self):
        self._text += os.read(self._here.fileno(), 1 << 16)
        *lines, self._text = self._text.split(b"\n")
        self.replies += [Asked(**json.loads(line)) for line in lines]
        self._changed.set()


def _run(number, there, url, breaker, pause):
    logging.disable(logging.CRITICAL)
    asyncio.run(_talk(number, there.fileno(), url, breaker, pause))


async def _talk(number, pipe, url, breaker, pause):
    now = asyncio.get_running_loop().time
    failed = []
    async with aiohttp.ClientSession() as http:
        model = openai.realtime.RealtimeModel(
            api_key="sk-SECRET", base_url=url, http_session=http, modalities=["text"]
        )
        traced_retry.wrap(
            model,
            policy=traced_retry.RetryPolicy(breaker=breaker),
            on_exhausted=lambda reply: failed.append((reply.stop_reason, now())),
        )
        session = model.session()
        while True:
            asked = Asked(number, now(), 0.0)
            try:
                await _hear(await session.generate_reply())
                asked.seconds = now() - asked.began
            except llm.RealtimeError:
                asked.seconds = now() - asked.began
                await asyncio.sleep(0)  # The callback runs one turn of the event loop later.
                asked.stop_reason, at = failed.pop()
                asked.notified = at - asked.began
            os.write(pipe, json.dumps(asdict(asked)).encode() + b"\n")
            await asyncio.sleep(pause)


async def _hear(generation):
    async for message in generation.message_stream:
        async for _ in message.text_stream:
            pass
