# SPDX-License-Identifier: Apache-2.0
"""The provider-specific half of a session: :class:`Adapter`, one per session.

An adapter reports which requests were sent, how they failed, and the next safe action. Only an
adapter touches private attributes of its plugin. It names them in
:attr:`Adapter.required_attributes`. If one of them is missing, the plain :class:`Adapter`, which
only observes, takes its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from livekit.agents import APIConnectionError, llm

from traced_retry import semconv
from traced_retry.core.failure import Failure, Kind, explain, failure
from traced_retry.core.policy import RetryPolicy
from traced_retry.core.request import CallRequest, Delivery, Request
from traced_retry.core.telemetry import Target
from traced_retry.livekit.events import ProviderError, read_error
from traced_retry.livekit.request import Call, Generation, PassthroughRequest
from traced_retry.livekit.turns import Turns


class Replies(Protocol):
    """The session's open replies, as an adapter sees them."""

    @property
    def policy(self) -> RetryPolicy:
        """Return the current policy."""

    def request_once(self) -> asyncio.Future[Generation]:
        """Call the plugin's own ``generate_reply``."""

    def wake(self) -> None:
        """Check :meth:`PassthroughRequest.ready` of every open reply again."""

    def report_failure(
        self,
        why: Failure,
        stop: semconv.StopReason | None = None,
        *,
        only: Request[Any] | None = None,
    ) -> None:
        """Report that the requests of all replies (or the request ``only``) are lost.

        A running attempt fails with ``why`` at once. With ``stop`` no attempt follows.
        """

    def start(self, adapter: Adapter, turn: PassthroughRequest, began: float) -> None:
        """Trace a reply that the provider starts, from the event loop's time ``began`` on.

        Do nothing if ``adapter`` is not in force.
        """

    def interrupt_reply(self, only: PassthroughRequest) -> None:
        """End the reply of request ``only``, because the caller spoke before it did."""

    def emit(self, turn: PassthroughRequest, emit: Callable[[], None]) -> None:
        """Call ``emit``, which makes LiveKit speak the reply, and note its ``SpeechHandle``."""


class Adapter:
    """The provider of one session. This base class only observes.

    It is created before the plugin's own ``__init__`` has run, because the hook is in LiveKit's
    base class. Its constructor may subscribe to events, and must not use other parts of the
    session.
    """

    required_attributes: ClassVar[tuple[str, ...]] = ()
    """Private attributes of the session that the adapter needs."""
    relied_methods: ClassVar[tuple[str, ...]] = ()
    """Methods of the plugin's session that the adapter needs unchanged. If an unknown subclass
    overrides one of them, the plain :class:`Adapter` takes its place."""
    actions: ClassVar[tuple[semconv.Action, ...]] = ("send",)
    """What its requests may do; their counters start at zero."""
    turn_actions: ClassVar[tuple[semconv.Action, ...]] = ("listen",)
    """The actions for replies that the provider starts."""
    reports_end_of_speech: ClassVar[bool] = False
    """Whether the plugin emits ``input_speech_stopped`` when the caller stops speaking."""
    last_words_are_unknown: ClassVar[bool] = False
    """Whether the plugin does not know the caller's last words before the reply begins."""
    connection_losses = 0
    """The number of lost connections, if the plugin reconnects and the adapter can see it."""

    def __init__(self, session: llm.RealtimeSession[Any], replies: Replies) -> None:
        self.session = session
        self.replies = replies
        self.observe_turns()

    def observe_turns(self) -> None:
        """Have the replies traced that the provider starts."""
        self.turns = Turns(self)

    def starts_reply(self, generation: Generation) -> bool:
        """Return whether the provider started ``generation`` by itself, before LiveKit sees it."""
        return not generation.user_initiated

    def turn_delivery(self, generation: Generation) -> Delivery | None:
        """Return the further course of a reply that the provider started, if it can be seen."""
        return None

    def turn_window(self) -> float | None:
        """Return the seconds in which the provider has to answer the caller.

        None means that an unanswered turn cannot be noticed.
        """
        return None

    def close_turn(self) -> None:
        """End the streams of a reply whose time is up, or the agent would wait for their end."""

    def expects_answer(self) -> bool:
        """Return whether a request is open, so that the provider's next reply answers it."""
        return False

    def caller_spoke(self) -> None:
        """Note that the provider has heard a turn of the caller."""

    def missing_attributes(self) -> list[str]:
        """Return the :attr:`required_attributes` that this plugin's session lacks."""
        return [name for name in self.required_attributes if not hasattr(self.session, name)]

    def target(self) -> Target:
        """Return the provider, model and server of a request."""
        model = self.session.realtime_model
        return Target(plain_provider(model.provider), model.model)

    def request(self, call: Call) -> PassthroughRequest:
        """Create the request for one reply. ``call`` is the plugin's bound ``generate_reply``."""
        return PassthroughRequest(call)

    def classify_event(self, event: llm.RealtimeModelError) -> Failure:
        """Classify an ``error`` event of the session."""
        return classify_event(event)


