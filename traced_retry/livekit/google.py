# SPDX-License-Identifier: Apache-2.0
"""Gemini Live, by API key or on Vertex AI.

A reply does not carry the id of its request: the server's next turn counts as the answer. A second
request could therefore be heard as a second reply. After silence the adapter first waits longer,
under a new future (``listen``). Then it opens a new session without the resumption handle, in which
the server cannot answer the old request, and sends the request there (``restart``).

Facts (livekit-plugins-google 1.7.0 and 1.8.9, ``realtime/realtime_api.py``):

Requests

* ``_pending_generation_fut`` holds the future of one request. The next generation resolves it. If
  it is empty, the plugin treats the generation as started by the server.
* The plugin clears it after 5.0 s and when its future ends, unless it holds another future by then.
* A second ``generate_reply`` cancels the future in it. So does the end of a session.
* Cancelling the future sends ``activity_start`` if activity detection is manual. Otherwise it sends
  no event.

Replies

* The plugin passes each message to ``_handle_server_content`` and ``_handle_tool_calls``. It calls
  ``_start_new_generation`` first if there is no current generation. It looks all three up on the
  instance, so the adapter can replace them there.
* A generation begins with the server's first message of a turn. That may be a thought or words of
  the caller, which are not heard. The turn may end without output (``turn_complete``).
* A model with audio output speaks only audio. Text without audio goes to the transcript.
* If a request is sent while a generation is being spoken, the server either puts the answer into
  that generation, and the future is not resolved, or it ends that generation first
  (``interrupted``).
* ``generation_complete`` ends the words. ``turn_complete`` follows when the server assumes that the
  client has played them, which may be minutes later.

Sessions

* ``_mark_restart_needed`` closes the session some turns of the event loop later. Until then the
  plugin handles its messages: a late reply, which resolves the future, and a new resumption handle.
* A session that is opened without a handle gets the chat context (without function calls) and then
  the messages in ``_msg_ch``. ``_mark_restart_needed`` creates a new ``_msg_ch``.
* Each connection emits ``metrics_collected`` with an empty request id, before the chat context is
  sent and before a message is read.
* No error reaches the future. If a connection is lost, the plugin emits a recoverable ``error``
  event, waits and connects again with the handle. If a connection is refused, the ``error`` event
  is not recoverable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from livekit.agents import llm

from traced_retry import semconv
from traced_retry.core.failure import Failure, Kind, failure
from traced_retry.core.guard import suppress_and_log
from traced_retry.core.request import Delivery
from traced_retry.core.sanitize import host_and_port
from traced_retry.core.telemetry import Target
from traced_retry.livekit.adapter import Adapter, Replies, empty_failure, failure_from_event
from traced_retry.livekit.request import Call, Generation, PassthroughRequest
from traced_retry.livekit.single_slot import before
from traced_retry.livekit.streams import Streams

PLUGIN_TIMEOUT = 5.0
SEND_WINDOW = PLUGIN_TIMEOUT - 0.05
"""Seconds until we listen instead of the plugin, before its own timer clears the slot."""
LISTEN_WINDOW = 5.0

_METHODS = ("_start_new_generation", "_handle_server_content", "_handle_tool_calls")
"""Methods of the session that we replace."""
_STATUS: dict[int, Kind] = {
    400: "invalid_request",
    401: "authentication",
    403: "authentication",
    404: "invalid_request",
    429: "rate_limit",
    503: "overloaded",
    1007: "invalid_request",  # also sent for an invalid API key
}
_CLOSE_CODES = range(1000, 5000)


@dataclass
class _Answer:
    """The generation that answers a request, as far as the server has sent it."""

    response_id: str
    request: GoogleRequest | None
    """The request that it answers. None if the server started it by itself."""
    delivery: Delivery
    caller_spoke: bool = False
    """Whether its turn holds words of the caller, so that it may be the answer to them."""
    interrupted: bool = False
    tool_ran: bool = False
    """Whether the server ran a tool of its own, such as a search."""
    in_transcript: bool = False
    """Whether text without sound has reached the agent's transcript."""
    over: bool = False
    """Whether the plugin has ended the generation."""
    complete: bool = False
    """Whether the server has ended the turn."""

    @property
    def may_be_repeated(self) -> bool:
        """Whether another attempt can do no harm, if this one ends without output."""
        return not (self.tool_ran or self.in_transcript)

    def heard(self, *, tool: bool = False) -> None:
        """Note output, or with ``tool`` a tool call. No other generation may follow this one."""
        self.delivery.mark_output(tool=tool)
        if self.request is not None:
            self.request.commit(self)


