# SPDX-License-Identifier: Apache-2.0
"""Wait longer for a reply, on plugins with one open request and without ids in the replies.

Such a plugin keeps the future of the open request in one attribute of its session, the slot. The
server's next reply resolves this future. If the adapter sent the request again after silence, the
caller could hear two replies. Therefore the next attempt is a ``listen``, which sends no request:
the adapter puts a new future into the slot and waits for the answer to the first request.

The new future takes the slot in the call that ends the earlier attempt, shortly before the plugin's
own time-out. When the time-out fires, it finds another future in the slot and does not change it.
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
from traced_retry.livekit.adapter import Adapter, Replies, empty_failure
from traced_retry.livekit.request import Call, Generation, PassthroughRequest, timeout_failure
from traced_retry.livekit.streams import shut

_AHEAD = 0.1
"""Seconds by which an attempt ends before the plugin's own time-out would empty the slot."""
_SLIVER = 1.0
"""Seconds before the deadline that are too short for another window."""
_LONGEST = 60.0
"""Seconds from its first words until a reply without a reported end counts as heard."""


class SlotDelivery:
    """The reply that is being spoken, watched to its end. Several requests may share it.

    The plugins of Ultravox, Phonic and AWS keep the current reply in ``_current_generation``. They
    set it to None when the reply is complete or the caller spoke. The adapter reads this attribute
    and not the streams.

    On Ultravox and Phonic, ``_current_generation`` has the channels of sound, words and tool calls.
    A reply has failed if it has no tool call and no sound, or no words if the model has no audio
    output. It is not requested again. On AWS the channels change within a reply, so its output is
    not checked.
    """

    required_attributes: ClassVar[tuple[str, ...]] = ("_current_generation",)

    def __init__(self, session: llm.RealtimeSession[Any]) -> None:
        self._session: Any = session
        self._generation: Any = None
        self._open: list[tuple[Delivery, asyncio.TimerHandle]] = []
        self._latest: Any = None
        self._has_output = True
        """Whether the latest generation has output, or need not have any."""
        self._called_tool = self._spoke = False
        """Whether the latest generation holds a tool call, or speech."""
        self._interrupted = False
        before(session, "emit", self._on_emit)
        session.on("input_speech_started", self._on_interrupted)

    def _on_emit(self, event: str, *_: Any) -> None:
        if event != "generation_created":
            return
        audio = self._session.realtime_model.capabilities.audio_output
        generation = self._session._current_generation
        if generation is not self._latest:
            self._latest = generation
            self._called_tool = self._spoke = self._interrupted = False
        message = getattr(generation, "message_gen", None)  # AWS's plugin renews its channels.
        speech = getattr(message or generation, "audio_ch" if audio else "text_ch", None)
        tools = getattr(generation, "function_ch", None)
        self._has_output = message is not None or None in (speech, tools)
        # Nova Sonic's words come ahead of their sound.
        words = getattr(message, "text_ch", None)
        for channel, tool in ((speech, False), (words, False), (tools, True)):
            if channel is not None and not isinstance(channel.send_nowait, functools.partial):
                channel.send_nowait = functools.partial(self._note, channel.send_nowait, tool)

    def _note(self, send: Callable[[Any], None], tool: bool, value: Any) -> None:
        if value != "":  # Phonic's plugin ends a text with it.
            self._has_output = True
            self._called_tool |= tool
            self._spoke |= not tool
            for delivery, _ in self._open:
                delivery.mark_output(tool=tool)
        send(value)

    def _on_interrupted(self, _: object) -> None:
        self._has_output = self._interrupted = True  # The caller spoke first.

    def begin(self, result: Generation, *, started: bool = True) -> Delivery | None:
        """Watch the reply ``result``. Return None if it is over, and had output.

        If it was ``started`` by its first words, as the answer to a request is, it is never sent
        again. A reply that the provider starts may begin before its first words.
        """
        generation = self._session._current_generation
        delivery = Delivery()
        delivery.response_id = result.response_id
        if generation is None or generation.message_ch is not result.message_stream:
            if self._has_output or self._latest.message_ch is not result.message_stream:
                return None
            delivery.end(empty_failure("reply"))
            return delivery
        self._generation = generation
        if started or self._spoke or self._called_tool:
            delivery.mark_output(tool=self._called_tool and not self._spoke)
        timer = asyncio.get_running_loop().call_later(_LONGEST, delivery.end)
        self._open.append((delivery, timer))
        return delivery

    def check(self) -> None:
        """Check whether the reply is complete."""
        if self._open and self._session._current_generation is not self._generation:
            self.end()

    def close(self) -> None:
        """Close the channels of the generation that is not over, and drop what comes later."""
        generation = self._session._current_generation
        for name in ("text_ch", "audio_ch", "function_ch", "message_ch"):
            channel = getattr(generation, name, None)
            if channel is not None and not channel.closed:
                shut(channel)

    def end(self, why: Failure | None = None, *, interrupted: bool = False) -> None:
        """End the delivery. The reply is whole, was ``interrupted``, or was cut by ``why``."""
        ended, self._open, self._generation = self._open, [], None
        replaced = interrupted and not self._interrupted  # The caller did not speak.
        interrupted = interrupted or self._interrupted
        self._has_output = self._has_output or interrupted
        for delivery, timer in ended:
            timer.cancel()
            if why is None and not self._has_output:
                delivery.first_output_at = None  # Its beginning counted as its first word.
                delivery.end(empty_failure("reply"))
            else:
                delivery.nothing_due = replaced and not delivery.first_output
                delivery.end(why, cancelled=interrupted and not delivery.nothing_due)


