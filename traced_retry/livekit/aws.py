# SPDX-License-Identifier: Apache-2.0
"""Amazon Nova Sonic, on Bedrock.

A reply does not carry the id of its request, and a request cannot be cancelled. The agent speaks
each reply that arrives. A second request could therefore be heard as a second reply, so the adapter
sends a request once and then waits for its answer.

Facts (livekit-plugins-aws 1.8.9, ``experimental/realtime/realtime_model.py``):

Requests

* ``generate_reply(instructions=...)`` sends a text once the stream is open. The future fails after
  the model's ``generate_reply_timeout``, or with the exception of the send, which may be of any
  class. Cancelling the future only drops a text that was not sent yet.
* ``generate_reply()`` without instructions sends no request. It returns the future of the user's
  message that is being answered. Each call returns the same future, and it has no time-out. If
  there is no such message, the future never resolves.

Replies

* The plugin announces a reply with ``generation_created`` when it begins, and again at each text or
  tool call in it (``emit_generation_event``). ``user_initiated`` is always False. The first event
  resolves ``_pending_generation_fut``, which holds one request. An ``AgentSession`` speaks a reply
  because of the event, whether or not a future waits. The adapter therefore assigns the events to
  the requests in their order, and does not change ``_pending_generation_fut``.
* No event announces the end of a reply. The plugin calls ``_close_current_generation`` if a reply
  is complete, if it calls a tool, or if the caller speaks.

Failures

* After throttling, a time-out of the model or "System instability" the plugin opens a new stream
  without an event. If the chat context ends with a user's message, the plugin sends it again, and
  the answer continues the reply that had started. The instructions and the rest of that reply are
  lost. The plugin does not close the reply, so the agent would wait for its end.
* If the connection is cut or refused, ``_response_task`` ends, which reads the stream. The plugin
  emits no event and opens no other stream.
* If the session is recycled because the tools changed, ``_response_task`` ends as well. Another one
  starts in about a second (``_main_atask`` starts it).
* If the session is recycled after six minutes, the recycling cancels itself, because
  ``_start_session_recycle_timer`` is called in the task that it cancels. A session with history
  then has no task that reads the stream.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, ClassVar

from livekit.agents import llm

from traced_retry import semconv
from traced_retry.core.failure import CODES, Failure, Kind, explain, failure, plain_code
from traced_retry.core.guard import suppress_and_log
from traced_retry.core.request import Delivery
from traced_retry.core.telemetry import Target
from traced_retry.livekit.adapter import Adapter, Replies, failure_from_event
from traced_retry.livekit.request import Call, Generation, PassthroughRequest
from traced_retry.livekit.single_slot import SlotDelivery, before

_REMEMBERED = 64
"""The largest number of given-up requests with replies that may still come."""
_TIMEOUT = 10.0
"""The plugin's own default, seconds."""
_GRACE = 2.0
"""Seconds to wait for the replacement of a reader that ended."""