class GoogleAdapter(Adapter):
    """The plugin's single slot, and the request that waits in it."""

    required_attributes: ClassVar[tuple[str, ...]] = (
        "_pending_generation_fut",
        "_session_resumption_handle",
        "_mark_restart_needed",
        "_session_should_close",
        "_active_session",
        "_session_error",
        "_current_generation",
        "_mark_current_generation_done",
        *_METHODS,
        "_msg_ch",
        "_send_client_event",
        "_in_user_activity",
        "_opts",
    )
    actions: ClassVar[tuple[semconv.Action, ...]] = ("send", "listen", "restart")

    def __init__(self, session: llm.RealtimeSession[Any], replies: Replies) -> None:
        super().__init__(session, replies)
        self.plugin: Any = session
        self.asked: GoogleRequest | None = None
        """The request with an attempt in progress, if any."""
        self._restarting = False
        """Whether the messages still come from a session that we have given up."""
        self._discarded_response: str | None = None
        self._renew_later = False
        self._answer: _Answer | None = None
        """The latest generation that we asked for."""
        self._emit = session.emit
        session.emit = self._emit_once  # type: ignore[method-assign]
        session.on("input_speech_stopped", self._on_generation_ended)
        session.on("metrics_collected", self._on_metrics)
        session.on("error", self._on_error)
        if all(hasattr(session, name) for name in _METHODS):
            self._replace_methods()

    def starts_reply(self, generation: Generation) -> bool:
        """Return whether nobody waits for it, on a session that is not being begun anew."""
        return not (generation.user_initiated or self._restarting)

    def turn_delivery(self, generation: Generation) -> Delivery | None:
        """Watch the reply to its end, as the answer to a request."""
        assert generation.response_id is not None
        self._answer = _Answer(generation.response_id, None, Delivery())
        self._answer.delivery.response_id = generation.response_id
        return self._answer.delivery

    def _replace_methods(self) -> None:
        self._start_new_generation = self.plugin._start_new_generation
        self.plugin._start_new_generation = self._on_starting
        before(self.session, "_handle_server_content", self._on_content)
        before(self.session, "_handle_tool_calls", self._on_tool_calls)

    def target(self) -> Target:
        """Return ``gcp.gemini`` or ``gcp.vertex_ai``, and the server if the user named one."""
        model = self.session.realtime_model
        vertex = model.provider == "Vertex AI"
        options = getattr(getattr(model, "_opts", None), "http_options", None)
        server = host_and_port(getattr(options, "base_url", None))
        if server[0] is None and not vertex:
            server = host_and_port("https://generativelanguage.googleapis.com")
        return Target("gcp.vertex_ai" if vertex else "gcp.gemini", model.model, *server)

    def request(self, call: Call) -> GoogleRequest:
        """Create the request for one reply."""
        return GoogleRequest(self, call)

    def classify_event(self, event: llm.RealtimeModelError) -> Failure:
        """Classify an event by close code, message status or HTTP status."""
        return _why(event.error)

    def close_turn(self) -> None:
        """End the streams of a reply whose time is up, or the agent would wait for their end."""
        if self._answer is not None:
            self.finish(self._answer)

    @property
    def connected(self) -> bool:
        """Whether there is a session, and it is not about to be closed."""
        plugin = self.plugin
        return plugin._active_session is not None and not plugin._session_should_close.is_set()

    @property
    def speaking(self) -> bool:
        """Whether the server is in the middle of an answer, to us or to the user."""
        generation = self.plugin._current_generation
        return not (generation is None or generation._done or generation._completed_timestamp)

    @property
    def free(self) -> bool:
        """Whether no request waits for the next generation."""
        waiting = self.plugin._pending_generation_fut
        return waiting is None or waiting.done()

    def put(self, future: asyncio.Future[Generation] | None) -> None:
        """Put ``future`` into the slot, so that the next generation resolves it."""
        self.plugin._pending_generation_fut = future

    def renew(self) -> None:
        """Open a new session, so that no turn of the old one is answered, sent or queued."""
        plugin = self.plugin
        plugin._session_resumption_handle = None
        self._withdraw()
        plugin._mark_restart_needed()
        self._restarting = True
        if self.asked is not None:  # Its request went to the old session.
            what = "the session was restarted because of an earlier reply"
            self.asked.lost = "restart"
            lost = failure_from_event("connection_lost", what, ended_locally=True)
            self.replies.report_failure(lost, only=self.asked)

    def finish(self, answer: _Answer) -> None:
        """End a generation without an end from the server, or the agent would wait for it."""
        if not answer.over:
            self.plugin._mark_current_generation_done()

    def interrupt(self) -> None:
        """Call the plugin's own ``interrupt`` and not our hook, which would end other replies."""
        type(self.plugin).interrupt(self.plugin)

    def silence(self) -> None:
        """Make sure that the answer is never heard: restart now, or after the current turn."""
        self._renew_later = self.speaking
        if not self._renew_later:
            self.renew()

    def _withdraw(self) -> None:
        """Take requests for a reply out of the plugin's queue, and keep the rest in order."""
        for message in self._take_queue():
            if not _is_request(message):
                self.plugin._send_client_event(message)

    def _request_is_queued(self) -> bool:
        """Return whether a request waits to be sent on the next connection."""
        queued = self._take_queue()
        for message in queued:
            self.plugin._send_client_event(message)
        return any(map(_is_request, queued))

    def _take_queue(self) -> list[Any]:
        queue, messages = self.plugin._msg_ch, []
        while not queue.empty():
            messages.append(queue.recv_nowait())
        return messages

    # --- events of the plugin ------------------------------------------------------------------

    def _on_metrics(self, metrics: Any) -> None:
        with suppress_and_log("reading a metrics event"):
            if metrics.request_id == "":
                self._on_connected()

    def _on_connected(self) -> None:
        if self.plugin._session_should_close.is_set():
            return  # A restart was marked meanwhile, so the plugin closes this connection as well.
        if self._restarting:
            if self.plugin._session_resumption_handle is not None:
                # The old session's last message, read after we had dropped its handle. This
                # connection may have been made with it.
                self.renew()
                return
            self._restarting = False
        # Right after this event the plugin makes the session the active one.
        asyncio.get_running_loop().call_soon(self.replies.wake)

    def _on_starting(self) -> None:
        """Keep turns of the old session from the request that waits for the new one."""
        if not self._restarting:
            self._start_new_generation()
            return
        waiting = self.plugin._pending_generation_fut
        self.put(asyncio.get_running_loop().create_future())  # Else the agent would speak it.
        self._start_new_generation()
        self.put(waiting)

    def _emit_once(self, event: Any, *args: Any) -> None:
        if event == "generation_created":
            with suppress_and_log("reading a generation event"):
                if self._is_repetition(*args):
                    return  # The agent has the first one, and its streams continue with this one.
        self._emit(event, *args)

    def _is_repetition(self, event: Generation) -> bool:
        if self._restarting:
            self._discarded_response = event.response_id
        elif event.user_initiated and event.response_id is not None and self.asked is not None:
            self._answer = _Answer(event.response_id, self.asked, Delivery())
            self._answer.delivery.response_id = event.response_id
            return self.asked.has_streams
        return False

    def _on_content(self, content: Any) -> None:
        generation = self.plugin._current_generation
        if generation is None or generation._done:
            return
        parts = list(_parts(content))
        spoken = _said(content, parts)
        sound = any(getattr(part, "inline_data", None) for part in parts)
        if spoken or sound:
            self._on_output(generation)
        answer = self.answer(generation.response_id)
        if answer is None:
            return
        answer.delivery.mark_activity()
        answer.caller_spoke |= bool(getattr(content.input_transcription, "text", None))
        answer.interrupted |= bool(content.interrupted)
        answer.tool_ran |= _ran_tool(content, parts)
        if sound or (spoken and not self.session.realtime_model.capabilities.audio_output):
            answer.heard()
        if content.generation_complete and answer.delivery.first_output:
            answer.delivery.end()

    def _on_tool_calls(self, tool_call: Any) -> None:
        generation = self.plugin._current_generation
        if generation is None or not tool_call.function_calls:
            return
        self._on_output(generation)
        if (answer := self.answer(generation.response_id)) is not None:
            answer.heard(tool=True)

    def _on_output(self, generation: Any) -> None:
        if self.asked is not None and self.asked.sent_during is generation:
            self.asked.may_be_heard = True

    def _on_generation_ended(self, _: object = None) -> None:
        with suppress_and_log("reading the end of a generation"):
            # Emitted as the first step of ending it, also before a next one begins.
            generation = self.plugin._current_generation
            if generation is None:
                return
            if generation.response_id == self._discarded_response:
                generation.output_text = ""  # otherwise it becomes part of the chat context
            if (answer := self.answer(generation.response_id)) is not None:
                answer.over = True
                answer.in_transcript = bool(generation.output_text)
                answer.complete = bool(
                    generation._completed_timestamp or not generation.function_ch.empty()
                )
                self._end(answer)
            if self._renew_later:
                self._renew_later = False
                self.renew()
            asyncio.get_running_loop().call_soon(self.replies.wake)

    def _end(self, answer: _Answer) -> None:
        delivery, failed = answer.delivery, None
        lost = self.plugin._session_error is not None or not delivery.first_output
        if not answer.complete and lost:
            if answer.request is not None:
                answer.request.lost = "send"
            what = "the connection was lost during the reply"
            failed = failure_from_event("connection_lost", what)
        elif not (delivery.first_output or answer.interrupted):
            delivery.nothing_due = answer.request is None and self._may_stay_silent
            failed = None if delivery.nothing_due else empty_failure("turn")
        delivery.end(failed, cancelled=answer.interrupted)

    @property
    def _may_stay_silent(self) -> bool:
        """Whether the model was allowed not to answer the caller (Gemini's proactive audio)."""
        return getattr(self.plugin._opts, "proactivity", None) is True

    def answer(self, response_id: str | None) -> _Answer | None:
        """Return the answer with that response id, if it is the latest that we requested."""
        found = self._answer
        return found if found is not None and found.response_id == response_id else None

    def _on_error(self, event: llm.RealtimeModelError) -> None:
        with suppress_and_log("reading an error event"):
            why = self.classify_event(event)
            if not event.recoverable:
                self.replies.report_failure(why, "not_recoverable")
            elif self.asked is not None and not self._request_is_queued():
                # A request that was made after the loss is sent on the next connection.
                self.asked.lost = "send"
                self.replies.report_failure(why, only=self.asked)


