# SPDX-License-Identifier: Apache-2.0
"""The replies that a provider starts by itself, because the caller spoke or a tool returned.

:class:`Turns` observes them on a provider whose replies carry no id of a request. It never requests
one of them again, because the caller could then hear two replies.

Facts (livekit-agents and its plugins, 1.7.0 to 1.8.9):

* ``generation_created`` with ``user_initiated=False`` announces such a reply. LiveKit creates its
  ``SpeechHandle`` in this event's handler.
* ``input_audio_transcription_completed`` with ``is_final`` comes before the reply on Ultravox,
  Phonic and AWS, so it shows that the provider has heard a turn of the caller. Gemini's comes after
  the reply.
* ``input_speech_stopped`` reports the end of the caller's speech on Phonic. Ultravox's and AWS's
  plugins emit it as the reply begins, and Google's as it ends.
* AWS's plugin announces a reply twice: as it begins, and with its first words.
* Nova Sonic does not report that the caller has stopped speaking. Its plugin reports the words
  heard so far, with ``is_final=False``, and the last ones as the reply begins.
* Gemini answers a turn on the next connection if its connection was lost.
"""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any

from traced_retry import semconv
from traced_retry.core.guard import suppress_and_log
from traced_retry.core.request import Delivery
from traced_retry.livekit.request import Generation, PassthroughRequest, timeout_failure

if TYPE_CHECKING:
    from livekit.agents import llm

    from traced_retry.core.failure import Failure
    from traced_retry.livekit.adapter import Adapter

_LATE = 30.0
"""Seconds after the report of a lost reply in which it may still begin."""


