# SPDX-License-Identifier: Apache-2.0
"""OpenAI Realtime and the providers with its engine: Azure OpenAI, xAI, LiveKit inference.

Each request carries an id that its response echoes. So a request may be abandoned safely: its id
goes into the plugin's set of discarded ones, and the plugin then cancels the late response by id
instead of speaking it.

Facts (livekit-plugins-openai 1.8.9, ``livekit/agents/llm/_realtime/openai.py``):

* Cancelling the plugin's future sends ``response.cancel`` *without* an id, which would stop any
  response. Setting an exception on it sends no event. So we never cancel to cut a wait short.
* A reconnect clears the discarded ids, but leaves a request still queued to be sent after it. So
  we keep our own set, and add an id to the plugin's just before it checks the response.
* A response that fails after it was created (``response.done``) closes the streams that the agent
  was given, empty if the response had no output. ``response.cancel`` with its id stops one.
* A request that fails with an ``error`` event of no code (``server_error``) and one discarded at a
  reconnect reach the future alike, as a bare ``RealtimeError``. The raw events distinguish them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from livekit.agents import APIConnectionError, llm
from openai.types.realtime import ResponseCancelEvent

from traced_retry import semconv
from traced_retry.core.failure import Failure, explain, failure, wait_in
from traced_retry.core.guard import log_once, suppress_and_log
from traced_retry.core.request import Delivery
from traced_retry.core.sanitize import host_and_port
from traced_retry.core.telemetry import Target
from traced_retry.livekit.adapter import (
    Adapter,
    Call,
    Generation,
    PassthroughRequest,
    Replies,
    empty_failure,
    failure_from_error,
    failure_from_event,
    timeout_failure,
)
from traced_retry.livekit.events import field, mapping, read_error, text
from traced_retry.livekit.streams import Streams

_OUTPUT = frozenset(
    {
        "response.output_text.delta",
        "response.output_audio.delta",
        "response.output_audio_transcript.delta",
        "response.output_item.done",  # of a function call: its arguments are complete
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
    raw_event: ClassVar[str] = "openai_server_event_received"
    """The session's event that carries each server event, before the plugin handles it."""

    def __init__(self, session: llm.RealtimeSession[Any], replies: Replies) -> None:
        super().__init__(session, replies)
        self.connected = True
        self.echoes: bool | None = None
        """Whether responses carry the id of their request. None before the first one."""
        self._unanswered_turns = 0
        """Committed turns of the caller without a response."""
        self.errors: dict[str, object] = {}
        """The ``error`` events that answered a request, by its id, until the request reads them."""
        self.open: list[OpenAIRequest] = []
        """Requests sent and not yet answered."""
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
        self._emit = session.emit
        session.emit = self._emit_once  # type: ignore[method-assign]
        session.on(self.raw_event, self._on_raw_event)
        session.on("session_reconnected", self._on_reconnected)
        session.on("error", self._on_error)

    def target(self) -> Target:
        """Return the provider and the server, which is in the model's private options."""
        model = self.session.realtime_model
        server = host_and_port(getattr(getattr(model, "_opts", None), "base_url", None))
        return Target(_provider(model), model.model, *server)

    def request(self, call: Call) -> OpenAIRequest:
        """Create the request for one reply."""
        return OpenAIRequest(self, call)

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
            for response_id in self.active.difference(self._speaking):  # Ours have a deadline.
                self.stop(response_id)

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

    def stop(self, response_id: str) -> None:
        """Cancel only that response on the server.

        If the server does not answer within :data:`_UNANSWERED` seconds, treat the response as
        ended.
        """
        cancel = ResponseCancelEvent(type="response.cancel", response_id=response_id)
        self.session.send_event(cancel)  # type: ignore[attr-defined]
        asyncio.get_running_loop().call_later(_UNANSWERED, self._give_up_on, response_id)

    def _give_up_on(self, response_id: str) -> None:
        """End a response whose cancel got no answer."""
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

    def _emit_once(self, event: Any, *args: Any) -> None:
        if event == "generation_created" and any(
            of.done() and not of.cancelled() and of.exception() is None and of.result() is args[0]
            for of in self._unheard
        ):
            return
        self._emit(event, *args)

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
        if kind == "response.created":
            self._on_response_created(mapping(event.get("response")))
        elif kind in _OUTPUT and asker is not None:
            if event.get("delta") or _is_call(mapping(event.get("item"))):
                asker.heard()
        elif kind == "response.done":
            self._on_response_done(mapping(event.get("response")))
        elif kind == "error":
            self._on_server_error(event.get("error"))
        elif kind == "input_audio_buffer.committed":
            self._unanswered_turns += 1

    def _asker_of(self, response_id: str, kind: str) -> OpenAIRequest | None:
        """Return the request that an event belongs to."""
        if response_id not in self._speaking and kind in _OUTPUT and len(self._speaking) == 1:
            # The plugin adds output with any id to its one generation, so it is heard there.
            (response_id,) = self._speaking
        return self._speaking.get(response_id)

    def _on_response_created(self, response: Mapping[str, Any]) -> None:
        # One at a time: the plugin knows only the latest. If xAI's server begins another one, it
        # sends no end of the first.
        response_id = text(response.get("id"))
        self.active = {response_id} if response_id else set()
        self._last_event = asyncio.get_running_loop().time()
        left, self._speaking = self._speaking, {}
        for earlier in left.values():
            if earlier.delivered is not None:
                earlier.delivered.end(cancelled=True)
        asked_by = text(mapping(response.get("metadata")).get("client_event_id"))
        asker = next((request for request in self.open if asked_by in request.ids), None)
        if asker is not None:
            self.echoes = True
            self._speaking[response_id] = asker
            asker.delivered = Delivery()
            return
        if self._unanswered_turns:
            self._unanswered_turns -= 1  # The server answers the caller by itself.
        elif asked_by not in self._abandoned:
            for request in self.open:
                request.may_be_answered = True
        if asked_by in self._abandoned:
            # The plugin looks at its own set right after this event, and a reconnect emptied it.
            del self._abandoned[asked_by]
            self.session._discarded_event_ids.add(asked_by)  # type: ignore[attr-defined]

    def sent(self) -> None:
        """Forget the caller's earlier turns, because the server answers a turn at once."""
        self._unanswered_turns = 0

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

    def _on_response_done(self, response: Mapping[str, Any]) -> None:
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

    def _on_server_error(self, error: object) -> None:
        asked_by = text(field(error, "event_id"))
        if asked_by:
            if any(asked_by in request.ids for request in self.open):
                self.errors[asked_by] = error
            return
        why = failure_from_error(error, "the provider reported an error")
        if why.code == "session_expired":
            self.replies.report_failure(why)
        elif why.kind != "invalid_request" and len(self.open) == 1:
            # The error names no request, and only one is open. It is safe to send that one again,
            # because a late response is cancelled by its id. An error about an invalid request
            # names its event, or is about another event than a request for a reply.
            self.replies.report_failure(why, only=self.open[0])

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


