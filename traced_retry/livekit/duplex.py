# SPDX-License-Identifier: Apache-2.0
"""Duplex models, which listen and speak at the same time: GPT-Live of OpenAI, Azure and LiveKit.

LiveKit runs such a model through its ``DuplexRealtimeAdapter``, which has one slot for the open
request, and takes the model's next speech for the reply to it.

Facts (livekit-agents 1.8.9, ``llm/duplex_adapter.py`` and ``llm/_realtime/gpt_live.py``):

* A request is a commentary that the model is to speak. It has an event id. An ``error`` of the
  server names this id as ``client_event_id``, so the request was refused, and may be sent again.
  LiveKit's adapter does not read it, and would wait for its time-out (10 s). The speech itself
  carries no id, so a request without an answer must not be sent again.
* A new connection is a new session, and the plugin gives it the conversation. A request that was
  sent on the earlier connection gets no answer, and may be sent again. LiveKit's adapter fails the
  open request, also if it is still queued. The plugin sends a queued request on the new connection,
  so it must not be sent again.
* The plugin emits ``openai_client_event_queued`` when it sends an event, and
  ``openai_server_event_received`` before it handles one. It emits no error before it reconnects if
  the server ended the session normally, or ``max_session_duration`` is over.
* There is no cancel, and ``interrupt()`` has no effect, because the model stops by itself if the
  caller speaks. The model decides when it speaks, so a caller's turn without an answer is no
  failure, unless the connection is lost soon after the caller's words. The new session does not
  answer them.
* A tool call that comes before the model's first word does not resolve the request. LiveKit would
  run the tool only after the request has failed, and the model would wait for the tool's result.
* A second request fails the open one with an error like any other.
* The channels of a generation show its course: a message with sound, tool calls, and their close
  after 0.8 s of silence. A generation without sound holds tool calls, or late words of an earlier
  one, and is no reply. If the connection is lost, the generation ends like a complete one.
"""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from livekit.agents import APIConnectionError, llm

from traced_retry import semconv
from traced_retry.core.failure import Failure, explain, failure
from traced_retry.core.guard import suppress_and_log
from traced_retry.core.request import Delivery
from traced_retry.core.sanitize import host_and_port
from traced_retry.core.telemetry import Target
from traced_retry.livekit.adapter import (
    Replies,
    failure_from_error,
    failure_from_event,
    plain_provider,
)
from traced_retry.livekit.events import field, text
from traced_retry.livekit.openai import provider_name
from traced_retry.livekit.request import Call, Generation
from traced_retry.livekit.single_slot import SingleSlotAdapter, SingleSlotRequest, before
from traced_retry.livekit.turns import Turn

_ENGINE = "livekit.agents.llm._realtime.gpt_live"
_ASK = "session.commentary.append"


