# SPDX-License-Identifier: Apache-2.0
"""One reply's request on a LiveKit session: :class:`PassthroughRequest`, the base of all others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from livekit.agents import llm

from traced_retry import semconv
from traced_retry.core.breaker import REFUSED, CircuitOpenError
from traced_retry.core.failure import Failure, Kind, explain, failure
from traced_retry.core.request import Delivery, OneAtATime
from traced_retry.core.waiting import Wait

Generation = llm.GenerationCreatedEvent
Call = Callable[[], "asyncio.Future[Generation]"]


class PassthroughRequest(OneAtATime):
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
        self.set_speech_id: Callable[[str | None], None] = lambda _: None
        """To be called with the id of the ``SpeechHandle``, if it is known later."""
        self.stop_watching: Callable[[], None] = lambda: None
        """The function that stops watching the ``SpeechHandle`` for interruption."""
        self.wait: Wait | None = None
        """The wait for the first output, if ``on_waiting`` is to report it."""

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

    def refused(self) -> Failure:
        """Return a ``RealtimeError``, because LiveKit catches no other class."""
        error = llm.RealtimeError(REFUSED, code=CircuitOpenError.code)
        return failure(error, "circuit_open", code=CircuitOpenError.code)

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

    def end_wait(self) -> None:
        """End the wait for the first output."""
        if self.wait is not None:
            self.wait.end()

    def ended(self) -> None:
        """Clean up after the reply, with any outcome."""


def timeout_failure(seconds: float, kind: Kind = "timeout") -> Failure:
    """Return the failure of an attempt that we ended ourselves."""
    error = llm.RealtimeError(f"generate_reply got no answer within {seconds:.1f} s")
    return failure(error, kind, ended_locally=True)
