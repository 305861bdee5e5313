# SPDX-License-Identifier: Apache-2.0
"""A Phonic server that fails on a script, and a way to point the plugin at it.

The protocol is that of livekit-plugins-phonic 1.8.9: one WebSocket without request ids. The
plugin has no setting for the URL. :func:`redirected` gives its client another environment.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import json
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

from aiohttp import WSCloseCode, web

from traced_retry.simulator._say import SayScript, speak_scripted
from traced_retry.simulator.script import Fault, Script
from traced_retry.simulator.server import Connection, OnEvent, Request, Simulator

Event = dict[str, Any]

_SILENCE = base64.b64encode(bytes(2 * 240)).decode()
"""10 ms of 16-bit PCM at 24 kHz: each word comes with its audio."""


class PhonicSimulator(Simulator):
    """A server that plays a script to Phonic clients: see :func:`redirected`.

    Each ``generate_reply``, and each tool's result, takes one element. ``error``, ``rate_limit``
    and ``quota`` are error messages with a code, which the plugin drops. ``quota`` also closes the
    connection. The next connection attempt takes ``unauthorized``. A request that takes it on an
    open connection is not answered, and the connection is closed.

    Args:
        script: a parsed script, or its text.
        host: only 127.0.0.1 is allowed.
        port: 0 picks a free one.
        on_event: called with "received" or "sent" and each JSON event; must not raise.
        ready: answer a client's config with "ready". Otherwise a client waits for :meth:`begin`
            before it sends requests.
        say: a separate script for the texts of ``say``: ``ok``,
            ``silence``, ``late`` or ``drop_before``.
    """

    path = "/v1/sts/ws"
    faults: ClassVar[frozenset[str]] = frozenset(
        {"ok", "silence", "late", "slow", "tool", "malformed", "drop_before", "drop_during"}
    ) | frozenset({"error", "rate_limit", "quota", "unauthorized"})

    def __init__(
        self,
        script: Script | str = "ok",
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        on_event: OnEvent | None = None,
        ready: bool = True,
        say: Script | str = "ok",
    ) -> None:
        super().__init__(script, host=host, port=port, on_event=on_event)
        self.ready = ready
        self.say = SayScript(say, {"ok", "silence", "late", "drop_before"})

    @property
    def url(self) -> str:
        """Return ``ws://127.0.0.1:PORT``. Raise RuntimeError unless the server is running."""
        return super().url.replace("http", "ws", 1)

    def connect(self, ws: web.WebSocketResponse, http: web.Request) -> Connection:
        """Create the server's side of a new connection."""
        return _Conversation(self, ws)

    async def begin(self) -> None:
        """Let every client send requests, if the server was not ``ready`` from the start."""
        self.ready = True
        for connection in self._open:
            assert isinstance(connection, _Conversation)
            await connection.send("ready_to_start_conversation")

    async def end_conversations(self) -> None:
        """Close every connection normally (1000)."""
        await asyncio.gather(*(c.hang_up(WSCloseCode.OK, by_script=True) for c in self._open))


@contextlib.contextmanager
def redirected(url: str) -> Iterator[None]:
    """Connect sessions of ``livekit.plugins.phonic`` to ``url`` in the ``with`` block.

    The plugin has no setting for it. The function replaces the module's ``AsyncPhonic`` in the
    whole process, so that it gets another environment. Its REST calls fail.

    Raises:
        RuntimeError: if this version of the plugin creates its client in another way.
    """
    from livekit.plugins.phonic.realtime import realtime_model as plugin  # noqa: PLC0415
    from phonic.environment import PhonicEnvironment  # noqa: PLC0415

    original = getattr(plugin, "AsyncPhonic", None)
    if original is None:
        raise RuntimeError("livekit.plugins.phonic has no AsyncPhonic any more to be redirected")
    environment = PhonicEnvironment(base="http://127.0.0.1:9", production=url)
    setattr(plugin, "AsyncPhonic", functools.partial(original, environment=environment))  # noqa: B010
    try:
        yield
    finally:
        setattr(plugin, "AsyncPhonic", original)  # noqa: B010


class _Conversation(Connection):
    """A client. The script's next element decides about each request."""

    def __init__(self, server: PhonicSimulator, ws: web.WebSocketResponse) -> None:
        super().__init__(ws)
        self.server = server

    async def greet(self) -> None:
        """Do nothing, because the client's config comes first."""

    async def send(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, **fields}
        await self.ws.send_str(json.dumps(event))
        self.server.record("sent", event)

    async def receive(self, data: str) -> None:
        event = json.loads(data)
        self.server.record("received", event)
        match event.get("type"):
            case "config":
                await self.send("conversation_created", conversation_id=f"conv_{uuid.uuid4()}")
                if self.server.ready:
                    await self.send("ready_to_start_conversation")
            case "generate_reply" | "tool_call_output":
                await self.hear(event)
            case "say":
                await speak_scripted(self, event["text"])

    async def hear(self, event: Event) -> None:
        fault = self.server.take_fault()
        request = self.server.take_request(fault, instructions=event.get("system_message"))
        await self.answer(request, fault)

    async def hear_caller(self, transcript: str | None) -> None:
        """Hear a turn of the caller, and answer it."""
        await self.send("user_started_speaking")
        await self.send("user_finished_speaking")
        await self.send("input_text", text=transcript or "")
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
                await self.send("assistant_started_speaking")
                await self.send(
                    "tool_call",
                    tool_call_id=f"call_{uuid.uuid4()}",
                    tool_name=fault.argument,
                    parameters={},
                )
                await self.send("assistant_finished_speaking")
            case "malformed":
                await self.ws.send_str("{this is not JSON")
            case "error":
                await self.fail(fault.argument)
            case "rate_limit":
                await self.fail("rate_limit_exceeded")
            case "quota":
                await self.fail("insufficient_quota")
                await self.hang_up(WSCloseCode.OK, by_script=True)
            case "drop_during":
                await self.begin(request)
                await self.hang_up(WSCloseCode.INTERNAL_ERROR, by_script=True)
            case "drop_before" | "unauthorized":
                await self.hang_up(WSCloseCode.INTERNAL_ERROR, by_script=True)

    async def fail(self, code: str) -> None:
        await self.send("error", error={"message": "The script says so.", "code": code})

    async def speak(self, text: str) -> None:
        await self.send("assistant_started_speaking")
        await self.send("audio_chunk", audio=_SILENCE, text=text)
        await self.send("assistant_finished_speaking")
        self.server.completed.append(text)
        self.server.wake()

    async def reply(self, request: Request) -> None:
        await self.begin(request)
        await self.end(request)

    async def begin(self, request: Request) -> None:
        await self.send("assistant_started_speaking")
        await self.send("audio_chunk", audio=_SILENCE, text=request.answer.split()[0])

    async def end(self, request: Request) -> None:
        await self.send("audio_chunk", audio=_SILENCE, text=f" {request.number}")
        await self.send("assistant_finished_speaking")
        self.server.completed.append(request.answer)
        self.server.wake()
