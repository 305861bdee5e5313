# SPDX-License-Identifier: Apache-2.0
"""Phonic: one slot, no request ids, and no way back once the connection is lost.

Facts (livekit-plugins-phonic 1.8.9, ``realtime/realtime_model.py``):

* The next reply of the server resolves the slot. The plugin's time-out (10 s) empties it. A request
  waits in a task of its own until the conversation is ready. The time-out does not stop that task,
  so it would send the request after its failure was reported.
* The caller's typed words are sent along with the first request and forgotten then.
* There is no reconnect. A lost connection emits an ``error`` event with ``recoverable=True`` and
  then the same with False. Any other end of the session emits only the latter, and the hook stops.
  A close with 1000 emits no event: the main task just ends.
* The end of a reply has no event. ``_close_current_generation`` closes a reply that is complete. It
  also closes it if the caller speaks, on another request, and at the end of the main task.
* The error of a connection that was refused has the request's headers in its text: the API key.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from livekit.agents import llm

from traced_retry import semconv
from traced_retry.core.failure import Failure
from traced_retry.core.guard import suppress_and_log
from traced_retry.livekit.adapter import Call, Generation, Replies, failure_from_event
from traced_retry.livekit.single_slot import (
    SingleSlotAdapter,
    SingleSlotRequest,
    SlotDelivery,
    before,
)


class PhonicAdapter(SingleSlotAdapter):
    """One session with Phonic."""

    required_attributes: ClassVar[tuple[str, ...]] = (
        "_pending_generate_reply_fut",
        "_generate_reply_task",
        "_pending_user_text",
        "_main_atask",
        "_close_current_generation",
        *SlotDelivery.required_attributes,
    )
    slot = "_pending_generate_reply_fut"
    window = 10.0

    def __init__(self, session: llm.RealtimeSession[Any], replies: Replies) -> None:
        super().__init__(session, replies)
        self._watched = False
        session.on("generation_created", self._on_generation)

    def request(self, call: Call) -> PhonicRequest:
        """Create the request for one reply."""
        return PhonicRequest(self, call)

    def let_go(self, attempt: asyncio.Future[Generation]) -> bool:
        """Let go of the attempt. A request that was not sent yet is then never sent."""
        gone = super().let_go(attempt)
        task: asyncio.Task[None] | None = self.session._generate_reply_task  # type: ignore[attr-defined]
        if gone and task is not None:
            task.cancel()
        return gone

    def watch_for_the_end(self) -> None:
        """Watch for the end of a reply and of the conversation, which have no event."""
        if not self._watched:
            self._watched = True
            before(self.session, "_close_current_generation", self._on_closing)
            self.session._main_atask.add_done_callback(self._on_over)  # type: ignore[attr-defined]

    def _on_over(self, _: asyncio.Task[None]) -> None:
        with suppress_and_log("seeing the conversation end"):
            self.die(self.dead or failure_from_event("connection_lost", "the conversation is over"))

    def _on_closing(self, interrupted: bool) -> None:
        main: asyncio.Task[None] = self.session._main_atask  # type: ignore[attr-defined]
        lost = _cut_short() if asyncio.current_task() is main else None
        self.speaking.end(lost, interrupted=interrupted)

    def _on_generation(self, event: Generation) -> None:
        # Emitted after the slot was resolved: then somebody waited for it.
        with suppress_and_log("reading a generation"):
            if event.user_initiated:
                self.watch_for(None)
            else:
                self.heard()

    def on_error(self, event: llm.RealtimeModelError) -> None:
        """End the conversation, and remove the API key from the error."""
        if getattr(event.error, "headers", None):
            event.error.headers = None  # type: ignore[attr-defined]
        if event.recoverable:
            self.speaking.end(_cut_short())
            self.die(failure_from_event("connection_lost", "the connection was lost"))
        elif self.dead is None:
            self.dead = self.classify_event(event)


class PhonicRequest(SingleSlotRequest):
    """One reply's request to Phonic."""

    _adapter: PhonicAdapter

    def __init__(self, adapter: PhonicAdapter, call: Call) -> None:
        super().__init__(adapter, call)
        self._typed: str | None = None

    def attempt(self, action: semconv.Action) -> asyncio.Future[Generation]:
        """Send the request with the caller's typed words, or listen."""
        session: Any = self._adapter.session
        if action == "send":
            self._typed = session._pending_user_text = session._pending_user_text or self._typed
        self._adapter.watch_for_the_end()
        return super().attempt(action)

    def cancel(self, attempt: asyncio.Future[Generation]) -> None:
        """Forget the caller's typed words that were not sent yet, as the plugin does."""
        if self._adapter.let_go(attempt):
            self._adapter.session._pending_user_text = None  # type: ignore[attr-defined]


def _cut_short() -> Failure:
    return failure_from_event("connection_lost", "the conversation was lost during the reply")
