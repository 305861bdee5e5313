# SPDX-License-Identifier: Apache-2.0
"""Listening, for plugins with one slot for the open request and no ids in the replies.

Such a plugin keeps the future of the open request in one slot of its session, and resolves what
is there with whatever the server begins next. Sending again after a silence would have the caller
hear two replies. So the next attempt is ``listen``: nothing is sent, and a fresh future takes the
slot in the very call that ends the attempt before, ahead of the plugin's own time-out, which then
finds the slot taken and leaves it alone.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any, ClassVar

from livekit.agents import llm

from traced_retry import semconv
from traced_retry.core.failure import Failure
from traced_retry.core.guard import suppress_and_log
from traced_retry.core.request import Delivery
from traced_retry.livekit.adapter import (
    Adapter,
    Call,
    Generation,
    PassthroughRequest,
    Replies,
    empty_failure,
    timeout_failure,
)

_AHEAD = 0.1
"""Seconds by which an attempt ends before the plugin's own time-out would empty the slot."""
_SLIVER = 1.0
"""Seconds before the deadline that are not worth a window of their own."""
_LONGEST = 60.0
"""Seconds from its first words after which a reply is taken for heard, its end unreported."""


class SlotDelivery:
    """The reply that is being spoken, watched to its end; several, where they share one.

    Ultravox's, Phonic's and AWS's plugins keep what they speak in ``_current_generation``, and None
    as soon as it is whole, or was cut because the caller spoke. That is looked at, its streams
    never are.

    Ultravox's and Phonic's have the channels of sound, words and tool calls in it. A reply without
    sound (without words, if the model has no audio output) and without a tool call has failed. It
    is not requested again. AWS's channels change within a reply, so its output is not checked.
    """

    required_attributes: ClassVar[tuple[str, ...]] = ("_current_generation",)

    def __init__(self, session: llm.RealtimeSession[Any]) -> None:
        self._session: Any = session
        self._generation: Any = None
        self._open: list[tuple[Delivery, asyncio.TimerHandle]] = []
        self._latest: Any = None
        self._has_output = True
        """Whether the latest generation has output, or need not have any."""
        session.on("generation_created", self._on_generation)
        session.on("input_speech_started", self._on_interrupted)

    def _on_generation(self, _: Generation) -> None:
        with suppress_and_log("watching a generation"):
            audio = self._session.realtime_model.capabilities.audio_output
            names = ("audio_ch" if audio else "text_ch", "function_ch")
            self._latest = generation = self._session._current_generation
            channels = [getattr(generation, name, None) for name in names]
            self._has_output = None in channels
            for channel in channels:
                if channel is not None:
                    channel.send_nowait = functools.partial(self._note, channel.send_nowait)

    def _note(self, send: Callable[[Any], None], value: Any) -> None:
        if value != "":  # Phonic's plugin ends a text with it.
            self._has_output = True
        send(value)

    def _on_interrupted(self, _: object) -> None:
        self._has_output = True  # The caller spoke first, so the reply owes nothing.

    def begin(self, result: Generation) -> Delivery | None:
        """Watch the reply ``result``. Return None if it is over, and had output."""
        generation = self._session._current_generation
        if generation is None or generation.message_ch is not result.message_stream:
            if self._has_output or self._latest.message_ch is not result.message_stream:
                return None
            delivery = Delivery()
            delivery.end(empty_failure("reply"))
            return delivery
        self._generation = generation
        delivery = Delivery()
        delivery.mark_output()  # It begins with its first words, so it is never sent again.
        timer = asyncio.get_running_loop().call_later(_LONGEST, delivery.end)
        self._open.append((delivery, timer))
        return delivery

    def check(self) -> None:
        """See whether it is whole."""
        if self._open and self._session._current_generation is not self._generation:
            self.end()

    def end(self, why: Failure | None = None, *, interrupted: bool = False) -> None:
        """End the delivery. The reply is whole, was ``interrupted``, or was cut by ``why``."""
        ended, self._open, self._generation = self._open, [], None
        self._has_output = self._has_output or interrupted
        for delivery, timer in ended:
            timer.cancel()
            if why is None and not self._has_output:
                delivery.first_output_at = None  # Its beginning was taken for its first word.
                delivery.end(empty_failure("reply"))
            else:
                delivery.end(why)


