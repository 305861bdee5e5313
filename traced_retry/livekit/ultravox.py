# SPDX-License-Identifier: Apache-2.0
"""Ultravox: one slot, no request ids, and a future that must never be cancelled.

Facts (livekit-plugins-ultravox 1.8.9, ``realtime/realtime_model.py``):

* The state ``speaking`` or the agent's first words resolve the slot if the epoch beside it is set.
  The plugin's time-out (5 s) empties both.
* Cancelling the slot's future makes the plugin send an empty immediate message. ``deferResponse``
  is lost on its way (a pydantic alias), so by the protocol it requests *one more* reply. The
  adapter therefore never cancels. To let go of a request, it empties the slot.
* A tool call resolves no slot. If the reply has no words, its request fails after 5 s, and
  LiveKit runs the tool only then, because the speech that waits for the request comes first.
* ``generation_created`` of a reply says ``user_initiated=False``, comes as early as the state
  ``thinking``, and makes the agent read the same streams a second time. It does not show whether a
  reply is heard. The adapter reads the raw events for that, and never the streams.
* A lost call ends with an ``error`` event with ``recoverable=False``, and the hook stops. Only if a
  call could not be reached does the plugin try again. Unsent messages wait for it.
* If the plugin notices the loss while sending, there is no event. It opens another call, which
  begins with ``call_started``. It does the same for new instructions or tools, and then with
  another ``_msg_ch``.
* A server's event is emitted before the plugin acts on it.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any, ClassVar

from livekit.agents import llm

from traced_retry.core.failure import Failure, kind_of_status
from traced_retry.core.guard import suppress_and_log
from traced_retry.livekit.adapter import Generation, Replies, failure_from_event
from traced_retry.livekit.single_slot import SingleSlotAdapter, SlotDelivery, before

_STATUS = re.compile(r"HTTP (\d{3})\b")
"""The plugin gives the reason of a refused call only as text: ``HTTP 401: Unauthorized``."""
_TOOL_CALL = "_handle_tool_invocation_event"


class UltravoxAdapter(SingleSlotAdapter):
    """The state of the replies of one session, read from the server's events."""

    required_attributes: ClassVar[tuple[str, ...]] = (
        "_pending_generation_fut",
        "_pending_generation_epoch",
        "_msg_ch",
        _TOOL_CALL,
        *SlotDelivery.required_attributes,
    )
    slot = "_pending_generation_fut"
    window = 5.0

    def __init__(self, session: llm.RealtimeSession[Any], replies: Replies) -> None:
        super().__init__(session, replies)
        self._channel: Any = None
        """The channel of messages to the current call."""
        self._created: Generation | None = None
        """The latest generation."""
        session.on("ultravox_server_event_received", self._on_server_event)
        session.on("generation_created", self._on_generation)
        if hasattr(session, _TOOL_CALL):
            before(session, _TOOL_CALL, self._on_tool_call)

    def install(self, future: asyncio.Future[Generation] | None) -> None:
        """Set the slot, and the epoch beside it, without which the slot is not resolved."""
        super().install(future)
        # The plugin compares it with the time of an event: any moment before now will do.
        epoch = None if future is None else time.perf_counter()
        self.session._pending_generation_epoch = epoch  # type: ignore[attr-defined]

    def _on_server_event(self, event: dict[str, Any]) -> None:
        with suppress_and_log("reading a server event"):
            self.connected = True
            if event.get("type") == "call_started" or self._channel is None:
                self._cut()
                self._channel = self.session._msg_ch  # type: ignore[attr-defined]
            asyncio.get_running_loop().call_soon(self.speaking.check)
            if event.get("state") == "speaking" or event.get("role") == "agent":
                self.heard()

    def _on_generation(self, event: Generation) -> None:
        self._created = event

    def _on_tool_call(self, _: object) -> None:
        if self.session._current_generation is None:  # type: ignore[attr-defined]
            self._created = None  # The plugin begins another one for the call.
        asyncio.get_running_loop().call_soon(self._resolve_by_call)

    def _resolve_by_call(self) -> None:
        """Resolve the open request by a tool call, in the way the plugin does by a word."""
        created, waiting = self._created, self.waiting
        if created is None or waiting is None:
            return
        self.install(None)
        waiting.set_result(
            llm.GenerationCreatedEvent(
                message_stream=created.message_stream,
                function_stream=created.function_stream,
                user_initiated=True,
            )
        )

    def on_error(self, event: llm.RealtimeModelError) -> None:
        """End the reply, because the call was lost or refused.

        If the call was unreachable, the plugin tries again.
        """
        self._cut()
        if event.recoverable:
            self.connected = False

    def classify_event(self, event: llm.RealtimeModelError) -> Failure:
        """Classify an ``error`` event by the HTTP status in its text, if there is one."""
        if status := _STATUS.search(str(event.error)):
            return failure_from_event(kind_of_status(int(status[1])), "the call was refused")
        return super().classify_event(event)

    def _cut(self) -> None:
        """End the current reply, because its call is gone."""
        self.speaking.check()
        meant = self.session._msg_ch is not self._channel  # type: ignore[attr-defined]
        why = failure_from_event("connection_lost", "the call was lost during the reply")
        self.speaking.end(None if meant else why)
