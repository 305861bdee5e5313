# SPDX-License-Identifier: Apache-2.0
"""Mutated server events: whatever shape an event has, we are not worse than the plugin alone.

One field of one valid event is replaced by a value of another type, or is left out. The plugin
alone and the plugin with us get the same event. The virtual clock makes all times exact.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import json
import os
import random
from dataclasses import dataclass, field

import aiohttp
import pytest
from aiohttp import web
from livekit.agents import llm
from support.conversation import now
from support.providers import CONN_OPTIONS, KEY, PROVIDERS
from support.recorder import Recorder
from support.stepped import VARIABLE

import traced_retry
from traced_retry import RetryPolicy
from traced_retry.core import guard
from traced_retry.simulator.script import Script

WORDS = {
    "openai": (
        *("ok", "slow:1", "tool:look_up", "error:server_error", "rate_limit", "failed"),
        *("failed_later", "failed_message", "failed_during", "incomplete", "empty"),
    ),
    "voicelive": ("ok", "slow:1", "tool:look_up", "error:server_error", "failed", "failed_later"),
    "google": ("ok", "slow:1", "tool:look_up", "incomplete", "empty", "rate_limit"),
    "ultravox": ("ok", "slow:1", "tool:look_up"),
    "phonic": ("ok", "slow:1", "tool:look_up", "error:internal_error"),
    "aws": ("ok", "slow:1"),
}
"""The first element of the script, by provider. The second is ``ok``."""
EVENTS = 100
"""Mutated events per provider."""
SHARES = {"aws": 0.05}
"""AWS's client has threads of its own, so its clock is slow, and it gets fewer events."""
VALUES = (None, True, 0, -1, 429, 1.5, 10**30, "", "x", "429", [], [None], ["x"], {}, {"x": None})
GREETING = "the start of a session"
GREETINGS = 0.1
"""Part of the events that the server sends before the first request."""
DEADLINE = 20.0
BOUND = 61.0
"""Seconds after the deadline by which a reply has ended that was cut off in its middle."""


class Mutator:
    """Mutates event number ``target`` of a trial on its way to the client."""

    def __init__(self):
        self.rng = None
        self.target = 0
        self.sent = 0

    def start(self, seed, target):
        """Count the events from now on."""
        self.rng, self.target, self.sent = random.Random(seed), target, 0

    def mutate(self, text):
        """Return the event, or its mutation."""
        self.sent += 1
        if self.sent != self.target:
            return text
        try:
            event = json.loads(text)
        except ValueError:  # The fault ``malformed``.
            return text
        holder, key = self.rng.choice(list(_places(event)))
        if self.rng.random() < 0.2:
            del holder[key]
        else:
            holder[key] = self.rng.choice(VALUES)
        return json.dumps(event)


def _places(value):
    """Each (container, key) inside ``value``."""
    keys = value if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


@pytest.fixture
def mutator(monkeypatch):
    """Mutate each simulator's events: text frames, and the JSON in Bedrock's frames."""
    mutator = Mutator()
    send_str = web.WebSocketResponse.send_str

    async def send(self, data, compress=None):
        await send_str(self, mutator.mutate(data), compress)

    monkeypatch.setattr(web.WebSocketResponse, "send_str", send)
    with contextlib.suppress(ImportError):
        from traced_retry.simulator import aws

        send_frame = aws._Session.send_frame

        def send_bedrock(self, headers, payload):
            if headers[":message-type"] == "event":
                event = base64.b64decode(json.loads(payload)["bytes"]).decode()
                mutated = base64.b64encode(mutator.mutate(event).encode()).decode()
                payload = json.dumps({"bytes": mutated}).encode()
            send_frame(self, headers, payload)

        monkeypatch.setattr(aws._Session, "send_frame", send_bedrock)
    return mutator


@dataclass
class Result:
    """What became of one reply."""

    error: BaseException | None = None
    texts: list = field(default_factory=list)
    calls: int = 0
    seconds: float = 0.0
    """From the request until its future was done."""
    pending: bool = False
    """Whether the future was not done in time."""
    hung: bool = False
    """Whether a stream never ended."""

    @property
    def replies(self):
        """The number of replies that were heard, whole or in part."""
        return "".join(self.texts).count("reply")

    @property
    def whole(self):
        """Whether a reply was heard to its end, or a tool was called."""
        return bool(self.calls) or any(text[-1:].isdigit() for text in self.texts)

    @property
    def clean(self):
        """Whether the session is as it was before."""
        return self.error is None and len(self.texts) == 1 and not (self.calls or self.hung)


