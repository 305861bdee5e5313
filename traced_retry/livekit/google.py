# SPDX-License-Identifier: Apache-2.0
"""Gemini Live, by API key or on Vertex AI.

A reply carries no id of its request: whatever the server says next is taken for the answer. So a
request is never sent again while an earlier one may still be answered. After silence the wait
goes on under a fresh future (``listen``); then the session is begun anew without its resumption
handle, so that the old turn is gone, and the request is sent there (``restart``).

Facts (livekit-plugins-google 1.7.0 and 1.8.9, ``realtime/realtime_api.py``):

* ``_pending_generation_fut`` is the one slot for whoever waits; the next generation resolves what
  is in it, and is spoken as one of the server's own where it is empty. A time-out of 5.0 s and
  the end of a future each clear the slot, if that future is still in it.
* A second ``generate_reply`` cancels the future in the slot. The end of a session does so too.
* ``_mark_restart_needed`` has the session closed some turns of the event loop later. Until then
  what is read from it counts: a late reply, and also a new resumption handle.
* A session connected without a handle is told the chat context (function calls excepted), and
  then whatever is in ``_msg_ch``; the channel is renewed when a restart is marked.
* No error reaches the future. A lost connection emits a recoverable ``error`` event, sleeps and
  connects again, with the handle; a connection that is refused emits one that is not recoverable.
* Each connection made emits ``metrics_collected`` with an empty request id, before the chat
  context is told and before anything is read from it.
* Cancelling the future sends nothing, but with manual activity detection an ``activity_start``.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from livekit.agents import llm

from traced_retry import semconv
from traced_retry.core.failure import Failure, Kind, failure
from traced_retry.core.guard import suppress_and_log
from traced_retry.core.request import Delivery
from traced_retry.core.sanitize import host_and_port
from traced_retry.core.telemetry import Target
from traced_retry.livekit.adapter import (
    Adapter,
    Call,
    Generation,
    PassthroughRequest,
    Replies,
    failure_from_event,
)

PLUGIN_TIMEOUT = 5.0
SEND_WINDOW = PLUGIN_TIMEOUT - 0.05
"""Seconds until we listen instead of the plugin: before its own timer clears the slot."""
LISTEN_WINDOW = 5.0

_STATUS: dict[int, Kind] = {
    400: "invalid_request",
    401: "authentication",
    403: "authentication",
    404: "invalid_request",
    429: "rate_limit",
    503: "overloaded",
    1007: "invalid_request",  # also what becomes of a bad API key
}
_CLOSE_CODES = range(1000, 5000)


class GoogleAdapter(Adapter):
    """The plugin's one slot, and who waits in it."""

    required_attributes: ClassVar[tuple[str, ...]] = (
        "_pending_generation_fut",
        "_session_resumption_handle",
        "_mark_restart_needed",
        "_session_should_close",
        "_active_session",
        "_session_error",
        "_current_generation",
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
        self._discard_future: asyncio.Future[Generation] | None = None
        """The future in the slot from a restart until the new connection. It discards replies from
        the old connection."""
        self._discarded_response: str | None = None
        self._renew_later = False
        self._delivery: tuple[str, Delivery] | None = None
        """The reply being spoken, if we asked for it, and its response id."""
        session.on("generation_created", self._on_generation)
        session.on("input_speech_stopped", self._on_generation_ended)
        session.on("metrics_collected", self._on_metrics)
        session.on("error", self._on_error)

    def target(self) -> Target:
        """``gcp.gemini`` or ``gcp.vertex_ai``; the server where the user named one."""
        model = self.session.realtime_model
        vertex = model.provider == "Vertex AI"
        options = getattr(getattr(model, "_opts", None), "http_options", None)
        server = host_and_port(getattr(options, "base_url", None))
        if server[0] is None and not vertex:
            server = host_and_port("https://generativelanguage.googleapis.com")
        return Target("gcp.vertex_ai" if vertex else "gcp.gemini", model.model, *server)

    def request(self, call: Call) -> GoogleRequest:
        """One reply's request."""
        return GoogleRequest(self, call)

    def classify_event(self, event: llm.RealtimeModelError) -> Failure:
        """By its close code, or the status of a message or of HTTP."""
        return _why(event.error)

    @property
    def connected(self) -> bool:
        """Whether there is a session, and it is not about to be closed."""
        plugin = self.plugin
        return plugin._active_session is not None and not plugin._session_should_close.is_set()

    @property
    def speaking(self) -> bool:
        """Whether the server is in the middle of an answer, be it to us or to the user."""
        generation = self.plugin._current_generation
        return not (generation is None or generation._done or generation._completed_timestamp)

    @property
    def free(self) -> bool:
        """Whether no one waits for the next generation."""
        waiting = self.plugin._pending_generation_fut
        return waiting is None or waiting is self._discard_future or waiting.done()

    def put(self, future: asyncio.Future[Generation] | None) -> None:
        """Have ``future`` resolved by the next generation."""
        self.plugin._pending_generation_fut = future

    def renew(self) -> None:
        """Begin the session anew: no turn of the old one is answered, be it sent or queued."""
        plugin = self.plugin
        plugin._session_resumption_handle = None
        self._withdraw()
        plugin._mark_restart_needed()
        if self.free:
            self._discard_future = asyncio.get_running_loop().create_future()
            self.put(self._discard_future)

    def interrupt(self) -> None:
        """What the plugin does, and not our hook: other replies are not meant."""
        type(self.plugin).interrupt(self.plugin)

    def silence(self) -> None:
        """See to it that what was asked is never heard: now, or when the server has spoken."""
        self._renew_later = self.speaking
        if not self._renew_later:
            self.renew()

    def _withdraw(self) -> None:
        """Take requests for a reply out of the plugin's queue; the rest stays, in order.

        A request may be queued in the moments between the loss of a connection and the event that
        tells of it; it would be sent on the next one. Marking a restart then empties nothing.
        """
        queue, kept = self.plugin._msg_ch, []
        while not queue.empty():
            message = queue.recv_nowait()
            if getattr(message, "turn_complete", None) is not True:
                kept.append(message)
        for message in kept:
            self.plugin._send_client_event(message)

    # --- what the plugin says ------------------------------------------------------------------

    def _on_metrics(self, metrics: Any) -> None:
        with suppress_and_log("reading a metrics event"):
            if metrics.request_id == "":
                self._on_connected()

    def _on_connected(self) -> None:
        if self._discard_future is not None:
            if self.plugin._session_resumption_handle is not None:
                # The old session's last word, read after we had dropped its handle; this
                # connection may have been made with it.
                self.renew()
                return
            if self.plugin._pending_generation_fut is self._discard_future:
                self.put(None)
            self._discard_future = None
        # Right after this event the plugin makes the session the active one.
        asyncio.get_running_loop().call_soon(self.replies.wake)

    def _on_generation(self, event: Generation) -> None:
        with suppress_and_log("reading a generation event"):
            if (
                self._discard_future is not None
                and self._discard_future.done()
                and not self._discard_future.cancelled()
            ):
                self._discarded_response = event.response_id
            elif event.user_initiated and event.response_id is not None:
                # The plugin begins one with its first words (or a call, or the user's words).
                delivery = Delivery()
                delivery.mark_output()
                self._delivery = (event.response_id, delivery)

    def _on_generation_ended(self) -> None:
        with suppress_and_log("reading the end of a generation"):
            # Emitted as the first step of ending it, also before a next one begins.
            generation = self.plugin._current_generation
            if generation is None:
                return
            if generation.response_id == self._discarded_response:
                generation.output_text = ""  # else it becomes part of the chat context
            delivery = self.delivery(generation.response_id)
            if delivery is not None:
                whole = generation._completed_timestamp or not generation.function_ch.empty()
                lost = not whole and self.plugin._session_error is not None
                what = "the connection was lost during the reply"
                delivery.end(failure_from_event("connection_lost", what) if lost else None)
            if self._renew_later:
                self._renew_later = False
                if self.free:
                    self.renew()
            asyncio.get_running_loop().call_soon(self.replies.wake)

    def delivery(self, response_id: str | None) -> Delivery | None:
        """The delivery of that response, if it is the latest we asked for."""
        if self._delivery is not None and self._delivery[0] == response_id:
            return self._delivery[1]
        return None

    def _on_error(self, event: llm.RealtimeModelError) -> None:
        with suppress_and_log("reading an error event"):
            why = self.classify_event(event)
            if not event.recoverable:
                self.replies.report_failure(why, "not_recoverable")
            elif self.asked is not None:
                self.asked.lost = True
                self.replies.report_failure(why, only=self.asked)


class GoogleRequest(PassthroughRequest):
    """One reply's request to Gemini Live."""

    def __init__(self, adapter: GoogleAdapter, call: Call) -> None:
        super().__init__(call)
        self._adapter = adapter
        self.lost = False
        """Whether the connection was lost during the attempt, and the request with it."""
        self._action: semconv.Action = "send"
        self._refused = False
        self._heard_by: asyncio.Future[Generation] | None = None
        """What listens, from when the attempt before was abandoned."""

    def attempt(self, action: semconv.Action) -> asyncio.Future[Generation]:
        """Send it; or go on listening, in the place of the attempt before."""
        self._action, self.lost = action, False
        attempt, self._heard_by = self._heard_by, None
        if attempt is None:
            if self._adapter.free:
                self._adapter.put(None)  # the plugin would warn that it cancels what is there
            self._refused = True  # should it raise
            attempt = self.call()
            self._refused = attempt.done()
        if not self._refused:
            self._adapter.asked = self
            attempt.add_done_callback(lambda _: self._close())
        return attempt

    def limit(self, action: semconv.Action) -> float | None:
        """A little less than the plugin's own time-out; to the deadline where only that ends it."""
        if action != "listen":
            return SEND_WINDOW
        return None if self._adapter.replies.policy.on_silence == "listen" else LISTEN_WINDOW

    def explain(self, error: BaseException) -> Failure:
        """The plugin refuses at once what the model cannot do."""
        if self._refused and isinstance(error, llm.RealtimeError):
            return failure(error, "invalid_request")
        return super().explain(error)

    def next_action(self, why: Failure) -> semconv.Action | None:
        """Send after a loss; after silence listen once, then as ``on_silence`` says."""
        if self.lost:
            return "send"
        on_silence = self._adapter.replies.policy.on_silence
        if self._action != "listen" or on_silence == "listen" or self._adapter.speaking:
            return "listen"
        return "send" if on_silence == "resend" else "restart"

    def ready(self) -> bool:
        """Connected, and nobody else is being answered. To listen takes nothing."""
        adapter = self._adapter
        if self._heard_by is not None:
            return True
        return adapter.connected and adapter.free and not adapter.speaking

    def abandon(self, attempt: asyncio.Future[Generation], then: semconv.Action | None) -> None:
        """Leave the slot to what follows, and the old turn behind where it might be answered."""
        self._close()
        if then == "listen":
            self._heard_by = asyncio.get_running_loop().create_future()
            self._adapter.put(self._heard_by)
        elif not self._refused:
            self._leave(attempt)
            if then == "send" and not self.lost:
                pass  # on_silence="resend": the caller may hear both
            elif then is None:
                self._adapter.silence()
            else:
                self._adapter.renew()
        attempt.cancel()  # out of the slot, it takes nothing along but the plugin's timer

    def cancel(self, attempt: asyncio.Future[Generation]) -> None:
        """Barge-in: what the plugin does, and where that tells the server nothing, a restart."""
        self._close()
        if attempt.done() and not attempt.cancelled() and attempt.exception() is None:
            # The reply began in the very moment of the cancel: nobody will read it.
            self._adapter.interrupt()
            return
        self._leave(attempt)
        attempt.cancel()
        self._adapter.interrupt()
        if not _interrupts(self._adapter.plugin):
            self._adapter.silence()

    def delivery(self, result: Generation) -> Delivery | None:
        """Watch the reply to its end: the connection may be lost in the middle of it."""
        return self._adapter.delivery(result.response_id)

    def _leave(self, attempt: asyncio.Future[Generation]) -> None:
        if self._adapter.plugin._pending_generation_fut is attempt:
            self._adapter.put(None)

    def _close(self) -> None:
        if self._adapter.asked is self:
            self._adapter.asked = None


def _interrupts(plugin: Any) -> bool:
    """Whether the server was told that the user speaks, and stops for that."""
    config = getattr(plugin._opts, "realtime_input_config", None)
    stops = getattr(config, "activity_handling", None) != "NO_INTERRUPTION"
    return bool(plugin._in_user_activity) and stops


def _why(error: BaseException) -> Failure:
    """What an ``error`` event means: by its close code, or the status of a message or of HTTP."""
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
        kind = "quota"  # Gemini closes with 1011 and says so in words
    return failure_from_event(kind, what, str(code))
