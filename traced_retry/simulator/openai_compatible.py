# SPDX-License-Identifier: Apache-2.0
"""OpenAI-compatible servers with differences in the protocol: xAI and Azure OpenAI.

LiveKit inference needs no class of its own. Its gateway has OpenAI's path and event names, and only
a token signed with the caller's key pair differs. Use :class:`OpenAISimulator` for it.
"""

from __future__ import annotations

from typing import Any, Final

from aiohttp import web

from traced_retry.simulator._openai_protocol import Event, output_position
from traced_retry.simulator._say import SayScript, speak_scripted
from traced_retry.simulator.openai import OpenAISimulator, _ScriptedConnection
from traced_retry.simulator.script import Script
from traced_retry.simulator.server import Connection, OnEvent, Simulator

BETA: Final = {
    "response.output_text.delta": "response.text.delta",
    "response.output_text.done": "response.text.done",
    "conversation.item.added": "conversation.item.created",
}
"""The names of the simulator's events in the beta of OpenAI's protocol. Source:
``_AZURE_EVENT_MAPPING`` in ``livekit/agents/llm/_realtime/openai.py``, livekit-agents 1.8.9."""


class XAISimulator(OpenAISimulator):
    """xAI's server. It also speaks ``force_message`` items, which take no element of the script.

    Args:
        script: a parsed script, or its text.
        host: only 127.0.0.1 is allowed.
        port: 0 picks a free one.
        on_event: called with "received" or "sent" and each JSON event; must not raise.
        say: a separate script for the texts of ``force_message`` items: ``ok``,
            ``silence``, ``late``, ``drop_before`` or ``error``.
    """

    def __init__(
        self,
        script: Script | str = "ok",
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        on_event: OnEvent | None = None,
        say: Script | str = "ok",
    ) -> None:
        super().__init__(script, host=host, port=port, on_event=on_event)
        self.say = SayScript(say, {"ok", "silence", "late", "drop_before", "error"})

    def connect(self, ws: web.WebSocketResponse, http: web.Request) -> Connection:
        """Create the server's side of a new connection."""
        return _XAIConnection(self, ws, http.query.get("model", "grok-voice-latest"))


class _XAIConnection(_ScriptedConnection):
    server: XAISimulator

    async def create_item(self, event: Event) -> None:
        item = event.get("item") or {}
        if item.get("type") != "force_message":
            await super().create_item(event)
            return
        text = "".join(part.get("text", "") for part in item.get("content") or ())
        fault = await speak_scripted(self, text)
        if fault.name == "error":
            await self.reject(event.get("event_id"), fault.argument, "The script says so.")

    async def speak(self, text: str) -> None:
        response = await self.begin(None)  # It echoes no id: a say() sends no metadata.
        await self.begin_message(response)
        await self.send("response.output_text.delta", **output_position(response), delta=text)
        await self.end_output(response, content=[{"type": "output_text", "text": text}])
        await self.finish(response, "completed")
        self.server.completed.append(text)
        self.server.wake()


class AzureOpenAISimulator(OpenAISimulator):
    """Azure's server. Pass ``url`` to ``RealtimeModel.with_azure`` as ``azure_endpoint``."""

    path = "/openai/v1/realtime"

    @property
    def url(self) -> str:
        """Return ``http://127.0.0.1:PORT``. Raise RuntimeError unless the server is running."""
        return Simulator.url.fget(self)  # type: ignore[attr-defined,no-any-return]


class AzureOpenAIBetaSimulator(AzureOpenAISimulator):
    """The server for a client with an ``api_version``: another path and the beta's events."""

    path = "/openai/realtime"

    def connect(self, ws: web.WebSocketResponse, http: web.Request) -> Connection:
        """Create the server's side of a new connection."""
        return BetaConnection(self, ws, http.query.get("deployment", "gpt-realtime"))


class BetaConnection(_ScriptedConnection):
    """Send events under their beta names, and text as content of type ``text``."""

    async def send(self, kind: str, **fields: Any) -> None:
        """Send one event."""
        if content := (fields.get("item") or {}).get("content"):
            parts = [_beta_part(part) for part in content]
            fields["item"] = {**fields["item"], "content": parts}
        await super().send(BETA.get(kind, kind), **fields)


def _beta_part(part: Event) -> Event:
    return {**part, "type": "text"} if part.get("type") == "output_text" else part
