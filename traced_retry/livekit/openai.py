# SPDX-License-Identifier: Apache-2.0
"""OpenAI Realtime and the providers with its engine: Azure OpenAI, xAI, LiveKit inference.

Each request carries an id that its response echoes. So a request may be sent again while the first
one stays open: the first answer becomes the reply. The ids of the others go into the plugin's set
of discarded ones, and the plugin then cancels their responses by id instead of speaking them.

Facts (livekit-plugins-openai 1.8.9, ``livekit/agents/llm/_realtime/openai.py``):

* Cancelling the plugin's future sends ``response.cancel`` *without* an id, which would stop any
  response. Setting an exception on it sends no event. So we never cancel to cut a wait short.
* The plugin emits the raw ``response.created`` before it looks the id up. So the id of an earlier
  request can be given the future of the current attempt just in time.
* A reconnect clears the discarded ids, but leaves a request still queued to be sent after it. So
  we keep our own set, and add an id to the plugin's just before it checks the response.
* A response that fails after it was created (``response.done``) closes the streams that the agent
  was given, empty if the response had no output. ``response.cancel`` with its id stops one.
* A request that fails with an ``error`` event of no code (``server_error``) and one discarded at a
  reconnect reach the future alike, as a bare ``RealtimeError``. The raw events distinguish them.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from livekit.agents import APIConnectionError, llm
from openai.types.realtime import ResponseCancelEvent

from traced_retry import semconv
from traced_retry.core.failure import Failure
from traced_retry.core.guard import log_once, suppress_and_log
from traced_retry.core.request import Delivery
from traced_retry.core.sanitize import host_and_port
from traced_retry.core.telemetry import Target
from traced_retry.livekit.adapter import (
    Adapter,
    Replies,
    empty_failure,
    failure_from_error,
    failure_from_event,
)
from traced_retry.livekit.events import field, mapping, text
from traced_retry.livekit.openai_request import OpenAIRequest, OpenAITurn, is_resolved_with
from traced_retry.livekit.request import Call, Generation, timeout_failure

_TOOL_CALL = "response.output_item.done"
"""The end of an item. If this is a function call, its arguments are complete."""
_OUTPUT = frozenset(
    {
        "response.output_text.delta",
        "response.output_audio.delta",
        "response.output_audio_transcript.delta",
        _TOOL_CALL,
    }
)
"""Events with output: words, sound or a tool call."""
_LIMIT = "max_output_tokens"
"""The reason of an ``incomplete`` response that reached ``max_response_output_tokens``."""
_SILENT = 8.0
"""Seconds without an event until a response that delays a reply of ours is cancelled.

