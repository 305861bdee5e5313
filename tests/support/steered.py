# SPDX-License-Identifier: Apache-2.0
"""An OpenAI server that does nothing by itself: a test says what it answers, and when."""

from __future__ import annotations

from aiohttp import WSCloseCode

from traced_retry.simulator import OpenAISimulator
from traced_retry.simulator._openai_protocol import OpenAIConnection, output_position


class SteeredServer(OpenAISimulator):
    """Use it as any simulator; ``connection`` is the present one, None before and between."""

    def __init__(self):
        super().__init__()
        self.connection = None
        self.heard = 0
        """Requests for a reply that came, rejected ones included."""
        self.willing = 0
        """How many of the next requests it answers at once and to the end."""

    def connect(self, ws, http):
        """A connection just accepted."""
        self.connection = SteeredConnection(self, ws, "gpt-realtime")
        return self.connection

    @property
    def waiting(self):
        """The requests that it can answer: none while it answers one, as OpenAI's."""
        here = self.connection
        return [] if here is None or here.active else here.waiting

    @property
    def active(self):
        """The response under way."""
        return None if self.connection is None else self.connection.active

    async def drop(self, down):
        """Close the connection, and refuse others for so many seconds."""
        here, self.connection = self.connection, None
        self.go_down(down)
        await here.hang_up(WSCloseCode.INTERNAL_ERROR, by_script=True)


class SteeredConnection(OpenAIConnection):
    """One client. Whatever it says of a reply carries a tag: what was asked, and by which request.

    The tag of the seventh request, whose instructions end with the line ``2``, is ``2.7``.
    """

    def __init__(self, server, ws, model):
        super().__init__(server, ws, model)
        self.waiting = []
        """Requests that are not answered yet."""
        self.tag = ""
        """Of the response under way."""
        self.spoke = False
        """Whether that holds a word or a call."""

    async def begin(self, metadata):
        """Begin a response."""
        self.spoke = False
        return await super().begin(metadata)

    async def hear(self, event):
        """Keep a request; reject it where a response is active."""
        self.server.heard += 1
        event["number"] = self.server.heard
        if self.active is not None:
            code = "conversation_already_has_active_response"
            await self.reject(event["event_id"], code, "It is.")
            return
        self.waiting.append(event)
        if self.server.willing:
            self.server.willing -= 1
            await self.begin_to_answer(-1, message=True)
            await self.complete()

    async def run(self):
        """Serve the client; afterwards it is gone."""
        try:
            await super().run()
        finally:
            if self.server.connection is self:
                self.server.connection = None

    async def begin_to_answer(self, which, message):
        """Begin the response to that request; with a ``message``, which holds no word yet."""
        event = self.waiting.pop(which % len(self.waiting))
        params = event["response"]
        asked = (params.get("instructions") or "?").splitlines()[-1]
        self.tag = f"{asked}.{event['number']}"
        await self.begin(params["metadata"])
        if message:
            await self.begin_message(self.active)

    async def begin_its_own(self):
        """Begin a response to the caller's turn."""
        await self.send("input_audio_buffer.committed", item_id="item", previous_item_id=None)
        self.tag = "own"
        await self.begin(None)

    async def say(self):
        """A word: the tag. This and what follows do nothing where no response is under way."""
        if self.active and not self.active.item:
            await self.begin_message(self.active)
        if self.active and self.active.item["type"] == "message":
            self.spoke = True
            where = output_position(self.active)
            await self.send("response.output_text.delta", **where, delta=f"{self.tag} ")

    async def call(self, name):
        """Call a tool of that name, unless there is output already."""
        if self.active and not self.active.item:
            self.spoke = True
            await self.call_function(self.active, name)

    async def complete(self):
        """End the response well, with a word if there is none."""
        if self.active and not self.spoke:
            await self.say()
        if self.active:
            await self.end_output(self.active)
            await self.finish(self.active, "completed")

    async def fail(self, code):
        """End the response: failed with that code, or ``incomplete``, or ``cancelled``."""
        if not self.active:
            return
        if code == "incomplete":
            await self.finish(self.active, code, reason="content_filter")
        elif code == "cancelled":
            await self.finish(self.active, code, reason="turn_detected")
        else:
            await self.finish(self.active, "failed", error={"type": code, "code": code})

    async def reject_one(self, which, code):
        """Reject that request with that code; None: a server error without one."""
        event = self.waiting.pop(which % len(self.waiting))
        kind = code or "server_error"
        await self.reject(event["event_id"], code, "Please try again in 1.5s.", kind)
