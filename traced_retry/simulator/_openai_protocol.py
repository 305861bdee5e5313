# SPDX-License-Identifier: Apache-2.0
"""OpenAI's Realtime protocol without faults, in text or with silence as sound."""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from traced_retry.simulator.script import Fault
from traced_retry.simulator.server import Connection, Request, Simulator

Event = dict[str, Any]

SAMPLE_RATE = 24_000
"""Samples per second of the sound, 16-bit PCM."""

USAGE = {
    "input_tokens": 10,
    "output_tokens": 2,
    "total_tokens": 12,
    "input_token_details": {"text_tokens": 10, "audio_tokens": 0, "cached_tokens": 0},
    "output_token_details": {"text_tokens": 2, "audio_tokens": 0},
}


@dataclass
class Response:
    """A response that has started. It is the active one of its connection until it ends."""

    metadata: Event | None
    id: str = field(default_factory=lambda: new_id("resp"))
    item: Event = field(default_factory=dict)  # The output so far.


class OpenAIConnection(Connection):
    """A client with its conversation and active response. Subclasses answer its requests."""

    sound = 0.0
    """Seconds of sound in each reply. With 0 a reply is text."""

    def __init__(self, server: Simulator, ws: web.WebSocketResponse, model: str) -> None:
        super().__init__(ws)
        self.server = server
        self.session: Event = {"type": "realtime", "id": new_id("sess"), "model": model}
        self.items: list[str] = []  # The conversation: the ids, in order.
        self.active: Response | None = None
        self.idle = asyncio.Event()  # Set while no response is active.
        self.idle.set()
        self.configured = False  # A session.update or an item was confirmed.
        self.handlers: dict[str, Callable[[Event], Awaitable[None]]] = {
            "session.update": self.update_session,
            "conversation.item.create": self.create_item,
            "conversation.item.delete": self.delete_item,
            "conversation.item.truncate": self.truncate_item,
            "response.create": self.hear,
            "response.cancel": self.cancel,
            "input_audio_buffer.append": self.ignore,
            "input_audio_buffer.commit": self.ignore,
            "input_audio_buffer.clear": self.clear_audio,
        }

    async def greet(self) -> None:
        await self.send("session.created", session=self.session)

    async def send(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, "event_id": new_id("event"), **fields}
        await self.ws.send_str(json.dumps(event))
        self.server.record("sent", event)

    async def reject(
        self,
        event_id: str | None,
        code: str | int | None,
        message: str,
        kind: str = "invalid_request_error",
    ) -> None:
        """Send an error event. It names the client's event if ``event_id`` is given."""
        error = {"type": kind, "code": code, "message": message, "param": None}
        await self.send("error", error={**error, "event_id": event_id})

    async def receive(self, data: str) -> None:
        try:
            event = json.loads(data)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            await self.reject(None, "invalid_json", "The event is not a JSON object.")
            return
        self.server.record("received", event)
        await self.handlers.get(str(event.get("type")), self.reject_unknown)(event)

    @abstractmethod
    async def hear(self, event: Event) -> None:
        """Handle a response.create."""

    async def ignore(self, event: Event) -> None:
        """Ignore audio, which every client may send."""

    async def reject_unknown(self, event: Event) -> None:
        await self.reject(event.get("event_id"), "invalid_value", "Unknown type of event.")

    async def update_session(self, event: Event) -> None:
        self.session = {**self.session, **(event.get("session") or {})}
        await self.send("session.updated", session=self.session)
        self.configured = True

    async def clear_audio(self, _: Event) -> None:
        await self.send("input_audio_buffer.cleared")

    # The caller

    async def speech_started(self) -> None:
        """Let the caller start to speak, which ends the active response."""
        where = {"audio_start_ms": 0, "item_id": new_id("item")}
        await self.send("input_audio_buffer.speech_started", **where)
        if self.active is not None:
            await self.finish(self.active, "cancelled", reason="turn_detected")

    async def hear_caller(self, transcript: str | None) -> None:
        """Hear a turn of the caller, as with server-side turn detection, and answer it.

        Wait until the client has configured its session.
        """
        await self.server.wait_for(lambda: self.configured)
        await self.speech_started()
        item_id = new_id("item")
        before = self.items[-1] if self.items else None
        await self.send("input_audio_buffer.speech_stopped", audio_end_ms=1000, item_id=item_id)
        await self.send("input_audio_buffer.committed", previous_item_id=before, item_id=item_id)
        part = {"type": "input_audio", "transcript": None}
        item = {"id": item_id, "type": "message", "role": "user", "content": [part]}
        await self.add_item(item, len(self.items))
        if transcript is not None:
            await self.send(
                "conversation.item.input_audio_transcription.completed",
                item_id=item_id,
                content_index=0,
                transcript=transcript,
                usage={"type": "duration", "seconds": 1.0},
            )
        turn = self.server.take_turn()
        assert turn.fault is not None
        await self.answer(turn, turn.fault)

    async def answer(self, request: Request, fault: Fault) -> None:
        """Play an element of the script for a request, or for a turn of the caller."""
        raise NotImplementedError

    # The conversation

    async def create_item(self, event: Event) -> None:
        item = {**(event.get("item") or {})}
        item["id"] = item.get("id") or new_id("item")
        before = event.get("previous_item_id") or (self.items[-1] if self.items else "root")
        if item["id"] in self.items:
            code, problem = "item_create_duplicate_item_id", "The item exists already."
        elif before != "root" and before not in self.items:
            code, problem = "item_create_invalid_previous_item_id", "No such previous item."
        else:
            await self.add_item(item, 0 if before == "root" else self.items.index(before) + 1)
            self.configured = True
            return
        await self.reject(event.get("event_id"), code, problem)

    async def add_item(self, item: Event, place: int) -> None:
        self.items.insert(place, item["id"])
        before = self.items[place - 1] if place else None
        await self.send("conversation.item.added", previous_item_id=before, item=item)

    async def delete_item(self, event: Event) -> None:
        item_id = event.get("item_id")
        if item_id in self.items:
            self.items.remove(item_id)
            await self.send("conversation.item.deleted", item_id=item_id)
        else:
            code = "item_delete_invalid_item_id"
            await self.reject(event.get("event_id"), code, "No such item.")

    async def truncate_item(self, event: Event) -> None:
        fields = {k: event.get(k) for k in ("item_id", "content_index", "audio_end_ms")}
        await self.send("conversation.item.truncated", **fields)

    # Responses

    async def cancel(self, event: Event) -> None:
        response_id = event.get("response_id")
        self.server.cancels.append(response_id)
        self.server.wake()
        if self.active is not None and response_id in (None, self.active.id):
            await self.finish(self.active, "cancelled", reason="client_cancelled")
        else:
            message = "Cancellation failed: no active response found."
            await self.reject(event.get("event_id"), "response_cancel_not_active", message)

    async def begin(self, metadata: Event | None) -> Response:
        self.active = response = Response(metadata)
        self.idle.clear()
        await self.send("response.created", response=describe(response, "in_progress"))
        return response

    async def finish(self, response: Response, status: str, **details: Any) -> None:
        """End the active response, with the reason if it was not completed."""
        self.active = None
        self.idle.set()
        if response.item and status != "completed":
            response.item = {**response.item, "status": "incomplete"}
        await self.send("response.done", response=describe(response, status, **details))

    async def add_output(self, response: Response, **fields: Any) -> None:
        response.item = {"id": new_id("item"), "status": "in_progress", **fields}
        where = {"response_id": response.id, "output_index": 0}
        await self.send("response.output_item.added", **where, item=response.item)
        await self.add_item(response.item, len(self.items))

    async def end_output(self, response: Response, **fields: Any) -> None:
        response.item = {**response.item, "status": "completed", **fields}
        where = {"response_id": response.id, "output_index": 0}
        await self.send("response.output_item.done", **where, item=response.item)

    async def reply(self, request: Request) -> None:
        await self.end_reply(request, await self.begin_reply(request))

    async def begin_reply(self, request: Request) -> Response:
        response = await self.begin(request.metadata)
        await self.begin_words(request, response)
        return response

    async def begin_words(self, request: Request, response: Response) -> None:
        await self.begin_message(response)
        await self.send_words(response, request.answer.split()[0])

    async def begin_message(self, response: Response) -> None:
        await self.add_output(response, type="message", role="assistant", content=[])
        part = {"type": "audio", "transcript": ""} if self.sound else {"type": "text", "text": ""}
        await self.send("response.content_part.added", **output_position(response), part=part)

    async def send_words(self, response: Response, words: str) -> None:
        """Send one of the two parts of a reply, with half of its sound if there is any."""
        where = output_position(response)
        kind = "output_audio_transcript" if self.sound else "output_text"
        await self.send(f"response.{kind}.delta", **where, delta=words)
        if self.sound:
            silence = base64.b64encode(bytes(2 * int(SAMPLE_RATE * self.sound / 2))).decode()
            await self.send("response.output_audio.delta", **where, delta=silence)

    async def end_reply(self, request: Request, response: Response) -> None:
        text, where = request.answer, output_position(response)
        await self.send_words(response, f" {request.number}")
        if self.sound:
            await self.send("response.output_audio.done", **where)
            await self.send("response.output_audio_transcript.done", **where, transcript=text)
            part, content = {"type": "audio", "transcript": text}, {"type": "output_audio"}
            content["transcript"] = text
        else:
            await self.send("response.output_text.done", **where, text=text)
            part, content = {"type": "text", "text": text}, {"type": "output_text", "text": text}
        await self.send("response.content_part.done", **where, part=part)
        await self.end_output(response, content=[content])
        await self.finish(response, "completed")
        self.server.completed.append(text)
        self.server.wake()

    async def call_tool(self, request: Request, name: str) -> None:
        response = await self.begin(request.metadata)
        await self.call_function(response, name)
        await self.finish(response, "completed")

    async def call_function(self, response: Response, name: str) -> None:
        call_id = new_id("call")
        await self.add_output(
            response, type="function_call", call_id=call_id, name=name, arguments=""
        )
        where = {**output_position(response), "call_id": call_id}
        await self.send("response.function_call_arguments.delta", **where, delta="{}")
        await self.send("response.function_call_arguments.done", **where, arguments="{}")
        await self.end_output(response, arguments="{}")


def describe(response: Response, status: str, **details: Any) -> Event:
    """Return a response in the form of its events, with the reason if it was not completed."""
    return {
        "object": "realtime.response",
        "id": response.id,
        "status": status,
        "status_details": {"type": status, **details} if details else None,
        "output_modalities": ["text"],
        "output": [response.item] if response.item else [],
        "metadata": response.metadata,
        "usage": USAGE if status == "completed" else None,
    }


def output_position(response: Response) -> Event:
    """Return the fields that place an event within a response's output."""
    place = {"response_id": response.id, "item_id": response.item["id"]}
    return {**place, "output_index": 0, "content_index": 0}


def new_id(prefix: str) -> str:
    """Return a random id, because a client may replay one server's items to another."""
    return f"{prefix}_{uuid.uuid4().hex[:20]}"
