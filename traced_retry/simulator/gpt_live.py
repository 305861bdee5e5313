# SPDX-License-Identifier: Apache-2.0
"""A GPT-Live server that fails on a script.

The protocol is that of ``openai.realtime.GPTLiveModel`` in livekit-plugins-openai 1.8.9: one
WebSocket, one continuous stream of sound, and no responses. A request for a reply is a commentary
to speak. The server names it only in an error. A tool call comes from a backend model, and the
voice model speaks again once it has the result.
"""

from __future__ import annotations

import base64
import json
import uuid
from functools import partial
from typing import Any, ClassVar

from aiohttp import WSCloseCode, web

from traced_retry.simulator.script import Fault
from traced_retry.simulator.server import Connection, Request, Simulator

Event = dict[str, Any]

_RATE = 24
"""Samples per millisecond."""
_WORD_MS = 200
_PAUSE_MS = 1000
"""The silence after a reply. LiveKit takes 800 ms of it for the end."""
_LOUD = (3000).to_bytes(2, "little", signed=True)


class GPTLiveSimulator(Simulator):
    """A server that plays a script to GPT-Live clients. Pass ``url`` to them as base URL.

    Each ``session.commentary.append``, and each ``response.create`` after a tool's result, takes
    one element. ``error`` and ``rate_limit`` are errors that name the event. ``quota`` also ends
    the session.
    """

    path = "/live/sessions"
    faults: ClassVar[frozenset[str]] = frozenset(
        {"ok", "error", "uncorrelated", "rate_limit", "quota", "unauthorized", "silence", "late"}
    ) | frozenset({"slow", "tool", "malformed", "drop_before", "drop_during", "drop_queued"})

    def connect(self, ws: web.WebSocketResponse, http: web.Request) -> Connection:
        """Create the server's side of a new connection."""
        return _Session(self, ws)

    async def expire(self) -> None:
        """End every session as the server does at its time limit, without an error."""
        for connection in list(self._open):
            assert isinstance(connection, _Session)
            await connection.send("session.closed", reason="expired", usage={"seconds": 1.0})
            await connection.hang_up(WSCloseCode.OK, by_script=True)


class _Session(Connection):
    """A client. The script's next element decides about each request."""

    def __init__(self, server: GPTLiveSimulator, ws: web.WebSocketResponse) -> None:
        super().__init__(ws)
        self.server = server
        self.clock = 0
        """Milliseconds of the session's timeline."""

    async def greet(self) -> None:
        """Do nothing, because the client's configuration comes first."""

    async def send(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, **fields}
        await self.ws.send_str(json.dumps(event))
        self.server.record("sent", event)

    async def receive(self, data: str) -> None:
        event = json.loads(data)
        self.server.record("received", event)
        match event.get("type"):
            case "session.start":
                await self.send("session.started", session={"id": f"sess_{uuid.uuid4()}"})
            case "session.commentary.append":
                await self.hear(event)
            case "response.create":
                await self.hear(event)
            case "session.close":
                await self.send("session.closed", reason="close_requested")
                await self.hang_up(WSCloseCode.OK)

    async def hear(self, event: Event) -> None:
        fault = self.server.take_fault()
        request = self.server.take_request(
            fault, event_id=event.get("event_id"), instructions=event.get("content")
        )
        await self.answer(request, fault)

    async def hear_caller(self, transcript: str | None) -> None:
        """Hear a turn of the caller, and answer it."""
        if transcript is not None:
            start, self.clock = self.clock, self.clock + _WORD_MS
            await self.send(
                "session.input_transcript.delta",
                delta=transcript,
                start_ms=start,
                end_ms=self.clock,
            )
        turn = self.server.take_turn()
        assert turn.fault is not None
        await self.answer(turn, turn.fault)

    async def answer(self, request: Request, fault: Fault) -> None:  # noqa: C901 - a table
        """Play the element. "silence" has no effect."""
        match fault.name:
            case "ok":
                await self.reply(request)
            case "late":
                self.after(fault.seconds, partial(self.reply, request))
            case "slow":
                await self.begin(request)
                self.after(fault.seconds, partial(self.end, request))
            case "tool":
                await self.call_tool(fault.argument)
            case "malformed":
                await self.ws.send_str("{this is not JSON")
            case "error":
                await self.fail(request, fault.argument)
            case "uncorrelated":
                await self.fail(None, "server_error")
            case "rate_limit":
                wait = f" Please try again in {fault.argument}s." if fault.argument else ""
                await self.fail(request, "rate_limit_exceeded", f"Rate limit reached.{wait}")
            case "quota":
                await self.fail(request, "insufficient_quota")
                await self.hang_up(WSCloseCode.OK, by_script=True)
            case "drop_queued":
                self.server.go_down(fault.seconds)
                await self.hang_up(WSCloseCode.INTERNAL_ERROR, by_script=True)
            case "drop_during":
                await self.begin(request)
                await self.hang_up(WSCloseCode.INTERNAL_ERROR, by_script=True)
            case "drop_before" | "unauthorized":
                await self.hang_up(WSCloseCode.INTERNAL_ERROR, by_script=True)

    async def fail(
        self, request: Request | None, code: str, message: str = "The script says so."
    ) -> None:
        kind, _, code = code.rpartition("/")
        error = {"type": kind or "server_error", "code": code, "message": message}
        if request is not None and request.event_id:
            error["client_event_id"] = request.event_id
        await self.send("error", error=error)

    async def call_tool(self, name: str) -> None:
        delegation = f"del_{uuid.uuid4()}"
        await self.send(
            "session.delegation.created", delegation={"id": delegation, "target": "responses"}
        )
        call = {
            "id": f"fc_{uuid.uuid4()}",
            "type": "function_call",
            "status": "completed",
            "call_id": f"call_{uuid.uuid4()}",
            "name": name,
            "arguments": "{}",
        }
        for event in (
            {"type": "response.created", "response": {"id": f"resp_{uuid.uuid4()}"}},
            {"type": "response.output_item.done", "item": call},
            {"type": "response.completed"},
        ):
            await self.send("response.event", delegation_id=delegation, event=event)

    async def reply(self, request: Request) -> None:
        await self.begin(request)
        await self.end(request)

    async def begin(self, request: Request) -> None:
        await self.say(request.answer.split()[0])

    async def end(self, request: Request) -> None:
        await self.say(f" {request.number}")
        await self.play(bytes(2), _PAUSE_MS)
        self.server.completed.append(request.answer)
        self.server.wake()

    async def say(self, word: str) -> None:
        """Send a word and its sound."""
        start = self.clock
        await self.send(
            "session.output_transcript.delta", delta=word, start_ms=start, end_ms=start + _WORD_MS
        )
        await self.play(_LOUD, _WORD_MS)

    async def play(self, sample: bytes, milliseconds: int) -> None:
        """Send that much of one sample, in parts of 100 ms."""
        for _ in range(milliseconds // 100):
            delta = base64.b64encode(sample * (100 * _RATE)).decode()
            await self.send("session.output_audio.delta", delta=delta)
            self.clock += 100