class DuplexAdapter(SingleSlotAdapter):
    """One session with a duplex model."""

    required_attributes: ClassVar[tuple[str, ...]] = ("_pending_reply", "duplex_session")
    slot = "_pending_reply"
    window = 10.0

    def __init__(self, session: llm.RealtimeSession[Any], replies: Replies) -> None:
        super().__init__(session, replies)
        self.asked: DuplexRequest | None = None
        """The last request."""
        self.last_ask: str | None = None
        """The event id of the last commentary."""
        self._deliveries: weakref.WeakKeyDictionary[Any, Delivery] = weakref.WeakKeyDictionary()
        self._speech: Delivery | None = None
        """The speech that is being heard."""
        self._last_words: float | None = None
        """When the caller's last words were understood. None once the model has spoken."""
        self._calls_tool = False
        """Whether the plugin is reporting a tool call."""
        self._error: object = None
        """The server's last error."""
        session.on("input_audio_transcription_completed", self._on_words)
        if hasattr(session, "duplex_session"):
            self._observe_model()
        else:  # The session's own __init__ has not run yet.
            asyncio.get_running_loop().call_soon(self._observe_model)

    def _observe_model(self) -> None:
        with suppress_and_log("observing a duplex model"):
            duplex = self.session.duplex_session  # type: ignore[attr-defined]
            duplex.on("openai_server_event_received", self._on_server_event)
            duplex.on("openai_client_event_queued", self._on_sent)
            if hasattr(duplex, "send_event"):
                before(duplex, "send_event", self._on_queued)
            duplex.emit = functools.partial(self._emit_of_model, duplex.emit)

    def watch_deliveries(self) -> None:
        """Do nothing, because each generation is watched by its channels."""

    def target(self) -> Target:
        """Return the provider and the server of the duplex model."""
        model = self.session.realtime_model.duplex_model  # type: ignore[attr-defined]
        if not any(cls.__module__ == _ENGINE for cls in type(model).__mro__):
            return Target(plain_provider(model.provider), model.model)
        server = host_and_port(getattr(getattr(model, "_opts", None), "base_url", None))
        return Target(provider_name(model), model.model, *server)

    def request(self, call: Call) -> DuplexRequest:
        """Create the request for one reply."""
        return DuplexRequest(self, call)

    def starts_reply(self, generation: Generation) -> bool:
        """Return whether the generation is not the answer to a request."""
        return not generation.user_initiated and super().starts_reply(generation)

    def turn_window(self) -> float | None:
        """Return None, because the model decides if it answers."""
        return None

    def turn_delivery(self, generation: Generation) -> Delivery | None:
        """Return the course of a generation."""
        return self._deliveries.get(generation.message_stream)

    def close_turn(self) -> None:
        """Do nothing, because a generation begins with its sound and ends with it."""

    def on_error(self, event: llm.RealtimeModelError) -> None:
        """Note the loss of the connection."""
        if event.recoverable and isinstance(event.error, APIConnectionError):
            self.connected = False
            self.connection_losses += 1
            self._lose()

    def classify_event(self, event: llm.RealtimeModelError) -> Failure:
        """Classify an ``error`` event by the server's error, which the plugin leaves out."""
        if self._error is None or isinstance(event.error, APIConnectionError):
            return super().classify_event(event)
        return failure_from_error(self._error, "the realtime session failed")

    def _lose(self) -> None:
        """Fail the speech, and the request that was sent on the lost connection."""
        if self._speech is not None:
            what = "the connection was lost during the reply"
            self._speech.end(failure_from_event("connection_lost", what))
        if self.waiting is not None and self.asked is not None and self.asked.is_gone:
            what = "the connection was lost before the reply"
            why = failure_from_event("connection_lost", what)
            self.replies.report_failure(why, only=self.asked)
        self._lose_turn()

    def _lose_turn(self) -> None:
        """Report that the answer to the caller's last words is lost, if they are recent."""
        now, words = asyncio.get_running_loop().time(), self._last_words
        self._last_words = None
        if words is None or now - words > self.window or self.waiting is not None:
            return
        what = "the connection was lost before the answer"
        turn = Turn(self, self.turns)
        self.replies.start(self, turn, words)
        self.replies.report_failure(failure_from_event("connection_lost", what), only=turn)

    # --- events of the session and of its model ---------------------------------------------------

    def _on_emit(self, event: str, *args: Any) -> None:
        if event == "generation_created":
            self._watch(args[0])
        elif event == "session_reconnected":
            self.connection_losses += 1
            self.connected = True
            self._lose_turn()
            self.replies.wake()
        else:
            super()._on_emit(event, *args)

    def _on_words(self, event: llm.InputTranscriptionCompleted) -> None:
        if not event.is_final:  # The final event repeats the words, as late as at a reconnect.
            self._last_words = asyncio.get_running_loop().time()

    def _emit_of_model(self, emit: Callable[..., Any], event: str, *args: Any) -> None:
        self._calls_tool = event == "function_call"
        try:
            emit(event, *args)
        finally:
            self._calls_tool = False

    def _on_queued(self, event: object) -> None:
        if field(event, "type") == _ASK:
            self.last_ask = text(field(event, "event_id")) or None

    def _on_sent(self, event: Mapping[str, Any]) -> None:
        if self.asked is not None and event.get("event_id") == self.asked.event_id:
            self.asked.sent_after = self.connection_losses

    def _on_server_event(self, event: Mapping[str, Any]) -> None:
        with suppress_and_log("reading a server event"):
            if event.get("type") != "error":
                return
            self._error = event.get("error")
            refused, asked = text(field(self._error, "client_event_id")), self.asked
            if asked is not None and refused and refused == asked.event_id:
                asked.is_refused = True
                if self.waiting is not None:
                    why = failure_from_error(self._error, "the provider refused the request")
                    self.replies.report_failure(why, only=asked)

    # --- the course of a generation ---------------------------------------------------------------

    def _watch(self, generation: Any) -> None:
        waiting = self.waiting
        if self._calls_tool and waiting is not None:
            # The model answers with a tool call, so LiveKit has to run the tool now.
            generation.user_initiated = True
            self.install(None)
            waiting.set_result(generation)
        delivery = Delivery()
        delivery.response_id = generation.response_id
        messages, calls = generation.message_stream, generation.function_stream
        self._deliveries[messages] = delivery
        messages.send_nowait = functools.partial(self._on_message, delivery, messages.send_nowait)
        messages.close = functools.partial(self._on_end, delivery, messages.close)
        calls.send_nowait = functools.partial(_on_call, delivery, calls.send_nowait)

    def _on_message(self, delivery: Delivery, send: Callable[[Any], None], message: Any) -> None:
        sound = message.audio_stream
        sound.send_nowait = functools.partial(self._on_sound, delivery, sound.send_nowait)
        send(message)

    def _on_sound(self, delivery: Delivery, send: Callable[[Any], None], frame: Any) -> None:
        if delivery is not self._speech:
            self._speech, self._last_words = delivery, None
            self.heard()
        delivery.mark_output()
        send(frame)

    def _on_end(self, delivery: Delivery, close: Callable[[], None]) -> None:
        close()
        if self._speech is delivery:
            self._speech = None
        delivery.nothing_due = not delivery.first_output
        delivery.end()