class OpenAIRequest(PassthroughRequest):
    """One reply's request to an OpenAI-like server."""

    def __init__(self, adapter: OpenAIAdapter, call: Call) -> None:
        super().__init__(call)
        self._adapter = adapter
        self.ids: set[str] = set()
        """The ids under which the current attempt was sent."""
        self.may_be_answered = False
        """Whether a response without any id began while the current attempt was open."""
        self.delivered: Delivery | None = None
        """Set once the server has created the response."""
        self._losses = 0
        self._current: asyncio.Future[Generation] | None = None
        self._streams: Streams | None = None
        """The streams that the agent reads, from its first generation on."""
        self._flowing = False
        """Whether the streams have reached the current generation."""

    def attempt(self, action: semconv.Action) -> asyncio.Future[Generation]:
        """Send the request, and read its id."""
        before = self._adapter.pending()
        self._losses = self._adapter.connection_losses
        self.may_be_answered = False
        self._adapter.sent()
        attempt = self.call()
        self.ids = self._adapter.pending() - before
        self._current = attempt
        self.delivered, self._flowing = None, False
        if self._streams is not None:
            self._adapter.announce_once(attempt)
        self._adapter.open.append(self)
        attempt.add_done_callback(self._on_done)
        return attempt

    def explain(self, error: BaseException) -> Failure:
        """Classify by the raw event if there is one. The future's error may lack the code."""
        errors = self._adapter.errors
        raw = next((errors.pop(id_) for id_ in self.ids if id_ in errors), None)
        why = explain(error)
        if raw is not None:
            self.may_be_answered = False  # The server rejected this request.
            found = read_error(raw)
            why = failure(error, found.kind, code=found.code or why.code)
        elif why.code is None and isinstance(error, llm.RealtimeError):
            lost = self._adapter.connection_losses > self._losses
            why = failure(error, "connection_lost" if lost else "timeout")
        if why.kind in ("rate_limit", "overloaded") and why.retry_after is None:
            why = replace(why, retry_after=wait_in(str(error)))
        return why

    def timed_out(self, seconds: float) -> Failure:
        """Return the failure of our own time-out: ``connection_lost`` if the connection is down."""
        return timeout_failure(seconds, "timeout" if self._adapter.connected else "connection_lost")

    def next_action(self, why: Failure) -> semconv.Action | None:
        """Return "send" if the id makes that safe.

        There is no id if a subclass of the plugin sends later than asked. An id does not help if
        the server failed to echo it, even once.
        """
        if self.may_be_answered:
            if self._adapter.echoes is None:
                self._adapter.stop_sending_again()
            return None
        return "send" if self.ids and self._adapter.echoes is not False else None

    def ready(self) -> bool:
        """Return whether a request can be answered: see :meth:`OpenAIAdapter.ready`."""
        return self._adapter.ready()

    def abandon(self, attempt: asyncio.Future[Generation], then: semconv.Action | None) -> None:
        """Discard the id, and end the plugin's future like its own time-out, without a cancel."""
        self._adapter.discard(self.ids)
        self._close()
        if not attempt.done():
            attempt.set_exception(llm.RealtimeError("abandoned by traced_retry"))
        else:
            self._stop(attempt)

    def cancel(self, attempt: asyncio.Future[Generation]) -> None:
        """Cancel as the agent alone would, and keep the id discarded over a reconnect."""
        self._close()
        if not attempt.done():
            self._adapter.discard(self.ids)
            attempt.cancel()
        else:
            self._stop(attempt)

    def delivery(self, result: Generation) -> Delivery | None:
        """Watch the response to its end. Before its first word, another one may continue it."""
        if self.delivered is None:
            return None  # its id is unknown to us, so its streams are left alone
        if self._streams is None:
            self._streams = Streams(result)
        else:
            self._streams.switch_to(result)
        self._flowing = True
        if self.delivered.first_output:
            self.heard()
        return self.delivered

    def heard(self) -> None:
        """Record output. No other generation may follow this one."""
        if self.delivered is not None:
            self.delivered.mark_output()
        if self._streams is not None and self._flowing:
            self._streams.commit()

    def ended(self) -> None:
        """Close the streams, because the agent no longer waits."""
        if self._streams is not None:
            self._streams.close()

    def _stop(self, attempt: asyncio.Future[Generation]) -> None:
        """Cancel a response that has started and will not be read."""
        if attempt.cancelled() or attempt.exception() is not None:
            return
        response_id = text(attempt.result().response_id)
        if response_id in self._adapter.active:
            self._adapter.stop(response_id)

    def _on_done(self, attempt: asyncio.Future[Generation]) -> None:
        # This runs a turn late. After a wait of 0, the next attempt may be open by then.
        if attempt is self._current:
            self._close()

    def _close(self) -> None:
        if self in self._adapter.open:
            self._adapter.open.remove(self)


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


def _provider(model: llm.RealtimeModel) -> str:
    modules = [cls.__module__ for cls in type(model).__mro__]
    if any(name.startswith("livekit.plugins.xai") for name in modules):
        return "x_ai"
    if any(name.startswith("livekit.agents.inference") for name in modules):
        return "livekit"
    if getattr(getattr(model, "_opts", None), "is_azure", False):
        return "azure.ai.openai"
    return "openai"