class GoogleRequest(PassthroughRequest):
    """One reply's request to Gemini Live."""

    def __init__(self, adapter: GoogleAdapter, call: Call) -> None:
        super().__init__(call)
        self._adapter = adapter
        self.lost: semconv.Action | None = None
        """The action that can follow, if the request was lost with its connection."""
        self.sent_during: Any = None
        """The generation that was being spoken when the request was sent."""
        self.may_be_heard = False
        """Whether that generation went on, so that it may hold the answer."""
        self._action: semconv.Action = "send"
        self._refused = False
        self._heard_by: asyncio.Future[Generation] | None = None
        """The listening future, from the time when the earlier attempt was abandoned."""
        self._answer: _Answer | None = None
        """The generation that answers the current attempt."""
        self._streams: Streams | None = None
        """The streams that the agent reads, from its first generation on."""

    @property
    def has_streams(self) -> bool:
        """Whether the agent has a generation for this reply."""
        return self._streams is not None

    def attempt(self, action: semconv.Action) -> asyncio.Future[Generation]:
        """Send the request, or keep listening in the place of the earlier attempt."""
        self._action, self.lost, self._answer = action, None, None
        attempt, self._heard_by = self._heard_by, None
        if attempt is None:
            adapter = self._adapter
            self.may_be_heard = False
            self.sent_during = adapter.plugin._current_generation if adapter.speaking else None
            self._refused = True  # should it raise
            attempt = self.call()
            self._refused = attempt.done()
        if not self._refused:
            self._adapter.asked = self
            attempt.add_done_callback(lambda _: self._close())
        return attempt

    def limit(self, action: semconv.Action) -> float | None:
        """Return slightly less than the plugin's time-out, or None if only the deadline ends it."""
        if action != "listen":
            return SEND_WINDOW
        return None if self._adapter.replies.policy.on_silence == "listen" else LISTEN_WINDOW

    def explain(self, error: BaseException) -> Failure:
        """Classify an error. The plugin refuses at once a request that the model cannot handle."""
        if self._refused and isinstance(error, llm.RealtimeError):
            return failure(error, "invalid_request")
        return super().explain(error)

    def next_action(self, why: Failure) -> semconv.Action | None:
        """Return ``send`` after a loss. After silence listen once, then follow ``on_silence``.

        If the answer may have been heard or is being spoken, only listen.
        """
        answer, on_silence = self._answer, self._adapter.replies.policy.on_silence
        if answer is not None:
            if not answer.may_be_repeated:
                return None
            # After words of the caller, the empty turn may have been the answer to those. The
            # answer to the request may follow, but not after a restart.
            empty = why.kind == "empty_response" and not answer.caller_spoke
            return self.lost or ("send" if empty else "restart")
        if self.lost is not None:
            return None if self.may_be_heard else self.lost
        if self._action != "listen" or on_silence == "listen" or self._adapter.speaking:
            return "listen"
        if on_silence == "resend":
            return "send"
        return None if self.may_be_heard else "restart"

    def ready(self) -> bool:
        """Return whether a request can be answered now. A ``listen`` is always possible."""
        adapter = self._adapter
        if self._heard_by is not None:
            return True
        return adapter.connected and adapter.free and not adapter.speaking

    def abandon(self, attempt: asyncio.Future[Generation], then: semconv.Action | None) -> None:
        """Free the slot, and restart the session if the old turn might still be answered."""
        self._close()
        if self._answer is not None:
            self._adapter.finish(self._answer)
            if self._answer.complete and then != "restart":
                return  # The server sends no more of it.
        if then == "listen":
            self._heard_by = asyncio.get_running_loop().create_future()
            self._adapter.put(self._heard_by)
        elif not self._refused:
            self._leave(attempt)
            if then == "send" and self.lost is None:
                pass  # on_silence="resend": the caller may hear both
            elif then is None:
                self._adapter.silence()
            else:
                self._adapter.renew()
        attempt.cancel()  # out of the slot, its cancel only stops the plugin's timer

    def cancel(self, attempt: asyncio.Future[Generation]) -> None:
        """Interrupt as the plugin does, and restart if that does not stop the server."""
        self._close()
        if attempt.done() and not attempt.cancelled() and attempt.exception() is None:
            # The reply began in the moment of the cancel. It will not be read.
            self._adapter.interrupt()
            return
        self._leave(attempt)
        attempt.cancel()
        self._adapter.interrupt()
        if not _interrupts(self._adapter.plugin):
            self._adapter.silence()

    def delivery(self, result: Generation) -> Delivery | None:
        """Watch the reply to its end. Before its first word, another generation may continue it."""
        self._answer = answer = self._adapter.answer(result.response_id)
        if answer is None:
            return None
        if self._streams is None:
            self._streams = Streams(result)
        else:
            self._streams.switch_to(result)
        if answer.delivery.first_output:
            self._streams.commit()
        return answer.delivery

    def commit(self, answer: _Answer) -> None:
        """Expect no other generation, because this one has output."""
        if self._answer is answer and self._streams is not None:
            self._streams.commit()

    def ended(self) -> None:
        """End a generation that the server has left open, and the streams of an unheard one."""
        answer = self._answer
        if answer is not None and (failed := answer.delivery.failure) and failed.ended_locally:
            self._adapter.finish(answer)
        if self._streams is not None:
            self._streams.close()

    def _leave(self, attempt: asyncio.Future[Generation]) -> None:
        if self._adapter.plugin._pending_generation_fut is attempt:
            self._adapter.put(None)

    def _close(self) -> None:
        if self._adapter.asked is self:
            self._adapter.asked = None


