# SPDX-License-Identifier: Apache-2.0
"""A Gemini Live server, text only, that fails on a script.

google-genai uses only ``wss`` for the Gemini API. The server therefore creates a certificate at its
start. With :attr:`GoogleSimulator.http_options` a client trusts it.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trustme
from aiohttp import WSCloseCode, web

from traced_retry.simulator.script import Fault, Script
from traced_retry.simulator.server import (
    Connection,
    OnEvent,
    Request,
    Simulator,
)

Turn = tuple[str, str]
"""The words of one ``user`` or ``model`` turn."""

QUOTA = "You exceeded your current quota, please check your plan and billing details."
_CLOSE_CODES = range(1000, 5000)


@dataclass
class _Conversation:
    """The server's state of a session and of each session that resumes it by a handle."""

    context: list[Turn] = field(default_factory=list)
    unanswered: dict[int, tuple[float, Request]] = field(default_factory=dict)
    """The loop time of the answer to each open request, by number."""


class GoogleSimulator(Simulator):
    """A server that plays a script to Gemini Live clients. Pass them ``http_options``.

    Each turn the client completes takes one element, and so does a tool's response, which Gemini
    answers unasked. The answer to a turn outlives its connection: a client that comes back with
    a resumption handle gets the answers to its earlier requests, at once if they are due. A client
    that comes back without a handle starts a new conversation and sends its context.

    ``error:CODE`` closes the connection with that code if it is a WebSocket code (1011, 1008, 1000,
    1007, ...). Otherwise it is sent in a message, as Gemini does with 429. ``incomplete`` ends the
    turn without a word, and ``empty`` does so after a thought. ``stalled`` thinks and never ends.
    The next connection attempt takes ``unauthorized``.

    Args:
        script: a parsed script, or its text.
        host: only 127.0.0.1 is allowed.
        port: 0 picks a free one.
        on_event: called with "received" or "sent" and each JSON event; must not raise.
        interrupts: end the present answer (``interrupted``) if another turn comes. Otherwise the
            answer to that turn goes on in the present one. Gemini has done both.

    Attributes:
        contexts: per request, the model's context: turns resumed, replayed or new, and those of
            the request.
        handles: the resumption handle of each connection.
    """

    path = "/ws/google.ai.generativelanguage.{version}.GenerativeService.BidiGenerateContent"
    faults = frozenset(
        {
            *("ok", "late", "slow", "silence", "tool", "malformed"),
            *("incomplete", "empty", "stalled"),
            *("error", "rate_limit", "quota", "unauthorized", "drop_before", "drop_during"),
        }
    )

    def __init__(
        self,
        script: Script | str = "ok",
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        on_event: OnEvent | None = None,
        interrupts: bool = False,
    ) -> None:
        super().__init__(script, host=host, port=port, on_event=on_event)
        self.interrupts = interrupts
        self.contexts: list[list[Turn]] = []
        self.handles: list[str | None] = []
        self.conversations: dict[str, _Conversation] = {}
        authority = trustme.CA()
        self.ca = authority.cert_pem.bytes()
        """Return the certificate authority's certificate (PEM) for this server."""
        self.server_ssl = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(host).configure_cert(self.server_ssl)
        self.client_ssl = ssl.create_default_context()
        authority.configure_trust(self.client_ssl)

    @property
    def http_options(self) -> dict[str, Any]:
        """Return arguments of ``google.genai.types.HttpOptions`` that lead a client here."""
        return {"base_url": self.url, "async_client_args": {"ssl": self.client_ssl}}

    def connect(self, ws: web.WebSocketResponse, http: web.Request) -> Connection:
        """Create the server's side of a new connection."""
        return _GoogleConnection(ws, self)


