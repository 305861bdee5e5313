# SPDX-License-Identifier: Apache-2.0
"""An NVIDIA PersonaPlex server, text only. Its protocol has no request for a reply.

Client and server send binary frames at the same time. The first byte of a frame is its kind.
Source: ``livekit/plugins/nvidia/experimental/realtime/realtime_model.py`` 1.8.9.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar, Final

from aiohttp import WSCloseCode, web

from traced_retry.simulator.server import Connection, Simulator

HANDSHAKE: Final = b"\x00"
TEXT: Final = b"\x02"


class PersonaPlexSimulator(Simulator):
    """A server that accepts clients and speaks if :meth:`say` is called. Pass ``url`` to them.

    Only ``ok`` and ``unauthorized`` are valid in the script, and ``requests`` stays empty.
    """

    path = "/api/chat"
    faults: ClassVar[frozenset[str]] = frozenset({"ok", "unauthorized"})

    def connect(self, ws: web.WebSocketResponse, http: web.Request) -> Connection:
        """Create the server's side of a new connection."""
        return _PersonaPlexConnection(ws)

    async def say(self, text: str) -> None:
        """Speak on each connection, as the model does by itself."""
        await asyncio.gather(*(c.ws.send_bytes(TEXT + text.encode()) for c in self._open))
        self.completed.append(text)
        self.wake()

    async def hang_up(self) -> None:
        """End each connection normally. The plugin then ends the current speech and returns."""
        await asyncio.gather(*(c.hang_up(WSCloseCode.OK, by_script=True) for c in self._open))


class _PersonaPlexConnection(Connection):
    async def greet(self) -> None:
        await self.ws.send_bytes(HANDSHAKE)

    async def receive(self, data: str) -> None:
        """Do nothing: clients send no text, and their audio needs no answer."""