def _parts(content: Any) -> Iterator[Any]:
    """Yield the parts of a message, without the model's thoughts."""
    for part in getattr(content.model_turn, "parts", None) or ():
        if not part.thought:
            yield part


def _said(content: Any, parts: list[Any]) -> bool:
    """Return whether a message holds words of the model."""
    transcript = getattr(content.output_transcription, "text", None)
    return bool(transcript) or any(part.text for part in parts)


def _ran_tool(content: Any, parts: list[Any]) -> bool:
    """Return whether a message shows that the server ran a tool of its own."""
    marks = ("grounding_metadata", "url_context_metadata")
    code = ("executable_code", "code_execution_result")
    return any(getattr(content, name, None) for name in marks) or any(
        getattr(part, name, None) for part in parts for name in code
    )


def _is_request(message: Any) -> bool:
    return getattr(message, "turn_complete", None) is True


def _interrupts(plugin: Any) -> bool:
    """Return whether the server knows that the user speaks, and stops for that."""
    config = getattr(plugin._opts, "realtime_input_config", None)
    stops = getattr(config, "activity_handling", None) != "NO_INTERRUPTION"
    return bool(plugin._in_user_activity) and stops


def _why(error: BaseException) -> Failure:
    """Classify the error of an event by close code, message status or HTTP status."""
    closed, refused = getattr(error, "rcvd", None), getattr(error, "response", None)
    if closed is not None:
        code = closed.code
    elif isinstance(getattr(refused, "status_code", None), int):
        code = refused.status_code  # type: ignore[union-attr]
    else:
        code = vars(error).get("code")
    what = "the realtime session failed"
    if not isinstance(code, int):
        return failure_from_event(
            "unknown" if isinstance(error, ValueError) else "connection_lost", what
        )
    kind = _STATUS.get(code, "connection_lost" if code in _CLOSE_CODES else "server_error")
    if kind == "connection_lost" and "quota" in str(error):
        kind = "quota"  # Gemini closes with 1011 and gives the reason as text
    return failure_from_event(kind, what, str(code))
