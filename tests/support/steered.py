# SPDX-License-Identifier: Apache-2.0
"""An OpenAI server that answers only on the command of a test."""

from __future__ import annotations

from aiohttp import WSCloseCode

from traced_retry.simulator import OpenAISimulator
from traced_retry.simulator._openai_protocol import OpenAIConnection, output_position


class SteeredServer(OpenAISimulator):
    """A server like any simulator. ``connection`` is the current one, or None."""

    def __init__(self):
        super().__init__()
        self.connection = None
        self.heard = 0
        """Requests for a reply that came, rejected ones included."""
        self.willing = 0
        """How many of the next requests it answers at once and to the end."""

    def connect(self, ws, http):
        """Keep a connection that was just accepted."""
        self.connection = SteeredConnection(self, ws, "gpt-realtime")
        return self.connection

    @property
    def waiting(self):
        """Return the requests that can be answered: none during a response, as with OpenAI."""
        here = self.connection
        return [] if here is None or here.active else here.waiting

    @property
    def active(self):
        """Return the active response."""
        return None if self.connection is None else self.connection.active

    async def drop(self, down):
        """Close the connection, and refuse others for some seconds."""
        here, self.connection = self.connection, None
        self.go_down(down)
        await here.hang_up(WSCloseCode.INTERNAL_ERROR, by_script=True)


class SteeredConnection(OpenAIConnection):
    """The connection of one client. Each word carries a tag with its request.

    The tag of the seventh request, with instructions that end with the line ``2``, is ``2.7``.
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
        """Keep a request, or reject it if a response is active."""
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
        """Serve the client until it leaves."""
        try:
            await super().run()
        finally:
            if self.server.connection is self:
                self.server.connection = None

    async def begin_to_answer(self, which, message):
        """Begin the response to that request, with an empty message if ``message`` is set."""
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
        """Send the tag as a word. This and the next methods need an active response."""
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
        """Complete the response, with a word if there is none."""
        if self.active and not self.spoke:
            await self.say()
        if self.active:
            await self.end_output(self.active)
            await self.finish(self.active, "completed")

    async def fail(self, code):
        """End the response as failed with that code, or as ``incomplete`` or ``cancelled``."""
        if not self.active:
            return
        if code == "incomplete":
            await self.finish(self.active, code, reason="content_filter")
        elif code == "cancelled":
            await self.finish(self.active, code, reason="turn_detected")
        else:
            await self.finish(self.active, "failed", error={"type": code, "code": code})

    async def reject_one(self, which, code):
        """Reject that request with that code, or with a server error without a code."""
        event = self.waiting.pop(which % len(self.waiting))
        kind = code or "server_error"
        await self.reject(event["event_id"], code, "Please try again in 1.5s.", kind)