def _on_call(delivery: Delivery, send: Callable[[Any], None], call: Any) -> None:
    delivery.mark_output(tool=True)
    send(call)


class DuplexRequest(SingleSlotRequest):
    """One reply's request to a duplex model."""

    _adapter: DuplexAdapter

    def __init__(self, adapter: DuplexAdapter, call: Call) -> None:
        super().__init__(adapter, call)
        self.event_id: str | None = None
        """The id of the event, if the model's events have ids."""
        self.sent_after: int | None = None
        """The number of lost connections before the event was sent. None while it is queued."""
        self.is_refused = False
        """Whether the server refused the event."""
        self._is_declined = False
        """Whether the model takes no requests."""
        self._losses = 0
        self._current: asyncio.Future[Generation] | None = None
        """The last attempt."""

    @property
    def is_gone(self) -> bool:
        """Whether the connection is lost on which the request was sent."""
        return self.sent_after is not None and self.sent_after < self._adapter.connection_losses

    def attempt(self, action: semconv.Action) -> asyncio.Future[Generation]:
        """Send the request, or take the slot to keep waiting."""
        adapter = self._adapter
        self._losses = adapter.connection_losses
        other = adapter.waiting
        if other is not None and other is not self._current:
            # The older request is superseded, so it has not failed.
            if self._current is None:
                other.cancel()
            else:
                self._current = asyncio.get_running_loop().create_future()
                self._current.cancel()
                return self._current
        adapter.last_ask = None
        self._current = attempt = super().attempt(action)
        if action != "listen":
            self.event_id, self.sent_after, self.is_refused = adapter.last_ask, None, False
            self._is_declined = attempt.done()
        adapter.asked = self
        return attempt

    def explain(self, error: BaseException) -> Failure:
        """Return the failure of LiveKit's time-out or reconnect, whose errors carry no code."""
        if not isinstance(error, llm.RealtimeError) or self._is_declined:
            return explain(error)
        lost = self._adapter.connection_losses > self._losses
        return failure(error, "connection_lost" if lost else "timeout")

    def next_action(self, why: Failure) -> semconv.Action | None:
        """Return ``send`` if the request cannot be answered any more, or else ``listen``."""
        if self.is_refused or self.is_gone:
            return "send"
        return super().next_action(why)

    def ready(self) -> bool:
        """Return whether the plugin is connected."""
        return self._adapter.connected

    def abandon(self, attempt: asyncio.Future[Generation], then: semconv.Action | None) -> None:
        """Keep the slot for a ``listen`` that follows. Otherwise free it."""
        super().abandon(attempt, then)
        if self.is_refused or self.is_gone:
            self._adapter.watch_for(None)  # There will be no late answer.

    def delivery(self, result: Generation) -> Delivery | None:
        """Watch the reply to its end, because it may be cut."""
        return self._adapter.turn_delivery(result)
