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

Generation = llm.GenerationCreatedEvent
Call = Callable[[], "asyncio.Future[Generation]"]


class Replies(Protocol):
    """The session's open replies, as an adapter sees them."""

    @property
    def policy(self) -> RetryPolicy:
        """Return the current policy."""

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
    """The actions of its requests. Their counters start at zero."""
    connection_losses = 0
    """The number of lost connections, if the plugin reconnects and the adapter can see it."""

    def __init__(self, session: llm.RealtimeSession[Any], replies: Replies) -> None:
        self.session = session
        self.replies = replies

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


class PassthroughRequest:
    """A request to an unknown provider: traced, and never sent again.

    The adapters' requests derive from it. :class:`~traced_retry.core.request.Request` describes
    when the loop calls each method.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.on_late: Callable[[], None] = lambda: None
        """The function to call if the reply is heard after its failure was reported."""
        self.speech: Any = None
        """The ``SpeechHandle`` that requests the reply, if there is one."""
        self.stop_watching: Callable[[], None] = lambda: None
        """The function that stops watching the ``SpeechHandle`` for interruption."""

    def attempt(self, action: semconv.Action) -> asyncio.Future[Generation]:
        """Send the request as the plugin does."""
        return self.call()

    def limit(self, action: semconv.Action) -> float | None:
        """Return None: the plugin's own time-out and the deadline apply."""
        return None

    def explain(self, error: BaseException) -> Failure:
        """Classify by the default table. The plugins' own time-outs carry no code."""
        why = explain(error)
        if why.kind == "unknown" and why.code is None and "timed out" in str(error):
            return failure(error, "timeout")
        return why

    def timed_out(self, seconds: float) -> Failure:
        """Return a ``RealtimeError``, because LiveKit catches no other class."""
        return timeout_failure(seconds)

    def internal_failure(self, error: BaseException) -> Failure:
        """Return a ``RealtimeError`` caused by ``error``. LiveKit catches no other class."""
        if isinstance(error, llm.RealtimeError) or not isinstance(error, Exception):
            return explain(error)
        raised = llm.RealtimeError(f"traced_retry failed internally ({type(error).__name__})")
        raised.__cause__ = error
        return failure(raised, "bug")

    def next_action(self, why: Failure) -> semconv.Action | None:
        """Return None: no action is known to be safe."""
        return None

    def ready(self) -> bool:
        """Return True."""
        return True

    def abandon(self, attempt: asyncio.Future[Generation], then: semconv.Action | None) -> None:
        """Cancel the attempt, as the agent itself would on giving up."""
        attempt.cancel()

    def cancel(self, attempt: asyncio.Future[Generation]) -> None:
        """Cancel the plugin's future for the caller."""
        attempt.cancel()

    def delivery(self, result: Generation) -> Delivery | None:
        """Return None: this provider does not report the end of a reply."""
        return None

    def ended(self) -> None:
        """Clean up after the reply, with any outcome."""


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


def timeout_failure(seconds: float, kind: Kind = "timeout") -> Failure:
    """Return the failure of an attempt that we ended ourselves."""
    error = llm.RealtimeError(f"generate_reply got no answer within {seconds:.1f} s")
    return failure(error, kind, ended_locally=True)


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
