# SPDX-License-Identifier: Apache-2.0
"""Amazon Nova Sonic, on Bedrock.

A reply carries no id of its request, there is no cancel, and what comes is spoken, whoever asked
or no longer asks. So a request is sent once; after silence the same request is listened for.

Facts (livekit-plugins-aws 1.8.9, ``experimental/realtime/realtime_model.py``):

* ``generate_reply(instructions=...)`` sends a text once the stream is up. Its future fails after
  the model's ``generate_reply_timeout``, or with the raw exception of the send, of any class.
  Cancelling it drops a text not yet sent, and does nothing else.
* ``generate_reply()`` sends nothing. It returns the future of the user's message that is being
  answered, the same one for each call and without a time-out; else one that never resolves.
* ``emit_generation_event`` announces a reply by ``generation_created`` when it begins and again
  at each text or tool call in it, always with ``user_initiated=False``; the first resolves the
  slot, ``_pending_generation_fut``, of which there is one. An ``AgentSession`` speaks the reply
  at that event, not for the future. Hence we listen to the event, in the order of asking, and
  leave the slot alone.
* After throttling, a model time-out or "System instability" it opens a new stream and says
  nothing. If the chat context ends with a user's message, that is sent again by the plugin, and its
  answer goes on in what had begun. Instructions are lost, and so is the rest of what was being
  said, of which the plugin closes nothing: the agent would wait for its end.
* The end of a reply is told by no event. It is closed by ``_close_current_generation``: when it is
  whole, it calls a tool, or the caller speaks.
* A connection cut or refused ends ``_response_task``, which reads the stream (``_main_atask``
  begins it). No event tells, and nothing opens another stream, unless the session was being
  recycled for other tools: then the next reader is there in about a second. The recycling after
  six minutes ends likewise, but cancels itself (``_start_session_recycle_timer`` is called in the
  task that it cancels) and leaves a session with history without a reader.
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
"""Requests given up whose replies are still watched for, at most."""
_TIMEOUT = 10.0
"""The plugin's own default, seconds."""
_GRACE = 2.0
"""Seconds after which a reader that ended is not being replaced any more."""


