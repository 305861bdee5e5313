# SPDX-License-Identifier: Apache-2.0
"""An Azure VoiceLive server, text only, that fails on a script.

VoiceLive uses the beta of OpenAI's Realtime protocol with another path. The instructions of a
request are beside its parameters, not among them. Source:
``livekit/plugins/azure/realtime/realtime_model.py`` 1.8.9, ``azure-ai-voicelive`` 1.3.1.
"""

from __future__ import annotations

from aiohttp import web

from traced_retry.simulator._openai_protocol import Event
from traced_retry.simulator.openai_compatible import AzureOpenAISimulator, BetaConnection
from traced_retry.simulator.server import Connection


class VoiceLiveSimulator(AzureOpenAISimulator):
    """A server that plays a script to VoiceLive clients. Pass ``url`` to them as ``endpoint``.

    The elements are those of :class:`~traced_retry.simulator.OpenAISimulator`. If a request
    was dropped without an answer, LiveKit's plugin sends it again with its id. It then takes the
    next element.
    """

    path = "/voice-live/realtime"

    def connect(self, ws: web.WebSocketResponse, http: web.Request) -> Connection:
        """Create the server's side of a new connection."""
        return _VoiceLiveConnection(self, ws, http.query.get("model", "gpt-realtime"))


class _VoiceLiveConnection(BetaConnection):
    async def hear(self, event: Event) -> None:
        extra = {"instructions": event.get("additional_instructions")}
        await super().hear({**event, "response": {**(event.get("response") or {}), **extra}})
