# SPDX-License-Identifier: Apache-2.0
"""An OpenAI Realtime server that fails on a script."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from aiohttp import WSCloseCode, web

from traced_retry.simulator._openai_protocol import Event, OpenAIConnection, Response
from traced_retry.simulator.script import Fault
from traced_retry.simulator.server import Connection, Request, Simulator

SERVER_ERROR = "The server had an error while processing your request."
PAUSE = 0.1
"""Seconds from the start of a response to its failure, so that the client sees the start."""
RATE_LIMIT = "Rate limit reached on requests per min (RPM): Limit 3, Used 3, Requested 1."


class OpenAISimulator(Simulator):
    """A server that plays a script to OpenAI Realtime clients. Pass ``url`` to them as base URL.

    Each ``response.create`` takes one element. If a response is active already, the request is
    rejected and takes no element. Two elements act on connections instead:

    ``drop_queued`` acts after the request before it has ended (rejected, left unanswered, or its
    response done) and the client's session.update or first item is confirmed. After
    ``wait_for("connection_lost")`` a request finds the socket down, and meets the next element.

    The next connection attempt takes ``unauthorized``. A request that takes it on an open
    connection is not answered. The connection is closed, and the attempt to come back takes it.
    """

    path = "/v1/realtime"
    sound = 0.0
    """Seconds of silence that each reply has as its sound. With 0 the server answers in text."""

    @property
    def url(self) -> str:
        """Return ``http://127.0.0.1:PORT/v1``. Raise RuntimeError unless the server is running."""
        return super().url + "/v1"

    def connect(self, ws: web.WebSocketResponse, http: web.Request) -> Connection:
        """Create the server's side of a new connection."""
        connection = _ScriptedConnection(self, ws, http.query.get("model", "gpt-realtime"))
        connection.sound = self.sound
        return connection