class _GoogleConnection(Connection):
    """A client. Its answers come from its conversation, which may be older than the connection."""

    def __init__(self, ws: web.WebSocketResponse, server: GoogleSimulator) -> None:
        super().__init__(ws)
        self.server = server
        self.conversation = _Conversation()
        self.speaking: Request | None = None

    async def greet(self) -> None:
        """Do nothing, because the client speaks first."""

    async def receive(self, data: str) -> None:
        message = json.loads(data)
        self.server.record("received", message)
        for key, body in message.items():
            match key:
                case "setup":
                    await self.set_up((body.get("sessionResumption") or {}).get("handle"))
                case "client_content":
                    turns = [_turn(turn) for turn in body.get("turns") or ()]
                    self.conversation.context += turns
                    if body.get("turnComplete"):
                        await self.hear(turns)
                case "tool_response":
                    self.conversation.context.append(("user", "(the tool's result)"))
                    await self.hear([])
                case "realtime_input" if "activityStart" in body:
                    await self.interrupt()

    async def set_up(self, handle: str | None) -> None:
        """Start a conversation, or resume the one that the handle names."""
        self.server.handles.append(handle)
        if handle in self.server.conversations:
            self.conversation = self.server.conversations[handle]
        await self.send({"setupComplete": {}})
        await self.give_handle()
        for due, request in list(self.conversation.unanswered.values()):
            self.after(max(0.0, due - self.now), partial(self.reply_open, request))

    async def hear(self, turns: list[Turn]) -> None:
        """Take the script's next element for a request."""
        fault = self.server.take_fault()
        said = [text for role, text in turns if role == "model"]
        self.server.contexts.append(list(self.conversation.context))
        request = self.server.take_request(fault, instructions=said[-1] if said else None)
        await self.give_handle()
        if self.speaking is not None and self.server.interrupts:
            await self.end_interrupted()
        await self.answer(request, fault)

    async def hear_caller(self, transcript: str | None) -> None:
        """Hear a turn of the caller, and answer it. The words come with the answer."""
        if self.speaking is not None:
            await self.end_interrupted()
        self.conversation.context.append(("user", transcript or ""))
        if transcript is not None:
            await self.content(inputTranscription={"text": transcript})
        turn = self.server.take_turn()
        assert turn.fault is not None
        await self.answer(turn, turn.fault)

    async def answer(self, request: Request, fault: Fault) -> None:  # noqa: C901, PLR0912 - a table
        """Play the element. Only "silence" has no effect."""
        code = int(fault.argument) if fault.argument.isdigit() else 500
        match fault.name:
            case "ok":
                await self.begin(request)
                await self.end(request)
            case "late":
                self.owe(request, fault.seconds)
                self.after(fault.seconds, partial(self.reply_open, request))
            case "slow":
                await self.begin(request)
                self.after(fault.seconds, partial(self.end, request))
            case "tool":
                call = {"id": f"call-{request.number}", "name": fault.argument, "args": {}}
                await self.send({"toolCall": {"functionCalls": [call]}})
            case "incomplete":
                await self.content(generationComplete=True)
                await self.content(turnComplete=True)
            case "empty":
                await self.think()
                await self.content(generationComplete=True)
                await self.content(turnComplete=True)
            case "stalled":
                await self.think()
            case "malformed":
                await self.ws.send_str("{this is not JSON")
            case "rate_limit":
                await self.send({"code": 429, "status": "RESOURCE_EXHAUSTED", "message": QUOTA})
            case "quota":
                await self.hang_up(WSCloseCode.INTERNAL_ERROR, by_script=True, reason=QUOTA)
            case "error" if code in _CLOSE_CODES:
                self.owe(request)
                await self.hang_up(code, by_script=True)
            case "error":
                await self.send({"code": code, "message": "The script says so."})
            case "drop_before":
                self.owe(request)
                await self.hang_up(WSCloseCode.INTERNAL_ERROR, by_script=True)
            case "drop_during":
                await self.begin(request)
                await self.hang_up(WSCloseCode.INTERNAL_ERROR, by_script=True)
            case "unauthorized":
                await self.hang_up(WSCloseCode.POLICY_VIOLATION, by_script=True)

    async def interrupt(self) -> None:
        """End the current and the open answers, because the client reports that the user speaks."""
        open_requests = list(self.conversation.unanswered)
        if open_requests or self.speaking:
            self.conversation.unanswered.clear()
            self.server.cancels.append(None)
            await self.end_interrupted()

    async def end_interrupted(self) -> None:
        self.speaking = None
        await self.content(interrupted=True)
        await self.content(turnComplete=True)

    def owe(self, request: Request, seconds: float = 0.0) -> None:
        """Answer the request after ``seconds``, on the client's connection of that time."""
        self.conversation.unanswered[request.number] = (self.now + seconds, request)

    async def reply_open(self, request: Request) -> None:
        if not self.ws.closed and request.number in self.conversation.unanswered:
            del self.conversation.unanswered[request.number]
            await self.begin(request)
            await self.end(request)

    async def begin(self, request: Request) -> None:
        self.speaking = request
        await self.say(request.answer.split()[0])

    async def end(self, request: Request) -> None:
        if self.speaking is not request:  # Interrupted meanwhile.
            return
        self.speaking = None
        await self.say(f" {request.number}")
        text = request.answer
        self.conversation.context.append(("model", text))
        self.server.completed.append(text)
        await self.content(generationComplete=True)
        await self.content(turnComplete=True)
        await self.give_handle()

    async def say(self, text: str) -> None:
        await self.content(modelTurn={"role": "model", "parts": [{"text": text}]})

    async def think(self) -> None:
        await self.content(modelTurn={"parts": [{"text": "Let me think.", "thought": True}]})

    async def content(self, **what: Any) -> None:
        await self.send({"serverContent": what})

    async def give_handle(self) -> None:
        """Return a new handle for this conversation. The older ones stay valid."""
        handle = f"handle-{len(self.server.conversations) + 1}"
        self.server.conversations[handle] = self.conversation
        await self.send({"sessionResumptionUpdate": {"newHandle": handle, "resumable": True}})

    async def send(self, message: dict[str, Any]) -> None:
        if not self.ws.closed:
            await self.ws.send_str(json.dumps(message))
            self.server.record("sent", message)

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()


def _turn(turn: dict[str, Any]) -> Turn:
    text = "".join(part.get("text", "") for part in turn.get("parts") or ())
    return turn.get("role", "user"), text