class OwnRetryAdapter(Adapter):
    """A session based on our ``RetryingRealtimeSession``. Its author declares the safe actions."""

    def request(self, call: Call) -> OwnRetryRequest:
        """Create the request for one reply."""
        return OwnRetryRequest(call, self.session.resend_after_timeout)  # type: ignore[attr-defined]


class OwnRetryRequest(PassthroughRequest):
    """The author's ``_do_generate_reply``, retried as without the hook."""

    def __init__(self, call: Call, resend_after_timeout: bool) -> None:
        super().__init__(call)
        self._inner: CallRequest[Generation] = CallRequest(
            call, resend_after_timeout=resend_after_timeout
        )

    def attempt(self, action: semconv.Action) -> asyncio.Future[Generation]:
        """Call the method, which may be ``async``."""
        return self._inner.attempt(action)

    def next_action(self, why: Failure) -> semconv.Action | None:
        """Return the action that the session's author allows."""
        return self._inner.next_action(why)


def failure_from_event(
    kind: Kind,
    what: str,
    code: str | None = None,
    *,
    ended_locally: bool = False,
    retry_after: float | None = None,
) -> Failure:
    """Return the failure that only an event reported.

    Its error is one that LiveKit catches, without text from the provider.
    """
    error = llm.RealtimeError(f"{what} ({code or kind})", code=code)
    return failure(error, kind, code=code, ended_locally=ended_locally, retry_after=retry_after)


def empty_failure(what: str) -> Failure:
    """Return the failure of ``what`` (a reply, a response or a turn), which had no output."""
    return failure_from_event("empty_response", f"the {what} held neither speech nor a tool call")


def failure_from_error(source: object, what: str, reason: object = None) -> Failure:
    """Return the failure for the error object of an event, whatever types its fields have."""
    return _failure_from(read_error(source, reason), what)


def _failure_from(found: ProviderError, what: str) -> Failure:
    wait = found.retry_after if found.kind in ("rate_limit", "overloaded") else None
    return failure_from_event(found.kind, what, found.code, retry_after=wait)


def classify_event(event: llm.RealtimeModelError) -> Failure:
    """Classify a session's ``error`` event by the provider's code or an HTTP status."""
    what, error = "the realtime session failed", event.error
    body = getattr(error, "body", None)
    reported = read_error(None if isinstance(body, str) else body)
    if reported.kind != "unknown":
        return _failure_from(reported, what)
    source: BaseException | None = error
    while source is not None:  # A plugin's error may wrap its SDK's, which wraps HTTP's.
        found = explain(source)
        if found.kind not in ("unknown", "bug"):
            return failure_from_event(found.kind, what, retry_after=found.retry_after)
        source = source.__cause__
    kind: Kind = "connection_lost" if isinstance(error, APIConnectionError) else "unknown"
    return failure_from_event(kind, what, reported.code)


def plain_provider(provider: str) -> str:
    """Return a name as ``gen_ai.provider.name``: lower-case, without URL, user or port."""
    host = provider.lower().rsplit("/", 1)[-1].rpartition("@")[2].split(":", 1)[0]
    return "_".join(host.split()) or "unknown"
