# SPDX-License-Identifier: Apache-2.0
"""One reply's request on a LiveKit session: :class:`PassthroughRequest`, the base of all others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from livekit.agents import llm

from traced_retry import semconv
from traced_retry.core.failure import Failure, Kind, explain, failure
from traced_retry.core.request import Delivery

Generation = llm.GenerationCreatedEvent
Call = Callable[[], "asyncio.Future[Generation]"]


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
        self.set_speech_id: Callable[[str | None], None] = lambda _: None
        """To be called with the id of the ``SpeechHandle``, if it is known later."""
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


def timeout_failure(seconds: float, kind: Kind = "timeout") -> Failure:
    """The failure of an attempt that we ended ourselves."""
    error = llm.RealtimeError(f"generate_reply got no answer within {seconds:.1f} s")
    return failure(error, kind, ended_locally=True)