class AWSAdapter(Adapter):
    """The requests of one session in their order. Replies come in the same order."""

    required_attributes: ClassVar[tuple[str, ...]] = (
        "_pending_generation_fut",
        "_response_task",
        "_main_atask",
        "_close_current_generation",
        "_restart_session",
        *SlotDelivery.required_attributes,
    )
    last_words_are_unknown = True
    actions: ClassVar[tuple[semconv.Action, ...]] = ("send", "listen")

    def __init__(self, session: llm.RealtimeSession[Any], replies: Replies) -> None:
        super().__init__(session, replies)
        self.open: list[AWSRequest] = []
        """Requests asked and not yet answered, the oldest first."""
        self.given_up: deque[AWSRequest] = deque(maxlen=_REMEMBERED)
        """Requests with a failure that was reported to the agent."""
        self.speaking = SlotDelivery(session)
        self._newest: str | None = None
        self._unasked = False
        self._reader: asyncio.Task[Any] | None = None
        self._lost: Failure | None = None
        session.on("generation_created", self._on_generation)
        session.on("input_speech_started", self._on_user_spoke)
        session.on("input_audio_transcription_completed", self._on_words)

    def target(self) -> Target:
        """Return the name from the semantic conventions. The plugin's own name is Amazon."""
        return Target("aws.bedrock", self.session.realtime_model.model)

    def starts_reply(self, generation: Generation) -> bool:
        """Return whether an answer to the caller is announced again, as its words begin."""
        spoken = generation.response_id == self._newest and self._unasked and not self.given_up
        if spoken:
            self._unasked = False
        return spoken

    def turn_delivery(self, generation: Generation) -> Delivery | None:
        """Watch the reply to its end, as the answer to a request."""
        self._watch_stream()
        return self.speaking.begin(generation, started=False)

    def close_turn(self) -> None:
        """End the streams of a reply whose time is up, or the agent would wait for their end."""
        self.session._close_current_generation()  # type: ignore[attr-defined]

    def expects_answer(self) -> bool:
        """Return whether a request is open."""
        return bool(self.open)

    def turn_window(self) -> float | None:
        """Return the plugin's time-out for a request."""
        return self.window()

    def request(self, call: Call) -> AWSRequest:
        """Create the request for one reply."""
        return AWSRequest(self, call)

    def pending(self) -> asyncio.Future[Generation] | None:
        """Return the future in the plugin's slot."""
        found: asyncio.Future[Generation] | None
        found = self.session._pending_generation_fut  # type: ignore[attr-defined]
        return found

    def window(self) -> float:
        """Return the plugin's time-out, which limits an attempt unless the policy does."""
        model = self.session.realtime_model
        return float(getattr(model, "_generate_reply_timeout", _TIMEOUT))

    def watch(self, request: AWSRequest) -> None:
        """Add a request that was sent. It fails if the stream has no reader, now or later."""
        self.open.append(request)
        self.turns.supersede()
        self._watch_stream()
        if self._lost is not None:
            self.replies.report_failure(self._lost, "not_recoverable", only=request)

    def _watch_stream(self) -> None:
        """Notice the end of replies, and that of the stream."""
        if self._reader is None:
            before(self.session, "_close_current_generation", self.speaking.end)
            before(self.session, "_restart_session", self._on_restarting)
        self._watch_reader()

    def _watch_reader(self) -> bool:
        """Watch the stream's reader task. Return False if it was already being watched."""
        session: Any = self.session
        reader: asyncio.Task[Any] = session._response_task or session._main_atask
        if reader is self._reader:
            return False
        self._reader, self._lost = reader, None
        reader.add_done_callback(self._on_reader_ended)
        return True

    def _on_reader_ended(self, reader: asyncio.Task[Any]) -> None:
        with suppress_and_log("seeing the stream's reader end"):
            if self._watch_reader():
                return  # it opened another stream, and that one's reader took its place
            failed = not reader.cancelled() and reader.exception() is not None
            # A session being recycled ends its reader without an exception.
            wait = 0.0 if failed else _GRACE
            asyncio.get_running_loop().call_later(wait, self._on_nobody_reads, reader)

    def _on_nobody_reads(self, reader: asyncio.Task[Any]) -> None:
        with suppress_and_log("seeing the stream end"):
            if not self._watch_reader() and self._reader is reader:
                error = None if reader.cancelled() else reader.exception()
                self._lost = _why_lost(error)
                self._cut_short(self._lost)
                self.turns.lose(self._lost)
                self.replies.report_failure(self._lost, "not_recoverable")

    def _on_restarting(self, error: BaseException) -> None:
        """End the current reply, unless the plugin repeats a user's message in another stream."""
        items = self.session.chat_ctx.items
        asked_again = bool(items) and items[-1].type == "message" and items[-1].role == "user"
        if not asked_again:
            code = plain_code(type(error).__name__)
            kind: Kind = "rate_limit" if code == "ThrottlingException" else "server_error"
            self._cut_short(failure_from_event(kind, "the stream was lost during the reply", code))

    def _cut_short(self, why: Failure) -> None:
        """Report a reply that was being spoken as failed, and close it.

        The plugin never closes it: the agent would wait for its end forever.
        """
        self.speaking.end(why)
        self.session._close_current_generation()  # type: ignore[attr-defined]

    def _on_generation(self, event: Generation) -> None:
        with suppress_and_log("reading a generation"):
            if event.response_id != self._newest:
                self._newest = event.response_id
                self._unasked = not self.open
                self._answer(event)
            elif self._unasked and self.given_up:
                # Announced again: it is being spoken, and the user did not speak before it.
                self._unasked = False
                self.given_up.popleft().on_late()

    def _answer(self, event: Generation) -> None:
        """Give a reply to the oldest request, and to those that sent no text."""
        sent = next((request.inner for request in self.open if request.sent), None)
        for request in list(self.open):
            if not request.sent or request.inner is sent:
                request.answered(event)

    def _on_words(self, _: object) -> None:
        with suppress_and_log("watching the stream"):
            self._watch_stream()

    def _on_user_spoke(self, _: object) -> None:
        # The next reply may answer the user. There is no way to distinguish it.
        self.given_up.clear()