class _ScriptedConnection(OpenAIConnection):
    """A client. The script's next element decides about each request."""

    late = 0  # Answers that have not started.

    async def receive(self, data: str) -> None:
        await super().receive(data)
        await self.drop_if_next()

    async def hear(self, event: Event) -> None:
        """Take the script's next element for a request, unless a response is active."""
        fault = None if self.active else self.server.next_fault
        if fault and fault.name == "drop_queued":
            # Sent while the drop waited for a late answer: it is lost with the socket.
            await self.drop_queued(fault)
            return
        if fault:
            self.server.take_fault()
        params = event.get("response") or {}
        request = self.server.take_request(
            fault,
            event_id=event.get("event_id"),
            instructions=params.get("instructions"),
            metadata=params.get("metadata"),
        )
        if fault:
            await self.answer(request, fault)
        elif self.active:
            await self.reject_as_active(request, self.active)

    async def answer(self, request: Request, fault: Fault) -> None:  # noqa: C901, PLR0912, PLR0915 - a table
        """Play the element. Only "silence" has no effect."""
        event_id, code = request.event_id, fault.argument
        match fault.name:
            case "ok":
                await self.reply(request)
            case "tool":
                await self.call_tool(request, fault.argument)
            case "late" | "unlabelled":
                labels = request.metadata if fault.name == "late" else None
                self.late += 1
                self.after(
                    fault.seconds, partial(self.reply_late, replace(request, metadata=labels))
                )
            case "slow":
                response = await self.begin_reply(request)
                self.after(fault.seconds, partial(self.end_slowly, request, response))
            case "error" if code == "server_error":
                await self.reject(event_id, None, SERVER_ERROR, "server_error")
            case "error":
                kind, _, code = code.rpartition("/")
                await self.reject(
                    event_id,
                    int(code) if code.isdigit() else code,
                    "The script says so.",
                    kind or error_type(code),
                )
            case "uncorrelated":
                await self.reject(None, None, SERVER_ERROR, "server_error")
            case "rate_limit" if request.turn:
                await self.fail(await self.begin(None), "rate_limit_exceeded")
            case "rate_limit":
                wait = f" Please try again in {duration(fault.seconds)}." if fault.argument else ""
                await self.reject(event_id, "rate_limit_exceeded", RATE_LIMIT + wait)
            case "active":
                own = await self.begin(None)
                await self.reject_as_active(request, own)
                self.after(fault.seconds, partial(self.end_own, own))
            case "failed":
                await self.fail(await self.begin(request.metadata), code)
            case "failed_later" | "failed_message":
                response = await self.begin(request.metadata)
                if fault.name == "failed_message":
                    await self.begin_message(response)
                self.after(PAUSE, partial(self.fail, response, code))
            case "failed_during":
                response = await self.begin_reply(request)
                self.after(PAUSE, partial(self.fail, response, code))
            case "failed_tool":
                response = await self.begin(request.metadata)
                await self.call_function(response, fault.argument)
                self.after(PAUSE, partial(self.fail, response, "server_error"))
            case "stalled":
                response = await self.begin(request.metadata)
                if fault.argument:
                    self.after(fault.seconds, partial(self.speak_late, request, response))
            case "empty":
                response = await self.begin(request.metadata)
                await self.finish(response, "completed")
            case "incomplete":
                response = await self.begin(request.metadata)
                await self.finish(response, "incomplete", reason="content_filter")
            case "malformed":
                await self.ws.send_str("{this is not JSON")
            case "quota":
                kind = "insufficient_quota"
                await self.reject(event_id, kind, "You exceeded your current quota.", kind)
                await self.hang_up(WSCloseCode.OK, by_script=True)
            case "drop_before":
                await self.hang_up(WSCloseCode.INTERNAL_ERROR, by_script=True)
            case "drop_during":
                await self.begin_reply(request)
                await self.hang_up(WSCloseCode.INTERNAL_ERROR, by_script=True)
            case "unauthorized":
                await self.hang_up(WSCloseCode.POLICY_VIOLATION, by_script=True)

    async def reject_as_active(self, request: Request, active: Response) -> None:
        code = "conversation_already_has_active_response"
        message = f"Conversation already has an active response in progress: {active.id}."
        await self.reject(request.event_id, code, message)

    async def drop_if_next(self) -> None:
        """Hang up if the script requires it now and no answer is in progress."""
        fault = self.server.next_fault
        busy = self.active is not None or self.late > 0
        if fault.name == "drop_queued" and self.configured and not busy and not self.ws.closed:
            await self.drop_queued(fault)

    async def drop_queued(self, fault: Fault) -> None:
        self.server.advance()
        self.server.go_down(fault.seconds)
        await self.hang_up(WSCloseCode.INTERNAL_ERROR, by_script=True)

    # Delayed actions

    async def fail(self, response: Response, code: str) -> None:
        if self.active is response:  # Not cancelled meanwhile.
            error = {"type": error_type(code), "code": code}
            await self.finish(response, "failed", error=error)
            await self.drop_if_next()

    async def reply_late(self, request: Request) -> None:
        while self.active is not None:
            await self.idle.wait()
        self.late -= 1
        await self.reply(request)
        await self.drop_if_next()

    async def speak_late(self, request: Request, response: Response) -> None:
        if self.active is response:  # Not cancelled meanwhile.
            await self.begin_words(request, response)
            await self.end_reply(request, response)
            await self.drop_if_next()

    async def end_slowly(self, request: Request, response: Response) -> None:
        if self.active is response:  # Not cancelled meanwhile.
            await self.end_reply(request, response)
            await self.drop_if_next()

    async def end_own(self, own: Response) -> None:
        if self.active is own:
            await self.finish(own, "completed")
            await self.drop_if_next()


def error_type(code: str) -> str:
    """Return the type under which OpenAI files an error code."""
    return code if code in ("server_error", "insufficient_quota") else "invalid_request_error"


def duration(seconds: float) -> str:
    """Return seconds in the form of OpenAI's messages: 200ms, 1.5s, 1m26.4s, 114h18m0s."""
    if 0 < seconds < 1:
        return f"{seconds * 1000:g}ms"
    minutes, rest = divmod(round(seconds, 3), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest:.6g}s"
    if hours or minutes:
        text = f"{minutes:.0f}m{text}"
    return f"{hours:.0f}h{text}" if hours else text