def before(session: llm.RealtimeSession[Any], method: str, callback: Callable[..., None]) -> None:
    """Call back, with the same arguments, each time before the session's ``method`` is called."""
    original = getattr(session, method)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        with suppress_and_log(f"seeing {method}"):
            callback(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(session, method, replacement)


class SingleSlotAdapter(Adapter):
    """One session of a plugin that has one slot for the request it waits for."""

    actions: ClassVar[tuple[semconv.Action, ...]] = ("send", "listen")
    slot: ClassVar[str]
    """Name of the session's attribute with the future of the open request, or None."""
    window: ClassVar[float]
    """Seconds after which the plugin itself gives up, and that one ``listen`` takes."""

    def __init__(self, session: llm.RealtimeSession[Any], replies: Replies) -> None:
        super().__init__(session, replies)
        self.connected = True
        """Whether the plugin is not known to have lost its server."""
        self.dead: Failure | None = None
        """Why nothing can be asked of this session any more, where we know better than the hook."""
        self.speaking = SlotDelivery(session)
        self._given_up: PassthroughRequest | None = None
        session.on("input_speech_started", lambda _: self.watch_for(None))
        before(session, "emit", self._on_emit)

    def _on_emit(self, event: str, *args: Any) -> None:
        # Up to livekit 1.1.14 at least, an event's handlers are called in any order.
        if event == "error":
            self.on_error(*args)

    def on_error(self, event: llm.RealtimeModelError) -> None:
        """Take note of an ``error`` event, before the hook and all others are told of it."""

    def request(self, call: Call) -> SingleSlotRequest:
        """One reply's request."""
        return SingleSlotRequest(self, call)

    @property
    def waiting(self) -> asyncio.Future[Generation] | None:
        """The future that the server's next reply resolves."""
        future: asyncio.Future[Generation] | None = getattr(self.session, self.slot)
        return None if future is None or future.done() else future

    def install(self, future: asyncio.Future[Generation] | None) -> None:
        """Have the server's next reply resolve ``future``, or nothing."""
        setattr(self.session, self.slot, future)

    def let_go(self, attempt: asyncio.Future[Generation]) -> bool:
        """Have the server's next reply no longer resolve ``attempt``; False if it did not."""
        if self.waiting is not attempt:
            return False
        self.install(None)
        return True

    def die(self, why: Failure) -> None:
        """End what is asked of this session, now and later."""
        self.dead = why
        self.replies.report_failure(why, "not_recoverable")

    def watch_for(self, request: PassthroughRequest | None) -> None:
        """Count the server's next reply as the late one of ``request``.

        What it begins after another request, or after the caller spoke, is taken for an answer to
        that, and is not counted.
        """
        self._given_up = request

    def heard(self) -> None:
        """The server begins a reply."""
        request, self._given_up = self._given_up, None
        if request is not None and self.waiting is None:
            request.on_late()


class SingleSlotRequest(PassthroughRequest):
    """One reply's request: sent once, then listened for."""

    def __init__(self, adapter: SingleSlotAdapter, call: Call) -> None:
        super().__init__(call)
        self._adapter = adapter
        self._attempts = 0
        self._began = 0.0
        self._action: semconv.Action = "send"

    def attempt(self, action: semconv.Action) -> asyncio.Future[Generation]:
        """Send it, or take the slot for the wait to go on."""
        if not self._attempts:
            self._began = asyncio.get_running_loop().time()
        self._attempts += 1
        self._action = action
        self._adapter.watch_for(None)
        if self._adapter.dead is not None:
            self._adapter.replies.report_failure(self._adapter.dead, "not_recoverable", only=self)
        if action != "listen":
            return self.call()
        attempt: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._adapter.install(attempt)
        return attempt

    def limit(self, action: semconv.Action) -> float | None:
        """The plugin's own time; the last ``listen`` costs nothing, and lasts to the deadline."""
        policy, window = self._adapter.replies.policy, self._adapter.window
        if self._attempts >= policy.max_retries:
            return None
        if action == "send":
            return window - _AHEAD
        left = self._began + policy.deadline - asyncio.get_running_loop().time()
        return window if left > window + _SLIVER else None

    def timed_out(self, seconds: float) -> Failure:
        """Our own time-out; it was the connection's fault where that is down."""
        return timeout_failure(seconds, "timeout" if self._adapter.connected else "connection_lost")

    def next_action(self, why: Failure) -> semconv.Action | None:
        """After silence, listen; send again only where the user chose to hear a reply twice."""
        if why.kind not in ("timeout", "connection_lost"):
            return None
        resend = self._adapter.replies.policy.on_silence == "resend"
        return "send" if resend and self._action == "listen" else "listen"

    def abandon(self, attempt: asyncio.Future[Generation], then: semconv.Action | None) -> None:
        """Keep the slot for a ``listen`` that follows; else let go of it."""
        if then != "listen":
            self._adapter.let_go(attempt)
        if then is None:
            self._adapter.watch_for(self)

    def cancel(self, attempt: asyncio.Future[Generation]) -> None:
        """Barge-in. The caller speaks, and the server answers that; nothing is told to it."""
        self._adapter.let_go(attempt)

    def delivery(self, result: Generation) -> Delivery | None:
        """Watch the reply to its end: it may be cut short."""
        return self._adapter.speaking.begin(result)