A reasoning model may need several seconds for its first word.
"""
_UNANSWERED = 2.0
"""Seconds until a ``response.cancel`` without an answer counts as lost."""
_REMEMBERED = 256
"""The largest number of abandoned ids per session. The server answers or forgets a request."""


class OpenAIAdapter(Adapter):
    """The state of the replies of one session, read from the server's events."""

    required_attributes: ClassVar[tuple[str, ...]] = (
        "_response_created_futures",
        "_discarded_event_ids",
    )
    relied_methods: ClassVar[tuple[str, ...]] = (
        "send_event",
        "_run_ws",
        "_handle_response_created",
        "_handle_response_done",
        "_handle_error",
    )
    actions: ClassVar[tuple[semconv.Action, ...]] = ("send", "hedge", "listen")
    turn_actions: ClassVar[tuple[semconv.Action, ...]] = ("listen", "send")
    recovers_turns: ClassVar[bool] = True
    """Whether a reply that the server started may be requested again."""
    raw_event: ClassVar[str] = "openai_server_event_received"
    """The session's event that carries each server event, before the plugin handles it."""

    def __init__(self, session: llm.RealtimeSession[Any], replies: Replies) -> None:
        super().__init__(session, replies)
        self.connected = True
        self.echoes: bool | None = None
        """Whether responses carry the id of their request. None before the first one."""
        self._unanswered_turns = 0
        """Committed turns of the caller without a response."""
        self._answers_turns = False
        """Whether the server starts replies by itself, according to its last description of the
        session."""
        self._stopped_speaking: float | None = None
        """Time on the event loop's clock when the caller stopped speaking."""
        self._turn: OpenAITurn | None = None
        """The reply that the server has started or should start, until it ends."""
        self.unanswered: OpenAIRequest | None = None
        """The last request or turn that was reported as lost and may still be answered."""
        self._transcribed = ""
        """The id of the last item with the caller's words as text."""
        self.errors: dict[str, object] = {}
        """The ``error`` events that answered a request, by its id, until the request reads them."""
        self.open: list[OpenAIRequest] = []
        """Requests sent and not yet answered."""
        self.earlier: dict[str, OpenAIRequest] = {}
        """Requests that stay open after the end of their attempt, by id."""
        self._surplus = ""
        """The response that is one too many, on a server that does not echo ids."""
        self.active: set[str] = set()
        """Responses that the server has begun and not ended, by id."""
        self._last_event = 0.0
        """Time of the last event of a response, on the event loop's clock."""
        self._watch: asyncio.TimerHandle | None = None
        """The timer that detects silence of the active response while a reply waits for its end."""
        self._abandoned: dict[str, None] = {}
        self._speaking: dict[str, OpenAIRequest] = {}
        """Requests with a started response, by response id."""
        self._unheard: set[asyncio.Future[Generation]] = set()
        """Requests with a generation that continues an earlier one for the agent."""
        self._handlers: dict[str, Callable[[Mapping[str, Any]], None]] = {
            "session.created": self._on_session,
            "session.updated": self._on_session,
            "input_audio_buffer.speech_started": self._on_speech_started,
            "input_audio_buffer.speech_stopped": self._on_speech_stopped,
            "input_audio_buffer.committed": self._on_committed,
            "conversation.item.input_audio_transcription.completed": self._on_transcribed,
            "response.created": self._on_response_created,
            "response.done": self._on_response_done,
            "error": self._on_server_error,
        }
        self._emit = session.emit
        session.emit = self._emit_once  # type: ignore[method-assign]
        session.on(self.raw_event, self._on_raw_event)
        session.on("session_reconnected", self._on_reconnected)
        session.on("error", self._on_error)

    def target(self) -> Target:
        """Return the provider and the server, which is in the model's private options."""
        model = self.session.realtime_model
        server = host_and_port(getattr(getattr(model, "_opts", None), "base_url", None))
        return Target(provider_name(model), model.model, *server)

    def request(self, call: Call) -> OpenAIRequest:
        """Create the request for one reply."""
        request = OpenAIRequest(self, call)
        request.adopts = self._adopts
        return request

    @functools.cached_property
    def _adopts(self) -> bool:
        """Return whether a request stays open after its time, until any of its reply is answered.

        A request to xAI's server is abandoned before the next one is sent.
        """
        return not _runs_two_responses(self.session.realtime_model)

    def ready(self) -> bool:
        """Return whether the socket is up and no response is active.

        The server rejects a request if a response is active. If that response has no event for
        :data:`_SILENT` seconds, it is cancelled, so it delays replies only for a limited time.
        """
        if self.active and self._watch is None:
            self._watch_active()
        return self.connected and not self.active

    def _watch_active(self) -> None:
        self._watch = None
        loop = asyncio.get_running_loop()
        remaining = self._last_event + _SILENT - loop.time()
        if self.active and remaining > 0:
            self._watch = loop.call_later(remaining, self._watch_active)
            return
        with suppress_and_log("cancelling a silent response"):
            for response_id in list(self.active):
                asker = self._speaking.get(response_id)
                if asker is None:
                    self.stop(response_id)
                elif isinstance(asker, OpenAITurn) and asker.delivered is not None:
                    asker.delivered.end(timeout_failure(_SILENT))
                # A response to a request of ours has its own deadline.

    def pending(self) -> set[str]:
        """Return the ids of the requests that the plugin waits for."""
        return set(self.session._response_created_futures)  # type: ignore[attr-defined]

    def discard(self, ids: set[str]) -> None:
        """Cancel the responses to these requests by id when they come."""
        self._abandoned.update(dict.fromkeys(ids))
        for abandoned in ids:
            self.errors.pop(abandoned, None)
        while len(self._abandoned) > _REMEMBERED:
            del self._abandoned[next(iter(self._abandoned))]
        self.session._discarded_event_ids.update(ids)  # type: ignore[attr-defined]

    def adopt(self, id_: str, attempt: asyncio.Future[Generation]) -> None:
        """Have the plugin resolve ``attempt`` with the response to the earlier request ``id_``."""
        self.session._discarded_event_ids.discard(id_)  # type: ignore[attr-defined]
        self.session._response_created_futures[id_] = attempt  # type: ignore[attr-defined]

    def stop(self, response_id: str) -> None:
        """Cancel only that response on the server.

        If the server does not answer within :data:`_UNANSWERED` seconds, treat the response as
        ended.
        """
        cancel = ResponseCancelEvent(type="response.cancel", response_id=response_id)
        self.session.send_event(cancel)  # type: ignore[attr-defined]
        asyncio.get_running_loop().call_later(_UNANSWERED, self._give_up_on, response_id)

    def _give_up_on(self, response_id: str) -> None:
        """End a response after its cancel got no answer."""
        if response_id not in self.active:
            return
        with suppress_and_log("ending a response without an answer"):
            self.active.discard(response_id)
            # At max_session_duration the plugin waits for the end of its current generation before
            # it renews the connection. If the connection was lost meanwhile, this end never comes.
            close = getattr(self.session, "_close_current_generation", None)
            if close is not None:
                close("the server did not answer a cancel")
            self.replies.wake()

    def announce_once(self, attempt: asyncio.Future[Generation]) -> None:
        """Suppress ``generation_created`` of ``attempt``: the agent had one for this reply."""
        self._unheard.add(attempt)
        attempt.add_done_callback(self._unheard.discard)

    def observe_turns(self) -> None:
        """Do nothing, because :meth:`_emit_once` sees the replies that the server starts."""

    def _emit_once(self, event: Any, *args: Any) -> None:
        turn = None
        if event == "generation_created":
            if any(is_resolved_with(args[0], attempt) for attempt in self._unheard):
                return
            if self._surplus and args[0].response_id == self._surplus:
                self.stop(self._surplus)
                return
            with suppress_and_log("observing a reply of the server"):
                turn = self._turn_of(args[0])
        if turn is None:
            self._emit(event, *args)
        else:
            self.replies.emit(turn, functools.partial(self._emit, event, *args))

    # --- replies that the server starts --------------------------------------------------------

    def _turn_of(self, generation: Generation) -> OpenAITurn | None:
        """Return the caller's turn that ``generation`` answers, or None if it answers a request.

        Called when the plugin announces the response, directly after ``response.created``.
        """
        turn = self._turn
        if generation.user_initiated:
            if turn is None or not turn.was_resolved_with(generation):
                return None
            # The turn had no generation before, so LiveKit must take this one for the server's.
            generation.user_initiated = False
            self.replies.wake()
            return turn
        if any(request.may_be_answered for request in self.open):
            return None  # It may answer that request, on a server that does not echo ids.
        if self.unanswered is not None:
            self.unanswered.on_late()
            self.unanswered = None
            return None
        if turn is None or turn.begun:
            self._end_turn()
            turn = self._turn = OpenAITurn(self, "")
        response_id = text(generation.response_id)
        turn.delivered = self._begin_delivery(response_id, turn)
        turn.answer(generation)
        return turn

    def _begin_delivery(self, response_id: str, request: OpenAIRequest) -> Delivery:
        self._speaking[response_id] = request
        delivery = Delivery()
        delivery.response_id = response_id
        return delivery

    def _on_session(self, event: Mapping[str, Any]) -> None:
        """Learn from the server's description of the session whether it starts replies."""
        session = mapping(event.get("session"))
        audio = mapping(mapping(session.get("audio")).get("input"))
        for description in (audio, session):
            if "turn_detection" in description:
                detection = description["turn_detection"]
                starts = detection is not None and field(detection, "create_response") is not False
                self._answers_turns = starts
                return

    def _on_speech_started(self, _: Mapping[str, Any]) -> None:
        """End a reply that has not begun, because the server answers what the caller says now."""
        self._stopped_speaking = None
        if self._turn is not None and self._turn not in self._speaking.values():
            self.replies.interrupt_reply(self._turn)

    def _on_speech_stopped(self, _: Mapping[str, Any]) -> None:
        self._stopped_speaking = asyncio.get_running_loop().time()

    def _on_transcribed(self, event: Mapping[str, Any]) -> None:
        if event.get("transcript"):
            self._transcribed = text(event.get("item_id"))

    def _on_committed(self, event: Mapping[str, Any]) -> None:
        """Expect the server's answer to the caller."""
        self._unanswered_turns += 1
        self.unanswered = None
        stopped, self._stopped_speaking = self._stopped_speaking, None
        if self._answers_turns and not self.active:
            self._end_turn()
            self._turn = OpenAITurn(self, text(event.get("item_id")))
            now = asyncio.get_running_loop().time()
            self.replies.start(self, self._turn, now if stopped is None else stopped)

    def _end_turn(self) -> None:
        """End the turn before, if there is one, because another reply takes its place."""
        if self._turn is not None:
            self._turn.supersede()

    def is_transcribed(self, item_id: str) -> bool:
        """Return whether a new connection gets the caller's words in that item."""
        return bool(item_id) and item_id == self._transcribed

    def forget_turn(self, turn: OpenAITurn) -> None:
        """Note that the reply to ``turn`` has ended."""
        if self._turn is turn:
            self._turn = None

    # --- events of the server ------------------------------------------------------------------

    def _on_raw_event(self, event: Mapping[str, Any]) -> None:
        with suppress_and_log("reading a server event"):
            self._on_server_event(str(event.get("type")), event)

    def _on_server_event(self, kind: str, event: Mapping[str, Any]) -> None:
        if not self.connected:
            self._on_connected()
        response_id = text(event.get("response_id"))
        if response_id in self.active:
            self._last_event = asyncio.get_running_loop().time()
        asker = self._asker_of(response_id, kind)
        if asker is not None and asker.delivered is not None:
            asker.delivered.mark_activity()
        if kind in _OUTPUT and asker is not None:
            if event.get("delta") or _is_call(mapping(event.get("item"))):
                asker.heard(tool=kind == _TOOL_CALL)
        elif (handle := self._handlers.get(kind)) is not None:
            handle(event)

    def _asker_of(self, response_id: str, kind: str) -> OpenAIRequest | None:
        """Return the request that an event belongs to."""
        if response_id not in self._speaking and kind in _OUTPUT and len(self._speaking) == 1:
            # The plugin adds output with any id to its one generation, so it is heard there.
            (response_id,) = self._speaking
        return self._speaking.get(response_id)

    def _on_response_created(self, event: Mapping[str, Any]) -> None:
        response = mapping(event.get("response"))
        # One at a time: the plugin knows only the latest. xAI's server leaves one in flight where
        # it begins another, and tells no end of it.
        response_id = text(response.get("id"))
        self.active = {response_id} if response_id else set()
        self._last_event = asyncio.get_running_loop().time()
        left, self._speaking = self._speaking, {}
        for earlier in left.values():
            if earlier.delivered is not None:
                earlier.delivered.end(cancelled=True)
        asked_by = text(mapping(response.get("metadata")).get("client_event_id"))
        asker = next((request for request in self.open if asked_by in request.ids), None)
        if asker := asker or self.earlier.get(asked_by):
            self._on_answer(asker, asked_by, response_id)
            return
        if self._unanswered_turns:
            self._unanswered_turns -= 1  # The server answers the caller by itself.
        elif asked_by not in self._abandoned:
            for request in self.open:
                if request.is_answered_twice():
                    self._surplus = response_id
        if asked_by in self._abandoned:
            # The plugin looks at its own set right after this event, and a reconnect emptied it.
            del self._abandoned[asked_by]
            self.session._discarded_event_ids.add(asked_by)  # type: ignore[attr-defined]

    def _on_answer(self, asker: OpenAIRequest, asked_by: str, response_id: str) -> None:
        """Take the response for the reply of ``asker``, which sent the request ``asked_by``."""
        self.echoes = True
        earlier = asker.settle(asked_by)
        asker.delivered = self._begin_delivery(response_id, asker)
        asker.delivered.answers_attempt = earlier
        if self._turn is not None and not self._turn.begun and self._turn is not asker:
            self._end_turn()  # The agent's request answers the caller.
        if asker not in self.open:  # The reply is between two attempts, and the next one listens.
            self.replies.wake()

    def sent(self) -> None:
        """Forget the caller's earlier turns, because the server answers a turn at once."""
        self._unanswered_turns = 0
        self.unanswered = None

    def stop_sending_again(self) -> None:
        """Treat the server as one without ids, because a response lacked the id of its request.

        Such a response cannot be matched to its request. If the request were sent again, the caller
        could hear a second reply.
        """
        self.echoes = False
        log_once(
            f"{self.target().provider} does not echo request metadata in its responses: replies of "
            "such a session are traced and never sent again"
        )

    def _on_response_done(self, event: Mapping[str, Any]) -> None:
        response = mapping(event.get("response"))
        response_id = text(response.get("id"))
        if len(self._speaking) == 1 and ("" in self._speaking or not response_id):
            (response_id,) = self._speaking  # An id is missing, so only one response can be meant.
        self.active.discard(response_id)
        asker = self._speaking.pop(response_id, None)
        if asker is not None and asker.delivered is not None:
            status = response.get("status")
            failed = None
            if status in ("failed", "incomplete"):
                failed = _why_unfinished(response)
            elif status == "completed" and not asker.delivered.first_output:
                failed = _why_empty(response)
            if failed is not None and failed.code == _LIMIT and asker.delivered.first_output:
                failed = None  # The session's own limit ended a reply that was heard.
            asker.delivered.end(failed, cancelled=status == "cancelled")
        self.replies.wake()

    def _on_server_error(self, event: Mapping[str, Any]) -> None:
        error = event.get("error")
        asked_by = text(field(error, "event_id"))
        if asked_by:
            if any(asked_by in request.ids for request in self.open):
                self.errors[asked_by] = error
            elif (request := self.earlier.get(asked_by)) is not None:
                request.reject(asked_by, error)
            return
        why = failure_from_error(error, "the provider reported an error")
        if why.code == "session_expired":
            self.replies.report_failure(why)
            return
        waiting = list(self.open)
        if self._turn is not None and not self._turn.begun and self._turn not in waiting:
            waiting.append(self._turn)
        if why.kind != "invalid_request" and len(waiting) == 1:
            # The error names no request, and only one is open. It is safe to send that one again,
            # because a late response is cancelled by its id. An error about an invalid request
            # names its event, or is about another event than a request for a reply.
            self.replies.report_failure(why, only=waiting[0])

    def _on_connected(self) -> None:
        # A first connection that failed emits no session_reconnected when it comes up after all;
        # any event of the server tells as well.
        self.connected = True
        self.replies.wake()

    def _on_error(self, event: llm.RealtimeModelError) -> None:
        if not (event.recoverable and isinstance(event.error, APIConnectionError)):
            return
        with suppress_and_log("reading an error event"):
            self.connected = False
            self._lose()

    def _on_reconnected(self, _: object) -> None:
        # There is no error before it if the plugin renews an old connection.
        with suppress_and_log("reading a reconnect"):
            self._lose()
            self._on_connected()

    def _lose(self) -> None:
        """Forget the requests and responses of the earlier connection. They get no answer."""
        self.connection_losses += 1
        self.active.clear()
        lost, self._speaking = self._speaking, {}
        for asker in lost.values():
            if asker.delivered is not None:
                what = "the connection was lost during the reply"
                asker.delivered.end(failure_from_event("connection_lost", what))
        if self._turn is not None and not self._turn.begun:
            what = "the connection was lost before the reply"
            why = failure_from_event("connection_lost", what)
            self.replies.report_failure(why, only=self._turn)