class Side:
    """The plugin, with us or alone, and its server."""

    def __init__(self, provider, recorder):
        self.provider = provider
        self.recorder = recorder
        self.session = None
        self.streams = set()
        self.reading = []

    async def open(self, stack):
        """Start the server."""
        self.server = await stack.enter_async_context(self.provider.simulator("ok"))
        self.http = await stack.enter_async_context(aiohttp.ClientSession())
        stack.push_async_callback(self.close)

    async def start(self):
        """Begin another session."""
        await self.close()
        with self.provider.redirected(self.server):
            model = self.provider.model(
                api_key=KEY,
                http_session=self.http,
                conn_options=CONN_OPTIONS,
                **self.provider.address(self.server),
            )
            if self.recorder is not None:
                policy = RetryPolicy(deadline=DEADLINE, budget=None)
                traced_retry.wrap(model, policy=policy, **self.recorder.providers)
            self.session = model.session()
            self.session.on("generation_created", self._read)
            await self.session.update_instructions("SECRET")
            await self.session.update_tools([])
            await asyncio.sleep(1)

    async def close(self):
        """End the session. The plugin raises there again what ended it."""
        session, self.session = self.session, None
        for task in self.reading:
            task.cancel()
        await asyncio.gather(*self.reading, return_exceptions=True)
        self.reading = []
        if session is not None:
            await asyncio.gather(session.aclose(), return_exceptions=True)
        if stream := getattr(session, "_stream_response", None):
            # AWS's plugin leaves its stream open after a failure, and with the stream a thread.
            await stream.input_stream.close()
            del session, stream
            gc.collect()  # The thread ends with the session, which is cyclic garbage.

    def _read(self, event):
        # AWS's plugin announces the same streams several times.
        if id(event.message_stream) not in self.streams:
            self.streams.add(id(event.message_stream))
            self.reading.append(asyncio.ensure_future(self._texts(event)))
            self.reading.append(asyncio.ensure_future(self._calls(event)))

    async def _texts(self, event):
        words = []
        try:
            async for message in event.message_stream:
                words.extend([text async for text in message.text_stream])
        finally:
            if any(words):
                self.result.texts.append("".join(words))

    async def _calls(self, event):
        async for _ in event.function_stream:
            self.result.calls += 1

    async def reply(self, word):
        """Request one reply, which meets that element of the script."""
        self.server.script, self.server._position = Script.parse(f"{word},ok"), 0
        self.result, began = Result(), now()
        self.streams.clear()
        future = self.session.generate_reply(instructions="SECRET")
        await asyncio.wait([future], timeout=DEADLINE + 0.01)
        self.result.seconds = now() - began
        self.result.pending = not future.done()
        if future.done():
            self.result.error = (
                asyncio.CancelledError() if future.cancelled() else future.exception()
            )
        await self._finish()
        return self.result

    async def _finish(self):
        """Wait for the end of the streams, and for a late reply if there was no clean one."""
        if self.reading:
            _, pending = await asyncio.wait(self.reading, timeout=DEADLINE + BOUND)
            self.result.hung = bool(pending)
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        self.reading = []
        # The last events of a reply come after its end, and the plugin may connect again.
        await asyncio.sleep(2 if self.result.clean else BOUND)


def problems(ours, alone):
    """Return how we are worse than the plugin alone."""
    found = []
    heard = bool(alone.texts or alone.calls)
    if ours.pending:
        found.append("the future is still open")
    if ours.error is not None and not isinstance(
        ours.error, (llm.RealtimeError, asyncio.CancelledError)
    ):
        found.append(f"the agent got {ours.error!r}")
    if ours.hung and not alone.hung:
        found.append("a stream never ended")
    if heard and not (ours.texts or ours.calls):
        found.append("the reply was lost")
    if heard and alone.error is None and ours.error is not None:
        found.append("the reply failed")
    if alone.whole and alone.error is None and ours.seconds > alone.seconds + 0.01:
        found.append(f"the reply took {ours.seconds} s instead of {alone.seconds} s")
    if ours.replies > max(1, alone.replies):
        found.append("a reply was heard twice")
    return found


@pytest.mark.parametrize("name", WORDS)
async def test_mutated_event_is_no_worse_than_with_plugin_alone(name, mutator, caplog):
    """The reply is heard or fails in time, is never heard twice, and leaves nothing open."""
    caplog.set_level("CRITICAL")
    provider, recorder = PROVIDERS[name], Recorder()
    events = int(int(os.environ.get(VARIABLE, EVENTS)) * SHARES.get(name, 1))
    rng = random.Random(os.environ.get("TRACED_RETRY_SEED", "big"))
    failed = []
    async with contextlib.AsyncExitStack() as stack:
        alone, ours = Side(provider, None), Side(provider, recorder)
        for side in (alone, ours):
            await side.open(stack)
        lengths = {}
        for word in WORDS[name]:
            mutator.start(0, 0)
            await alone.start()
            lengths[GREETING] = mutator.sent
            mutator.start(0, 0)
            await alone.reply(word)
            lengths[word] = mutator.sent
        await alone.close()
        gc.freeze()  # The collection after each session then passes over all imported modules.
        stack.callback(gc.unfreeze)
        clean = False
        for number in range(events):
            seed, word = rng.random(), rng.choice(WORDS[name])
            mutated = GREETING if rng.random() < GREETINGS and lengths[GREETING] else word
            target = rng.randint(1, lengths[mutated])
            results = []
            for side in (ours, alone):
                mutator.start(seed, target)
                if mutated == GREETING or not clean:
                    await side.start()
                if mutated != GREETING:
                    mutator.start(seed, target)
                results.append(await side.reply(word))
            clean = all(result.clean for result in results)
            found = problems(*results)
            if recorder.open_spans:
                await asyncio.sleep(BOUND)
            if recorder.open_spans:
                found.append("a span is open")
            found += [message for message in guard._logged if " raised " in message]
            guard._logged.clear()
            if found:
                failed.append((number, mutated, target, found, *results))
                clean = False
    recorder.shutdown()
    assert not failed, "\n".join(map(str, failed))