class Turns:
    """The caller's turns of one session, and the provider's replies to them."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._pending: Turn | None = None
        """The turn that the provider has heard and not answered."""
        self._unanswered: Turn | None = None
        """The last turn whose reply was reported as lost and may still begin."""
        self._late_until = 0.0
        self._stopped_speaking: float | None = None
        self._expected: asyncio.TimerHandle | None = None
        """Runs until the provider has to answer words that may not be the caller's last."""
        self._last_words = 0.0
        self._first_speech: Any = None
        """The ``SpeechHandle`` of the first announcement, on AWS, where LiveKit creates two."""
        session = adapter.session
        self._emit = session.emit
        session.emit = self._emit_and_follow  # type: ignore[method-assign]
        session.on("input_speech_started", self._on_speech_started)
        session.on("input_speech_stopped", self._on_speech_stopped)
        session.on("input_audio_transcription_completed", self._on_transcribed)

    def supersede(self) -> None:
        """End the pending turn, because the provider's next reply answers a request."""
        self._unanswered = None
        self._expect_nothing()
        if self._pending is not None:
            self._pending.supersede()
            self._adapter.replies.wake()

    def lose(self, why: Failure) -> None:
        """Report the reply to the caller's last words as lost, if it has not begun."""
        if self._expect_nothing():
            turn = Turn(self._adapter, self)
            self._adapter.replies.start(self._adapter, turn, self._last_words)
            self._adapter.replies.report_failure(why, only=turn)

    def ended(self, turn: Turn) -> None:
        """Note that the reply to ``turn`` has ended."""
        if self._pending is turn:
            self._pending = None

    def may_be_late(self, turn: Turn) -> None:
        """Count the provider's next reply as the late one to ``turn``, if it comes soon."""
        self._unanswered, self._late_until = turn, asyncio.get_running_loop().time() + _LATE

    def _emit_and_follow(self, event: Any, *args: Any) -> None:
        turn = first = None
        if event == "generation_created":
            with suppress_and_log("observing a reply of the provider"):
                turn = self._turn_of(args[0])
                if turn is None and self._is_announced_twice(args[0]):
                    first = Turn(self._adapter, self)
        if (speaks := turn or first) is None:
            self._emit(event, *args)
            return
        self._adapter.replies.emit(speaks, functools.partial(self._emit, event, *args))
        if first is not None:
            self._first_speech = first.speech

    def _is_announced_twice(self, generation: Generation) -> bool:
        """Return whether this is the first announcement of a reply that is announced twice."""
        adapter = self._adapter
        if generation.user_initiated or not adapter.last_words_are_unknown:
            return False
        return not adapter.expects_answer()

    def _turn_of(self, generation: Generation) -> Turn | None:
        """Return the turn that ``generation`` answers, or None if it answers a request."""
        if not self._adapter.starts_reply(generation):
            return None
        self._expect_nothing()
        now = asyncio.get_running_loop().time()
        late, self._unanswered = self._unanswered, None
        if late is not None and now < self._late_until:
            late.on_late()
            return None
        pending, self._pending = self._pending, None
        turn = pending or Turn(self._adapter, self)
        turn.speech, self._first_speech = self._first_speech, None
        turn.answer(generation)
        if pending is None:
            self._adapter.replies.start(self._adapter, turn, now)
        else:
            self._adapter.replies.wake()
        return turn

    def _on_speech_started(self, _: object) -> None:
        with suppress_and_log("reading the start of the caller's speech"):
            self._stopped_speaking = None
            self._expect_nothing()
            if self._pending is not None:
                self._adapter.replies.interrupt_reply(self._pending)

    def _on_speech_stopped(self, _: object) -> None:
        if self._adapter.reports_end_of_speech:
            self._stopped_speaking = asyncio.get_running_loop().time()

    def _on_transcribed(self, event: llm.InputTranscriptionCompleted) -> None:
        if not event.transcript:
            return
        with suppress_and_log("reading the caller's words"):
            if event.is_final:
                self._on_turn()
            elif self._adapter.last_words_are_unknown and not self._adapter.expects_answer():
                self._unanswered = None
                self._expect_nothing()
                loop, window = asyncio.get_running_loop(), self._adapter.turn_window()
                assert window is not None
                self._last_words = loop.time()
                self._expected = loop.call_later(window, self._on_unanswered, window)

    def _on_unanswered(self, window: float) -> None:
        with suppress_and_log("reporting an unanswered turn"):
            self.lose(timeout_failure(window))

    def _expect_nothing(self) -> bool:
        """Stop the timer, and return whether it ran."""
        timer, self._expected = self._expected, None
        if timer is not None:
            timer.cancel()
        return timer is not None

    def _on_turn(self) -> None:
        if self._adapter.turn_window() is None:
            return
        self._expect_nothing()
        if self._adapter.last_words_are_unknown and self._unanswered is not None:
            return  # These are the words of the turn that was reported, and its reply begins now.
        self._unanswered = None
        self._adapter.caller_spoke()
        stopped, self._stopped_speaking = self._stopped_speaking, None
        if self._adapter.expects_answer() or self._pending is not None:
            return  # A request is open, or the caller goes on with the same turn.
        now = asyncio.get_running_loop().time()
        self._pending = Turn(self._adapter, self)
        began = now if stopped is None else stopped
        self._adapter.replies.start(self._adapter, self._pending, began)


class Turn(PassthroughRequest):
    """A reply that the provider starts. Its one attempt listens, and it is never requested."""

    def __init__(self, adapter: Adapter, turns: Turns) -> None:
        super().__init__(lambda: self._generation)
        self._adapter = adapter
        self._turns = turns
        self._delivered: Delivery | None = None
        self._generation: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()

    def answer(self, generation: Generation) -> None:
        """Take ``generation`` for the provider's reply."""
        if not self._generation.done():
            self._generation.set_result(generation)

    def supersede(self) -> None:
        """Expect no reply any more."""
        self._generation.cancel()

    def limit(self, action: semconv.Action) -> float | None:
        """Give the provider as long as the plugin gives it for a request."""
        return self._adapter.turn_window()

    def delivery(self, result: Generation) -> Delivery | None:
        """Return the adapter's view of the reply, or None if it sees no more than its start."""
        self._delivered = self._adapter.turn_delivery(result)
        return self._delivered

    def abandon(self, attempt: asyncio.Future[Generation], then: semconv.Action | None) -> None:
        """Count the provider's reply as late if it begins after all."""
        if self._delivered is None or not self._delivered.first_output:
            self._turns.may_be_late(self)
        failed = None if self._delivered is None else self._delivered.failure
        if failed is not None and failed.ended_locally:
            self._adapter.close_turn()
        attempt.cancel()

    def ended(self) -> None:
        """Expect the next turn."""
        self._turns.ended(self)