class AWSAdapter(Adapter):
    """One session's requests, in the order they were asked; replies come in the same."""

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
        """Those of which the agent was told that they failed."""
        self.speaking = SlotDelivery(session)
        self._newest: str | None = None
        self._unasked = False
        self._reader: asyncio.Task[Any] | None = None
        self._lost: Failure | None = None
        session.on("generation_created", self._on_generation)
        session.on("input_speech_started", self._on_user_spoke)
        session.on("input_audio_transcription_completed", self._on_words)

    def target(self) -> Target:
        """The plugin calls itself Amazon; semantic conventions have a name for the service."""
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

    def expects_answer(self) -> bool:
        """Return whether a request is open."""
        return bool(self.open)

    def turn_window(self) -> float | None:
        """The plugin's own time for a request."""
        return self.window()

    def request(self, call: Call) -> AWSRequest:
        """One reply's request."""
        return AWSRequest(self, call)

    def pending(self) -> asyncio.Future[Generation] | None:
        """The future in the plugin's slot."""
        found: asyncio.Future[Generation] | None
        found = self.session._pending_generation_fut  # type: ignore[attr-defined]
        return found

    def window(self) -> float:
        """Seconds that one attempt lasts, unless the policy says so: the plugin's time-out."""
        model = self.session.realtime_model
        return float(getattr(model, "_generate_reply_timeout", _TIMEOUT))

    def watch(self, request: AWSRequest) -> None:
        """Take up a request just sent; it fails where nobody reads the stream, now or later."""
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
        """Have the end of what reads the stream, or will, told to us; False if we had already."""
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
        """The plugin opens another stream; only a user's message is answered there after all."""
        items = self.session.chat_ctx.items
        asked_again = bool(items) and items[-1].type == "message" and items[-1].role == "user"
        if not asked_again:
            code = plain_code(type(error).__name__)
            kind: Kind = "rate_limit" if code == "ThrottlingException" else "server_error"
            self._cut_short(failure_from_event(kind, "the stream was lost during the reply", code))

    def _cut_short(self, why: Failure) -> None:
        """Tell of a reply that was being spoken, and close it.

        The plugin never does: the agent would wait for its end, and say nothing else, for ever.
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
                # Announced again: it is being spoken, and no words of the user's came first.
                self._unasked = False
                self.given_up.popleft().on_late()

    def _answer(self, event: Generation) -> None:
        """Give a reply to the oldest request, and to those that sent nothing of their own."""
        sent = next((request.inner for request in self.open if request.sent), None)
        for request in list(self.open):
            if not request.sent or request.inner is sent:
                request.answered(event)

    def _on_words(self, _: object) -> None:
        with suppress_and_log("watching the stream"):
            self._watch_stream()

    def _on_user_spoke(self, _: object) -> None:
        # What comes now answers the user, or cannot be told from what does.
        self.given_up.clear()


class AWSRequest(PassthroughRequest):
    """One reply's request to Nova Sonic."""

    def __init__(self, adapter: AWSAdapter, call: Call) -> None:
        super().__init__(call)
        self._adapter = adapter
        self.inner: asyncio.Future[Generation] | None = None
        """The plugin's future; a reply to a user's message shares it with others."""
        self.sent = False
        """Whether anything was sent for it: our text, or the user's message."""
        self._own = False
        self._action: semconv.Action = "send"
        self._attempt: asyncio.Future[Generation] | None = None

    def attempt(self, action: semconv.Action) -> asyncio.Future[Generation]:
        """Send it, or go on waiting; either under a future of ours that may end at any time."""
        self._action = action
        if action == "send":
            before = self._adapter.pending()
            self.inner = inner = self.call()
            if inner.done():
                # An audio-only model takes no text: an empty reply, and nothing to retry.
                return inner
            self.sent = inner is self._adapter.pending()
            self._own = self.sent and inner is not before
            inner.add_done_callback(self._on_inner_done)
            self._adapter.watch(self)
        self._attempt = asyncio.get_running_loop().create_future()
        return self._attempt

    def limit(self, action: semconv.Action) -> float | None:
        """The plugin's time-out, which its futures of users' messages lack."""
        return self._adapter.window()

    def explain(self, error: BaseException) -> Failure:
        """A failed send is judged by what it was before we made a ``RealtimeError`` of it."""
        if error.__cause__ is None:
            return super().explain(error)
        why = explain(error.__cause__)
        # Not "bug", which the loop would raise at its caller as a programming error.
        kind = "invalid_request" if why.kind == "bug" else why.kind
        return failure(error, kind, code=why.code)

    def next_action(self, why: Failure) -> semconv.Action | None:
        """Listen. Another request is sent only where that was asked for, and it would be ours."""
        if why.error.__cause__ is not None:
            return None  # it could not be sent: there is nothing to listen for
        resend = self._adapter.replies.policy.on_silence == "resend"
        return "send" if resend and self._own and self._action == "listen" else "listen"

    def abandon(self, attempt: asyncio.Future[Generation], then: semconv.Action | None) -> None:
        """On giving up, drop what was not sent yet, and watch for the reply to what was."""
        if then == "listen":
            return
        self._close()
        if then is None:
            self._adapter.given_up.append(self)
            self._withdraw()

    def cancel(self, attempt: asyncio.Future[Generation]) -> None:
        """Barge-in: drop what was not sent yet. There is no cancel for what was."""
        self._close()
        self._withdraw()

    def delivery(self, result: Generation) -> Delivery | None:
        """Watch the reply to its end: it may be cut short."""
        return self._adapter.speaking.begin(result)

    def answered(self, event: Generation) -> None:
        """The reply is there."""
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
        """Pass on what the plugin's future tells, but for its time-out while we go on listening."""
        error = None if inner.cancelled() else inner.exception()  # marks it as retrieved
        attempt = self._attempt
        if attempt is None or attempt.done() or inner is not self.inner:
            return
        if inner.cancelled():
            self._close()
            attempt.cancel()
        elif error is None:
            pass  # resolved by a reply that is another request's, or has reached us as an event
        elif not isinstance(error, llm.RealtimeError):
            raised = llm.RealtimeError(f"the request could not be sent ({type(error).__name__})")
            raised.__cause__ = error
            attempt.set_exception(raised)
        elif self._action == "send" or "timed out" not in str(error):
            attempt.set_exception(error)


def _why_lost(error: BaseException | None) -> Failure:
    """The failure of a stream that ended, by the class of what ended it: AWS's own codes."""
    what = "the stream ended, and the plugin opens no other"
    kind = CODES.get(type(error).__name__)
    if kind is None:
        return failure_from_event("connection_lost", what)
    return failure_from_event(kind, what, plain_code(type(error).__name__))