def _is_call(item: Mapping[str, Any]) -> bool:
    return item.get("type") == "function_call"


def _why_unfinished(response: Mapping[str, Any]) -> Failure:
    details = response.get("status_details")
    what = f"the response ended {response.get('status')}"
    return failure_from_error(field(details, "error"), what, field(details, "reason"))


def _why_empty(response: Mapping[str, Any]) -> Failure | None:
    """Return the failure of a completed response without a word, a sound or a tool call."""
    output = response.get("output")
    for item in map(mapping, output if isinstance(output, list) else ()):
        content = item.get("content")
        parts = map(mapping, content if isinstance(content, list) else ())
        if _is_call(item) or any(
            part.get(name) for part in parts for name in ("text", "transcript", "audio")
        ):
            return None
    return empty_failure("response")


def _runs_two_responses(model: llm.RealtimeModel) -> bool:
    """Return whether the server may run two responses at once, as xAI's does."""
    return provider_name(model) == "x_ai" or str(model.model).startswith("xai/")


def provider_name(model: object) -> str:
    """Return ``gen_ai.provider.name`` of a model with OpenAI's engine."""
    modules = [cls.__module__ for cls in type(model).__mro__]
    if any(name.startswith("livekit.plugins.xai") for name in modules):
        return "x_ai"
    if any(name.startswith("livekit.agents.inference") for name in modules):
        return "livekit"
    if getattr(getattr(model, "_opts", None), "is_azure", False):
        return "azure.ai.openai"
    return "openai"