def before(session: llm.RealtimeSession[Any], method: str, callback: Callable[..., None]) -> None:
    """Call back with the same arguments before each call of the session's ``method``."""
    original = getattr(session, method)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        with suppress_and_log(f"seeing {method}"):
            callback(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(session, method, replacement)


class SingleSlotAdapter(Adapter):
    """One session of a plugin with a single slot for the open request."""

    actions: ClassVar[tuple[semconv.Action, ...]] = ("send", "listen")
    slot: ClassVar[str]
    """Name of the session's attribute with the future of the open request, or None."""
    window: ClassVar[float]
    """Seconds until the plugin gives up, and the length of one ``listen``."""

    def __init__(self, session: llm.RealtimeSession[Any], replies: Replies) -> None:
        super().__init__(session, replies)
        self.connected = True
        """Whether the plugin is connected, as far as known."""
        self.dead: Failure | None = None
        """The failure of a dead session, if the adapter knows it better than the hook."""
        self.watch_deliveries()
        self._given_up: PassthroughRequest | None = None
        session.on("input_speech_started", lambda _: self.watch_for(None))
        before(session, "emit", self._on_emit)

    def watch_deliveries(self) -> None:
        """Have the course of each reply watched."""
        self.speaking = SlotDelivery(self.session)

    def starts_reply(self, generation: Generation) -> bool:
        """Return whether no request is open, and none was given up that may be answered now."""
        return self.waiting is None and self._given_up is None

    def turn_delivery(self, generation: Generation) -> Delivery | None:
        """Watch the reply to its end, as the answer to a request."""
        return self.speaking.begin(generation, started=False)

    def close_turn(self) -> None:
        """End the streams of a reply whose time is up, or the agent would wait for their end."""
        self.speaking.close()

    def expects_answer(self) -> bool:
        """Return whether a request is open."""
        return self.waiting is not None

    def caller_spoke(self) -> None:
        """Take the next reply for the answer to the caller."""
        self.watch_for(None)

    def turn_window(self) -> float | None:
        """Return the plugin's time-out for a request."""
        return self.window

    def _on_emit(self, event: str, *args: Any) -> None:
        # Up to livekit 1.1.14 at least, an event's handlers are called in any order.
        if event == "error":
            self.on_error(*args)

    def on_error(self, event: llm.RealtimeModelError) -> None:
        """Handle an ``error`` event before the hook and all other listeners get it."""

    def request(self, call: Call) -> SingleSlotRequest:
        """Create the request for one reply."""
        return SingleSlotRequest(self, call)

    @property
    def waiting(self) -> asyncio.Future[Generation] | None:
        """Return the future that the server's next reply resolves."""
        future: asyncio.Future[Generation] | None = getattr(self.session, self.slot)
        return None if future is None or future.done() else future

    def install(self, future: asyncio.Future[Generation] | None) -> None:
        """Let the server's next reply resolve ``future``, or no future."""
        setattr(self.session, self.slot, future)

    def let_go(self, attempt: asyncio.Future[Generation]) -> bool:
        """Free the slot of ``attempt``. Return False if the slot has another future."""
        if self.waiting is not attempt:
            return False
        self.install(None)
        return True

    def die(self, why: Failure) -> None:
        """Fail all requests of this session, now and later."""
        self.dead = why
        self.replies.report_failure(why, "not_recoverable")

    def watch_for(self, request: PassthroughRequest | None) -> None:
        """Count the server's next reply as the late one of ``request``.

        A reply after another request, or after the caller spoke, counts as the answer to that and
        not as late.
        """
        self._given_up = request

    def heard(self) -> None:
        """Count a late reply when the server begins it."""
        request, self._given_up = self._given_up, None
        if request is not None and self.waiting is None:
            request.on_late()


class SingleSlotRequest(PassthroughRequest):
    """The request for one reply: sent once, then listened for."""

    def __init__(self, adapter: SingleSlotAdapter, call: Call) -> None:
        super().__init__(call)
        self._adapter = adapter
        self._attempts = 0
        self._began = 0.0
        self._action: semconv.Action = "send"

    def attempt(self, action: semconv.Action) -> asyncio.Future[Generation]:
        """Send the request, or take the slot to keep waiting."""
        if not self._attempts:
            self._began = asyncio.get_running_loop().time()
        self._attempts += 1
        self._action = action
        self._adapter.watch_for(None)
        self._adapter.turns.supersede()
        if self._adapter.dead is not None:
            self._adapter.replies.report_failure(self._adapter.dead, "not_recoverable", only=self)
        if action != "listen":
            return self.call()
        attempt: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._adapter.install(attempt)
        return attempt

    def limit(self, action: semconv.Action) -> float | None:
        """Return the plugin's time-out. The last ``listen`` lasts until the deadline."""
        policy, window = self._adapter.replies.policy, self._adapter.window
        if self._attempts >= policy.max_retries:
            return None
        if action == "send":
            return window - _AHEAD
        left = self._began + policy.deadline - asyncio.get_running_loop().time()
        return window if left > window + _SLIVER else None

    def timed_out(self, seconds: float) -> Failure:
        """Return the failure of our own time-out: ``connection_lost`` if the connection is down."""
        return timeout_failure(seconds, "timeout" if self._adapter.connected else "connection_lost")

    def next_action(self, why: Failure) -> semconv.Action | None:
        """Return ``listen`` after silence, or ``send`` if the policy allows a second reply."""
        if why.kind not in ("timeout", "connection_lost"):
            return None
        resend = self._adapter.replies.policy.on_silence == "resend"
        return "send" if resend and self._action == "listen" else "listen"

    def abandon(self, attempt: asyncio.Future[Generation], then: semconv.Action | None) -> None:
        """Keep the slot for a ``listen`` that follows. Otherwise free it."""
        if then != "listen":
            self._adapter.let_go(attempt)
        if then is None:
            self._adapter.watch_for(self)

    def cancel(self, attempt: asyncio.Future[Generation]) -> None:
        """Free the slot, because the server answers the caller's speech. No event is sent."""
        self._adapter.let_go(attempt)

    def delivery(self, result: Generation) -> Delivery | None:
        """Watch the reply to its end, because it may be cut."""
        return self._adapter.speaking.begin(result)
