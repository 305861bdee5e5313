# SPDX-License-Identifier: Apache-2.0
"""One agent that talks to one server, and the telemetry of it."""

from __future__ import annotations

import asyncio

from traced_retry import semconv


class Conversation:
    """A running AgentSession and its server."""

    def __init__(self, server, model, session):
        self.server = server
        self.model = model
        self.session = session
        self.errors = []
        self.closed = []
        session.on("error", self.errors.append)
        session.on("close", self.closed.append)
        self.generations = []
        self._realtime = session._activity._rt_session
        self._realtime.on("generation_created", self.generations.append)

    @property
    def realtime(self):
        """The plugin's session under the agent's."""
        return self._realtime

    @property
    def heard(self):
        """What the agent said, in order: the text of its messages."""
        items = self.session.history.items
        return [i.text_content for i in items if i.type == "message" and i.role == "assistant"]

    def ask(self, **kwargs):
        """Ask for a reply; returns its SpeechHandle."""
        return self.session.generate_reply(**kwargs)

    async def reply(self, **kwargs):
        """Ask for a reply and wait until it is over; returns its exception, if any."""
        handle = self.ask(**kwargs)
        await handle
        return handle.exception()

    async def timed_reply(self, **kwargs):
        """The same, with the seconds it took."""
        began = now()
        error = await self.reply(**kwargs)
        return error, round(now() - began, 3)

    async def received(self, requests=1):
        """Wait until the server has received this many requests."""
        await self.server.wait_for(lambda: len(self.server.requests) >= requests)

    async def ask_agent(self, **kwargs):
        """Ask for a reply and wait until the server has the request; returns the SpeechHandle."""
        before = len(self.server.requests)
        handle = self.ask(**kwargs)
        await self.received(before + 1)
        return handle

    async def ask_plugin(self, **kwargs):
        """Ask the plugin for a reply, wait for the server likewise, and return the future."""
        before = len(self.server.requests)
        reply = self.realtime.generate_reply(**kwargs)
        await self.received(before + 1)
        return reply

    async def settle(self, seconds=30.0):
        """Let time pass, so that a late reply is heard now."""
        await asyncio.sleep(seconds)


class NovaSonicConversation(Conversation):
    """A conversation with Nova Sonic."""

    @property
    def heard(self):
        """The agent's texts, without the empty message that LiveKit adds for each reply."""
        return [text for text in super().heard if text]

    def ask(self, **kwargs):
        """Ask for a reply, with instructions unless there are other arguments."""
        return super().ask(**(kwargs or {"instructions": "SECRET instructions"}))


async def configured(talk):
    """Wait until the server knows the session's configuration."""
    await talk.server.wait_for("connected")
    await asyncio.sleep(1.0)


class Calls(list):
    """A callback that keeps the argument of each call, and the time of each in ``at``."""

    def __init__(self):
        self.at = []

    def __call__(self, argument):
        self.append(argument)
        self.at.append(now())


def now():
    """The virtual clock, seconds."""
    return asyncio.get_running_loop().time()


def ended(recorder, initiator="agent"):
    """Outcome and stop reason of each reply with this initiator, or with any if it is None."""
    return [
        tuple(r.get(n) for n in (semconv.OUTCOME, semconv.STOP_REASON))
        for r in recorder.replies
        if initiator in (None, r[semconv.INITIATOR])
    ]


def actions(recorder, initiator="agent"):
    """The action of each attempt of such replies."""
    return [a[semconv.ACTION] for a in _attempts(recorder, initiator)]


def codes(recorder, initiator="agent"):
    """Error code, else error type, of each attempt of such replies; None for a success."""
    return [
        a.get(semconv.ERROR_CODE, a.get(semconv.ERROR_TYPE)) for a in _attempts(recorder, initiator)
    ]


def _attempts(recorder, initiator):
    return [a for a in recorder.attempts if initiator in (None, a[semconv.INITIATOR])]


def late(recorder):
    """How many late replies were counted."""
    return sum(recorder.points(semconv.METRIC_LATE_REPLIES).values())
