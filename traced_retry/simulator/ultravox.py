# SPDX-License-Identifier: Apache-2.0
"""An Ultravox server, text only, that fails on a script.

The protocol is that of livekit-plugins-ultravox 1.8.9: POST ``/api/calls`` returns a ``joinUrl``,
and its WebSocket carries states, transcripts and tool calls. Messages have neither request ids nor
errors. A server that gives up closes the call.
"""

from __future__ import annotations

import json
import uuid
from functools import partial
from typing import Any, ClassVar

from aiohttp import WSCloseCode, web

from traced_retry.simulator._say import SayScript, speak_scripted
from traced_retry.simulator.script import Fault, Script
from traced_retry.simulator.server import (
    Connection,
    OnEvent,
    Request,
    Simulator,
)

Event = dict[str, Any]

_REFUSALS = {"unauthorized": 401, "quota": 402, "rate_limit": 429}
"""The HTTP status of each fault that refuses the next call."""


class UltravoxSimulator(Simulator):
    """A server that plays a script to Ultravox clients. Pass ``url`` to them as base URL.

    A ``user_text_message`` without ``deferResponse`` requests a reply and takes one element. A
    tool's result does the same. So does the plugin's cancel, an empty immediate message without
    ``deferResponse``. It also counts in ``cancels``.

    The next POST that would create a call takes ``unauthorized``, ``quota`` and ``rate_limit``. A
    request that takes one of them in a call is not answered, and the call is closed.

    Args:
        script: a parsed script, or its text.
        host: only 127.0.0.1 is allowed.
        port: 0 picks a free one.
        on_event: called with "received" or "sent" and each JSON event; must not raise.
        thinks: report at once that the model is thinking, and delay only the answer. The plugin
            then creates the generation long before it is spoken.
        say: a separate script for the texts of each ``forced_agent_message``: ``ok``,
            ``silence``, ``late`` or ``drop_before``.
    """

    path = "/join"
    faults: ClassVar[frozenset[str]] = frozenset(
        {"ok", "silence", "late", "slow", "tool", "malformed", "drop_before", "drop_during"}
    ) | frozenset(_REFUSALS)

    def __init__(
        self,
        script: Script | str = "ok",
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        on_event: OnEvent | None = None,
        thinks: bool = False,
        say: Script | str = "ok",
    ) -> None:
        super().__init__(script, host=host, port=port, on_event=on_event)
        self.thinks = thinks
        self.say = SayScript(say, {"ok", "silence", "late", "drop_before"})

    @property
    def url(self) -> str:
        """Return ``http://127.0.0.1:PORT/api``. Raise RuntimeError unless the server is running."""
        return super().url + "/api"

    def add_routes(self, app: web.Application) -> None:
        """Add the route that creates a call. A client joins the call by WebSocket."""
        app.router.add_post("/api/calls", self._create_call)

    async def _create_call(self, http: web.Request) -> web.StreamResponse:
        fault = self.next_fault.name
        if fault in _REFUSALS:
            self.advance()
            return self._refuse(_REFUSALS[fault], "The script says so.", fault)
        join = super().url.replace("http", "ws", 1) + self.path
        return web.json_response({"callId": str(uuid.uuid4()), "joinUrl": join}, status=201)

    def connect(self, ws: web.WebSocketResponse, http: web.Request) -> Connection:
        """Create the server's side of a new call."""
        return _Call(self, ws)


class _Call(Connection):
    """A call. The script's next element decides about each request."""

    def __init__(self, server: UltravoxSimulator, ws: web.WebSocketResponse) -> None:
        super().__init__(ws)
        self.server = server
        self.ordinal = 0

    async def greet(self) -> None:
        await self.send("call_started", callId=str(uuid.uuid4()))
        await self.send("state", state="listening")

    async def send(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, **fields}
        await self.ws.send_str(json.dumps(event))
        self.server.record("sent", event)

    async def say(self, text: str, *, final: bool = False) -> None:
        words: Event = {"text": text} if final else {"delta": text}
        where = {"role": "agent", "medium": "text", "ordinal": self.ordinal}
        await self.send("transcript", **where, **words, final=final)

    async def receive(self, data: str) -> None:
        event = json.loads(data)
        self.server.record("received", event)
        kind = event.get("type")
        if kind == "user_text_message" and not event.get("deferResponse"):
            if event.get("urgency") == "immediate" and not event.get("text"):
                self.server.cancels.append(None)
            await self.hear(event)
        elif kind == "forced_agent_message":
            await speak_scripted(self, event["content"])
        elif kind == "client_tool_result" and event.get("agentReaction", "speaks") == "speaks":
            await self.hear({})

    async def hear(self, event: Event) -> None:
        fault = self.server.next_fault
        self.server.advance()
        request = self.server.take_request(fault, instructions=event.get("text"))
        await self.answer(request, fault)

    async def hear_caller(self, transcript: str | None) -> None:
        """Hear a turn of the caller, and answer it."""
        self.ordinal += 1
        where = {"role": "user", "medium": "voice", "ordinal": self.ordinal}
        await self.send("transcript", **where, text=transcript or "", final=True)
        turn = self.server.take_turn()
        assert turn.fault is not None
        await self.answer(turn, turn.fault)

    async def answer(self, request: Request, fault: Fault) -> None:
        """Play the element. "silence" has no effect."""
        match fault.name:
            case "ok":
                await self.reply(request)
            case "late":
                if self.server.thinks:
                    await self.send("state", state="thinking")
                self.after(fault.seconds, partial(self.reply, request))
            case "slow":
                await self.begin(request)
                self.after(fault.seconds, partial(self.end, request))
            case "tool":
                await self.send(
                    "client_tool_invocation",
                    toolName=fault.argument,
                    invocationId=str(uuid.uuid4()),
                    parameters={},
                )
            case "malformed":
                await self.ws.send_str("{this is not JSON")
            case "drop_during":
                await self.begin(request)
                await self.hang_up(WSCloseCode.INTERNAL_ERROR, by_script=True)
            case "drop_before" | "unauthorized" | "quota" | "rate_limit":
                await self.hang_up(WSCloseCode.INTERNAL_ERROR, by_script=True)

    async def speak(self, text: str) -> None:
        self.ordinal += 1
        await self.send("state", state="speaking")
        await self.say(text)
        await self.say(text, final=True)
        await self.send("state", state="listening")
        self.server.completed.append(text)
        self.server.wake()

    async def reply(self, request: Request) -> None:
        await self.begin(request)
        await self.end(request)

    async def begin(self, request: Request) -> None:
        self.ordinal += 1
        await self.send("state", state="thinking")
        await self.send("state", state="speaking")
        await self.say(request.answer.split()[0])

    async def end(self, request: Request) -> None:
        text = request.answer
        await self.say(f" {request.number}")
        await self.say(text, final=True)
        await self.send("state", state="listening")
        self.server.completed.append(text)
        self.server.wake()
