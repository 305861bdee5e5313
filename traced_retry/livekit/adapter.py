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
        """The policy in force."""

    def wake(self) -> None:
        """Have each look again at :meth:`PassthroughRequest.ready`."""

    def report_failure(
        self,
        why: Failure,
        stop: semconv.StopReason | None = None,
        *,
        only: Request[Any] | None = None,
    ) -> None:
        """Tell them (or the one of request ``only``) that their request is lost.

        An attempt under way fails with ``why`` at once; with ``stop`` nothing follows.
        """


class Adapter:
    """One session's provider, and all there is to know of one without an adapter of its own.

    It is made before the plugin's own ``__init__`` has run (the hook sits in that of LiveKit's
    base class): it may subscribe to events then, and touch nothing else of the session.
    """

    required_attributes: ClassVar[tuple[str, ...]] = ()
    """Private attributes of the session that it relies on."""
    relied_methods: ClassVar[tuple[str, ...]] = ()
    """Methods of the plugin's session whose behavior it relies on. If an unknown subclass overrides
    one of them, the plain :class:`Adapter` takes its place."""
    actions: ClassVar[tuple[semconv.Action, ...]] = ("send",)
    """What its requests may do; their counters start at zero."""
    connection_losses = 0
    """Connections lost so far, where the plugin comes back and the adapter can tell."""

    def __init__(self, session: llm.RealtimeSession[Any], replies: Replies) -> None:
        self.session = session
        self.replies = replies

    def missing_attributes(self) -> list[str]:
        """Those of :attr:`required_attributes` that this plugin's session does not have."""
        return [name for name in self.required_attributes if not hasattr(self.session, name)]

    def target(self) -> Target:
        """Whom a reply is asked of."""
        model = self.session.realtime_model
        return Target(plain_provider(model.provider), model.model)

    def request(self, call: Call) -> PassthroughRequest:
        """One reply's request; ``call`` is the plugin's own ``generate_reply``, arguments bound."""
        return PassthroughRequest(call)

    def classify_event(self, event: llm.RealtimeModelError) -> Failure:
        """What an ``error`` event of the session means."""
        return classify_event(event)


class PassthroughRequest:
    """A request to a provider of which nothing is known: traced, never sent again.

    It is also what the adapters' requests derive from. See
    :class:`~traced_retry.core.request.Request` for when the loop calls which method.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.on_late: Callable[[], None] = lambda: None
        """To be called when the reply is heard after the agent was told that it had failed."""
        self.speech: Any = None
        """The ``SpeechHandle`` on whose behalf it is asked, if there is one."""
        self.stop_watching: Callable[[], None] = lambda: None
        """To be called when that one's interruption means nothing to the reply any more."""

    def attempt(self, action: semconv.Action) -> asyncio.Future[Generation]:
        """Send it, as the plugin does."""
        return self.call()

    def limit(self, action: semconv.Action) -> float | None:
        """The plugin's own time-out, and the deadline."""
        return None

    def explain(self, error: BaseException) -> Failure:
        """Classify by the default table; the plugins' own time-outs carry no code."""
        why = explain(error)
        if why.kind == "unknown" and why.code is None and "timed out" in str(error):
            return failure(error, "timeout")
        return why

    def timed_out(self, seconds: float) -> Failure:
        """A ``RealtimeError``, for LiveKit catches nothing else."""
        return timeout_failure(seconds)

    def internal_failure(self, error: BaseException) -> Failure:
        """Return a ``RealtimeError`` caused by ``error``. LiveKit catches no other class."""
        if isinstance(error, llm.RealtimeError) or not isinstance(error, Exception):
            return explain(error)
        raised = llm.RealtimeError(f"traced_retry failed internally ({type(error).__name__})")
        raised.__cause__ = error
        return failure(raised, "bug")

    def next_action(self, why: Failure) -> semconv.Action | None:
        """Nothing is known to be safe."""
        return None

    def ready(self) -> bool:
        """Always."""
        return True

    def abandon(self, attempt: asyncio.Future[Generation], then: semconv.Action | None) -> None:
        """Cancel it, as the agent itself would on giving up."""
        attempt.cancel()

    def cancel(self, attempt: asyncio.Future[Generation]) -> None:
        """Carry the caller's cancel inward."""
        attempt.cancel()

    def delivery(self, result: Generation) -> Delivery | None:
        """Nothing is known of what follows."""
        return None

    def ended(self) -> None:
        """The reply is over, whatever its outcome."""


class OwnRetryAdapter(Adapter):
    """A session on our own ``RetryingRealtimeSession``, whose author said what is safe."""

    def request(self, call: Call) -> OwnRetryRequest:
        """One reply's request."""
        return OwnRetryRequest(call, self.session.resend_after_timeout)  # type: ignore[attr-defined]


class OwnRetryRequest(PassthroughRequest):
    """The author's ``_do_generate_reply``, repeated as without the hook."""

    def __init__(self, call: Call, resend_after_timeout: bool) -> None:
        super().__init__(call)
        self._inner: CallRequest[Generation] = CallRequest(
            call, resend_after_timeout=resend_after_timeout
        )

    def attempt(self, action: semconv.Action) -> asyncio.Future[Generation]:
        """Call it; it may be ``async``."""
        return self._inner.attempt(action)

    def next_action(self, why: Failure) -> semconv.Action | None:
        """As the author says."""
        return self._inner.next_action(why)


def timeout_failure(seconds: float, kind: Kind = "timeout") -> Failure:
    """The failure of an attempt that we ended ourselves."""
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
    """A provider's name as ``gen_ai.provider.name``: plain, lower-case, no URL, user or port."""
    host = provider.lower().rsplit("/", 1)[-1].rpartition("@")[2].split(":", 1)[0]
    return "_".join(host.split()) or "unknown"
