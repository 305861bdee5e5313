# SPDX-License-Identifier: Apache-2.0
"""An NVIDIA PersonaPlex server, text only. Its protocol has no request for a reply.

Client and server talk over each other in binary frames; the first byte of each says what it is.
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
    """Shakes hands, and speaks when told to by :meth:`say`; ``url`` is what clients take.

    No element of the script but ``ok`` and ``unauthorized`` means anything here, and ``requests``
    stays empty.
    """

    path = "/api/chat"
    faults: ClassVar[frozenset[str]] = frozenset({"ok", "unauthorized"})

    def connect(self, ws: web.WebSocketResponse, http: web.Request) -> Connection:
        """Create the server's side of a connection just accepted."""
        return _PersonaPlexConnection(ws)

    async def say(self, text: str) -> None:
        """Speaks on each connection, as the model does of its own accord."""
        await asyncio.gather(*(c.ws.send_bytes(TEXT + text.encode()) for c in self._open))
        self.completed.append(text)
        self.wake()

    async def hang_up(self) -> None:
        """End each connection normally. The plugin then ends what is being said and returns."""
        await asyncio.gather(*(c.hang_up(WSCloseCode.OK, by_script=True) for c in self._open))


class _PersonaPlexConnection(Connection):
    async def greet(self) -> None:
        await self.ws.send_bytes(HANDSHAKE)

    async def receive(self, data: str) -> None:
        """Nothing: clients send no text, and their audio needs no answer."""
