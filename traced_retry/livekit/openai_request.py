# SPDX-License-Identifier: Apache-2.0
"""One reply of an OpenAI-like server: :class:`OpenAIRequest`, and :class:`OpenAITurn`.

:class:`~traced_retry.livekit.openai.OpenAIAdapter` reads the server's events and knows the ids of
the requests. See there for the facts about the plugin.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from livekit.agents import llm

from traced_retry import semconv
from traced_retry.core.failure import Failure, explain, failure, wait_in
from traced_retry.core.request import Delivery
from traced_retry.livekit.adapter import failure_from_error
from traced_retry.livekit.events import read_error, text
from traced_retry.livekit.request import Call, Generation, PassthroughRequest, timeout_failure
from traced_retry.livekit.streams import Streams

if TYPE_CHECKING:
    from traced_retry.livekit.openai import OpenAIAdapter

_ACTIVE = "conversation_already_has_active_response"
"""The error code of a request that the server rejects because another response is active."""
_TURN_WINDOW = 10.0
"""Seconds in which the server has to begin its answer to the caller, which are those that the
plugin gives to a request."""


class OpenAIRequest(PassthroughRequest):
    """One reply's request to an OpenAI-like server."""

    def __init__(self, adapter: OpenAIAdapter, call: Call) -> None:
        super().__init__(call)
        self._adapter = adapter
        self.adopts = False
        """Whether a request stays open when its attempt has ended, so that its answer is taken."""
        self.ids: set[str] = set()
        """The ids under which the current attempt was sent."""
        self._earlier: dict[str, int] = {}
        """The ids of earlier attempts that may still be answered, with the attempt's number."""
        self._adopted: asyncio.Future[Generation] | None = None
        """The answer to an earlier request that came between two attempts."""
        self._number = 0
        self._rejected = False
        """Whether the server rejected the current attempt's request."""
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
        """Send the request and read its id, or listen for the answer to an earlier request."""
        self._number += 1
        self._losses = self._adapter.connection_losses
        self._rejected, self._flowing = False, False
        if action == "listen":
            attempt = self._adopted or self._open_future()
            self._adopted = None
        else:
            before = self._adapter.pending()
            self.may_be_answered = False
            self._adapter.sent()
            attempt = self.call()
            self.ids = self._adapter.pending() - before
            self.delivered = None
            if self._streams is not None:
                self._adapter.announce_once(attempt)
        self._current = attempt
        self._adapter.open.append(self)
        attempt.add_done_callback(self._on_done)
        return attempt

    def _open_future(self) -> asyncio.Future[Generation]:
        """Return a future for the answer to an earlier request."""
        self.ids, self.delivered = set(), None
        attempt: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        if self._streams is not None:
            self._adapter.announce_once(attempt)
        return attempt

    def settle(self, answered: str) -> int | None:
        """Take the response to the request ``answered`` for the reply, and discard all others.

        Return the number of that request's attempt, if it is an earlier one.
        """
        number = self._forget(answered)
        others = self.ids - {answered}
        if number is not None:
            attempt = self._current
            if attempt is None or attempt.done():
                attempt = self._adopted = self._open_future()
            self._adapter.adopt(answered, attempt)
            self.ids = {answered}
        self._adapter.discard(others)
        self._discard_earlier()
        return number

    def reject(self, id_: str, error: object) -> None:
        """Note that the server rejected an earlier request. Fail an attempt that listens to it."""
        self._forget(id_)
        if not (self._earlier or self.ids):
            why = failure_from_error(error, "the provider rejected the request")
            self._adapter.replies.report_failure(why, only=self)

    def is_answered_twice(self) -> bool:
        """Note a response without an id. Return whether it answers the reply a second time."""
        if not self.may_be_answered:
            self.may_be_answered = True
            return False
        if not self._earlier:
            return False
        self._forget(next(reversed(self._earlier)))
        return True

    def _forget(self, id_: str) -> int | None:
        """Close an earlier request. Return the number of its attempt, if it was open."""
        self._adapter.earlier.pop(id_, None)
        return self._earlier.pop(id_, None)

    def _discard_earlier(self) -> None:
        """Cancel the responses to all earlier requests by id when they come."""
        if earlier := set(self._earlier):
            for id_ in earlier:
                self._forget(id_)
            self._adapter.discard(earlier)

    def explain(self, error: BaseException) -> Failure:
        """Classify by the raw event if there is one. The future's error may lack the code."""
        errors = self._adapter.errors
        raw = next((errors.pop(id_) for id_ in self.ids if id_ in errors), None)
        why = explain(error)
        if raw is not None:
            self.may_be_answered, self._rejected = False, True
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
        the server failed to echo it, even once. A server that rejects a request because of a
        response that has not begun has accepted an earlier request, so "listen" follows.
        """
        if self.may_be_answered:
            if self._adapter.echoes is None:
                self._adapter.stop_sending_again()
            return None
        if self._earlier and why.code == _ACTIVE and not self._adapter.active:
            return "listen"
        return "send" if self.ids and self._adapter.echoes is not False else None

    def ready(self) -> bool:
        """Return whether a request can be answered: see :meth:`OpenAIAdapter.ready`."""
        return self._adapter.ready()

    def can_hedge(self) -> bool:
        """Return whether no response has begun, and the server would begin a second one."""
        adapter = self._adapter
        return (
            self.adopts
            and bool(self.ids)
            and not self.may_be_answered
            and adapter.echoes is not False
            and adapter.connected
            and not adapter.active
        )

    def can_replace(self) -> bool:
        """Return whether the ids allow it."""
        return bool(self.ids) and self._adapter.echoes is not False

    def has_answer(self) -> bool:
        """Return whether an earlier request was answered between two attempts."""
        return self._adopted is not None

    def abandon(self, attempt: asyncio.Future[Generation], then: semconv.Action | None) -> None:
        """Keep the request open if another attempt follows, or else discard its id.

        End the plugin's future like its own time-out, without a cancel.
        """
        if self.adopts and then is not None and self.delivered is None and not self._rejected:
            for id_ in self.ids:
                self._earlier[id_] = self._number
                self._adapter.earlier[id_] = self
        else:
            self._adapter.discard(self.ids)
        if then is None:
            self._discard_earlier()
        self._close()
        if not attempt.done():
            if then is None and (self._adapter.echoes is False or not self.ids):
                self._adapter.unanswered = self
            attempt.set_exception(llm.RealtimeError("abandoned by traced_retry"))
        else:
            self._stop(attempt)

    def cancel(self, attempt: asyncio.Future[Generation]) -> None:
        """Cancel as the agent alone would, and keep the id discarded over a reconnect."""
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
            self._streams.commit()
        return self.delivered

    def heard(self, *, tool: bool = False) -> None:
        """Note output, or with ``tool`` a tool call. No other generation may follow this one."""
        if self.delivered is not None:
            self.delivered.mark_output(tool=tool)
        if self._streams is not None and self._flowing:
            self._streams.commit()

    def ended(self) -> None:
        """Close the streams, because the agent no longer waits."""
        self._discard_earlier()
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


class OpenAITurn(OpenAIRequest):
    """A reply that the server starts by itself, because the caller spoke.

    The first attempt listens to the server's own response. If this fails before its first word, the
    next attempt requests a response, which continues the same streams.
    """

    def __init__(self, adapter: OpenAIAdapter, item_id: str) -> None:
        super().__init__(adapter, adapter.replies.request_once)
        self._item_id = item_id
        """The id of the item with the caller's speech, or "" if it is not known."""
        self._first: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()

    @property
    def begun(self) -> bool:
        """Whether the server has begun a response, or the turn is over."""
        return self._first.done() or bool(self.ids)

    def answer(self, generation: Generation) -> None:
        """Take ``generation`` for the server's response to the turn."""
        self._first.set_result(generation)
        if self._current is None:  # Its beginning is the first sign of the turn.
            now = asyncio.get_running_loop().time()
            self._adapter.replies.start(self._adapter, self, now)
        else:
            self._adapter.replies.wake()

    def supersede(self) -> None:
        """Expect no response to this turn any more."""
        self._first.cancel()

    def was_resolved_with(self, generation: Generation) -> bool:
        """Return whether ``generation`` is the first one of this turn, and was requested by us."""
        if self._streams is not None or self._current is None:
            return False
        return is_resolved_with(generation, self._current)

    def attempt(self, action: semconv.Action) -> asyncio.Future[Generation]:
        """Listen to the server's own response, or request one."""
        if action == "listen":
            self._current = self._first
            return self._first
        return super().attempt(action)

    def limit(self, action: semconv.Action) -> float | None:
        """Give the server :data:`_TURN_WINDOW` seconds to begin its own response."""
        return _TURN_WINDOW if action == "listen" else None

    def next_action(self, why: Failure) -> semconv.Action | None:
        """Return "send" if the caller cannot hear a second reply, and the server knows the turn.

        A model may choose to stay silent, so an empty response is final. A server that has not
        begun its response may still do so. On a new connection the server knows the caller's words
        only if they were transcribed.
        """
        adapter = self._adapter
        if not adapter.recovers_turns or adapter.echoes is False or why.kind == "empty_response":
            return None
        if why.kind == "connection_lost":
            return "send" if adapter.is_transcribed(self._item_id) else None
        if self.ids:
            return super().next_action(why)
        return "send" if self._first.done() else None

    def can_replace(self) -> bool:
        """Return whether another response may continue the streams of this one."""
        return self._adapter.recovers_turns and self._adapter.echoes is not False

    def ended(self) -> None:
        """Close the streams, and expect the next turn."""
        super().ended()
        self._adapter.forget_turn(self)


def is_resolved_with(generation: Generation, attempt: asyncio.Future[Generation]) -> bool:
    """Return whether ``generation`` is the result of ``attempt``."""
    if not attempt.done() or attempt.cancelled() or attempt.exception() is not None:
        return False
    return attempt.result() is generation
