# SPDX-License-Identifier: Apache-2.0
"""A server on 127.0.0.1 that plays a cassette: see :mod:`cassette`.

Each event of the recorded server waits for the events that the recorded client had sent before.
Afterwards the same time passes as in the recording. So an agent that behaves as in the recording
meets the same events at the same times.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from traced_retry.simulator.cassette import (
    ABORTED,
    Entry,
    Filler,
    event_kind,
    is_sound,
    read_cassette,
)
from traced_retry.simulator.record import join_url, server_class
from traced_retry.simulator.server import Connection, Simulator

NO_FURTHER: Final = "The cassette has no further connection."
Heard = tuple[str, int]
"""The kind of a client's event, and its number among those of this kind and connection."""


@dataclass
class Call:
    """One recorded request, and the events of the WebSocket that it opened."""

    method: str
    at: float
    answer: Entry | None = None
    heard: dict[Heard, Any] = field(default_factory=dict)
    """The client's events."""
    sent: list[tuple[Entry, Heard | None, float]] = field(default_factory=list)
    """The server's lines. Each has the client's event before it, and the seconds after that."""


def replayer(provider: str, path: Path, *, port: int = 0) -> Replayer:
    """Return a server that plays a cassette once. Use it as an async context manager.

    Args:
        provider: the provider of the cassette.
        path: the cassette.
        port: 0 picks a free one.

    Raises:
        UsageError: if the file is not a cassette of this provider.
    """
    found: Replayer = server_class(Replayer, provider)(port=port)
    for call in _calls(read_cassette(path, provider)):
        found.calls[call.method].append(call)
        found.events += len(call.sent)
    return found


def _calls(entries: Iterator[Entry]) -> list[Call]:
    calls: dict[int, Call] = {}
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    latest: dict[int, tuple[Heard | None, float]] = {}
    for entry in entries:
        number, at, client = entry["connection"], entry["at"], entry["from"] == "client"
        if "http" in entry and client:
            calls[number] = Call(entry["http"], at)
            continue
        call = calls[number]
        if "http" in entry:
            call.answer = entry
            latest[number] = None, at
        elif client:
            kind = event_kind(entry.get("event"))
            heard = kind, counts[number][kind]
            counts[number][kind] += 1
            call.heard[heard] = entry.get("event")
            if kind and not is_sound(kind):
                latest[number] = heard, at
        else:
            after, since = latest[number]
            call.sent.append((entry, after, at - since))
    return list(calls.values())


class Replayer(Simulator):
    """The server. It has the address and certificate of the provider's simulator.

    Attributes:
        events: how many events of the recorded server the cassette has.
        played: how many of them were sent.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: dict[str, list[Call]] = defaultdict(list)
        self.events = 0
        self.played = 0
        self.fill = Filler()
        self._joined = 0
        self._opening: dict[int, Call] = {}

    def add_routes(self, app: web.Application) -> None:
        """Accept each path."""
        app.router.add_route("*", "/{path:.*}", self._accept)

    def next_call(self, method: str) -> Call | None:
        """Return the next recorded request with this method, or None after the last one."""
        return self.calls[method].pop(0) if self.calls[method] else None

    async def _accept(self, http: web.Request) -> web.StreamResponse:
        call = self.next_call(http.method)
        if call is None or call.answer is None:
            return self._refuse(503, NO_FURTHER, "server_error")
        await asyncio.sleep(call.answer["at"] - call.at)
        status, headers = call.answer["http"], call.answer.get("headers") or {}
        if status == HTTPStatus.SWITCHING_PROTOCOLS:
            self._opening[id(http)] = call
            return await super()._accept(http)
        if "event" not in call.answer:
            refused = self._refuse(status, "The cassette says so.", "")
            refused.headers.update(headers)
            return refused
        event = self.fill(call.answer["event"])
        if isinstance(event, dict) and "joinUrl" in event:
            self._joined += 1
            event["joinUrl"] = join_url(self, self._joined)
        return web.json_response(event, status=status)

    def connect(self, ws: web.WebSocketResponse, http: web.Request) -> Connection:
        """Create the server's side of a new connection."""
        return _Connection(self, ws, http)


class Playback:
    """The lines of a recorded connection, due as the client's events arrive."""

    def __init__(self, server: Replayer, call: Call) -> None:
        self.server = server
        self.call = call
        self._arrived: dict[Heard | None, float] = {}
        self._counts: Counter[str] = Counter()
        self._news = asyncio.Event()

    def hear(self, event: Any) -> None:
        """Note an event of the client."""
        kind = event_kind(event)
        heard = kind, self._counts[kind]
        self._counts[kind] += 1
        self.server.fill.learn(self.call.heard.get(heard), event)
        self._arrived[heard] = asyncio.get_running_loop().time()
        self._news.set()

    async def lines(self) -> AsyncIterator[Entry]:
        """Yield each line of the recorded server when its time has come, from the opening on."""
        self._arrived[None] = asyncio.get_running_loop().time()
        for entry, after, delay in self.call.sent:
            while after not in self._arrived:
                self._news.clear()
                await self._news.wait()
            due = self._arrived[after] + delay
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
            yield entry
            self.server.played += 1
            self.server.wake()


class _Connection(Connection):
    """A client, and the recorded connection that it meets."""

    def __init__(self, server: Replayer, ws: web.WebSocketResponse, http: web.Request) -> None:
        super().__init__(ws)
        self.playback = Playback(server, server._opening.pop(id(http)))
        self.fill = server.fill
        self.transport = http.transport

    async def greet(self) -> None:
        """Start to play beside the reception of events."""
        self.after(0, self.play)

    async def receive(self, data: str) -> None:
        self.playback.hear(json.loads(data))

    async def play(self) -> None:
        """Send each line when its time has come."""
        async for entry in self.playback.lines():
            await self.send(entry)

    async def send(self, entry: Entry) -> None:
        if "close" in entry:
            if entry["close"] == ABORTED and self.transport is not None:
                self.lost = True
                self.transport.abort()
            else:
                await self.hang_up(entry["close"], by_script=True, reason=entry["reason"])
        elif "text" in entry:
            await self.ws.send_str("A" * entry["text"])
        elif "event" not in entry:
            first = bytes([entry.get("first", 0)])
            await self.ws.send_bytes(first.ljust(entry["binary"], b"A" if first[0] else b"\0"))
        elif "binary" in entry:
            await self.ws.send_bytes(json.dumps(self.fill(entry["event"])).encode())
        else:
            await self.ws.send_str(json.dumps(self.fill(entry["event"])))