class AWSRequest(PassthroughRequest):
    """One reply's request to Nova Sonic."""

    def __init__(self, adapter: AWSAdapter, call: Call) -> None:
        super().__init__(call)
        self._adapter = adapter
        self.inner: asyncio.Future[Generation] | None = None
        """The plugin's future. Replies to the same user's message share it."""
        self.sent = False
        """Whether anything was sent for it: our text, or the user's message."""
        self._own = False
        self._action: semconv.Action = "send"
        self._attempt: asyncio.Future[Generation] | None = None

    def attempt(self, action: semconv.Action) -> asyncio.Future[Generation]:
        """Send the request or keep waiting, under a future of ours that may end at any time."""
        self._action = action
        if action == "send":
            before = self._adapter.pending()
            self.inner = inner = self.call()
            if inner.done():
                # An audio-only model takes no text: the reply is empty, and a retry cannot help.
                return inner
            self.sent = inner is self._adapter.pending()
            self._own = self.sent and inner is not before
            inner.add_done_callback(self._on_inner_done)
            self._adapter.watch(self)
        self._attempt = asyncio.get_running_loop().create_future()
        return self._attempt

    def limit(self, action: semconv.Action) -> float | None:
        """Return the plugin's time-out, because futures of users' messages have no time-out."""
        return self._adapter.window()

    def explain(self, error: BaseException) -> Failure:
        """Classify a failed send by the original error, which is the ``RealtimeError``'s cause."""
        if error.__cause__ is None:
            return super().explain(error)
        why = explain(error.__cause__)
        # Not "bug", which the loop would raise at its caller as a programming error.
        kind = "invalid_request" if why.kind == "bug" else why.kind
        return failure(error, kind, code=why.code)

    def next_action(self, why: Failure) -> semconv.Action | None:
        """Return ``listen``, or ``send`` if the policy allows it and the request was our text."""
        if why.error.__cause__ is not None:
            return None  # it could not be sent, so no reply will come
        resend = self._adapter.replies.policy.on_silence == "resend"
        return "send" if resend and self._own and self._action == "listen" else "listen"

    def abandon(self, attempt: asyncio.Future[Generation], then: semconv.Action | None) -> None:
        """On giving up, drop an unsent request, and watch for the reply to a sent one."""
        if then == "listen":
            return
        self._close()
        if then is None:
            self._adapter.given_up.append(self)
            self._withdraw()

    def cancel(self, attempt: asyncio.Future[Generation]) -> None:
        """Drop a request that was not sent yet. A sent one cannot be cancelled."""
        self._close()
        self._withdraw()

    def delivery(self, result: Generation) -> Delivery | None:
        """Watch the reply to its end: it may be cut short."""
        return self._adapter.speaking.begin(result)

    def answered(self, event: Generation) -> None:
        """Resolve the request with its reply."""
        self._close()
        if self._attempt is not None and not self._attempt.done():
            self._attempt.set_result(event)

    def _withdraw(self) -> None:
        # The future of a user's message is not ours: others may wait for it, and once cancelled
        # it would stay in the plugin's slot and cancel the replies asked for next.
        if self._own and self.inner is not None:
            self.inner.cancel()

    def _close(self) -> None:
        if self in self._adapter.open:
            self._adapter.open.remove(self)

    def _on_inner_done(self, inner: asyncio.Future[Generation]) -> None:
        """Pass on the result of the plugin's future, but not its time-out during a ``listen``."""
        error = None if inner.cancelled() else inner.exception()  # marks it as retrieved
        attempt = self._attempt
        if attempt is None or attempt.done() or inner is not self.inner:
            return
        if inner.cancelled():
            self._close()
            attempt.cancel()
        elif error is None:
            pass  # resolved by another request's reply, or the reply has reached us as an event
        elif not isinstance(error, llm.RealtimeError):
            raised = llm.RealtimeError(f"the request could not be sent ({type(error).__name__})")
            raised.__cause__ = error
            attempt.set_exception(raised)
        elif self._action == "send" or "timed out" not in str(error):
            attempt.set_exception(error)


def _why_lost(error: BaseException | None) -> Failure:
    """Return the failure of a stream that ended. The exception's class is AWS's own code."""
    what = "the stream ended, and the plugin opens no other"
    kind = CODES.get(type(error).__name__)
    if kind is None:
        return failure_from_event("connection_lost", what)
    return failure_from_event(kind, what, plain_code(type(error).__name__))
