# SPDX-License-Identifier: Apache-2.0
"""What the loop asks of whatever it repeats: :class:`Request`. An adapter implements it."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

from traced_retry import semconv
from traced_retry.core.failure import Failure, explain, failure

T = TypeVar("T")


class Request(Protocol[T]):
    """The request behind one reply. One object per reply."""

    def attempt(self, action: semconv.Action) -> asyncio.Future[T]:
        """Begin one attempt; the future is its result. What this raises fails the attempt."""

    def limit(self, action: semconv.Action) -> float | None:
        """Seconds an attempt of this kind may take, at most; None leaves it to the deadline."""

    def explain(self, error: BaseException) -> Failure:
        """Say why the attempt failed with ``error``."""

    def timed_out(self, seconds: float) -> Failure:
        """Say that the attempt was ended by us after ``seconds`` without an answer."""

    def internal_failure(self, error: BaseException) -> Failure:
        """Return the failure to raise if our own code failed with ``error``. Never raise."""

    def next_action(self, failure: Failure) -> semconv.Action | None:
        """What is safe to do next; None where nothing is."""

    def ready(self) -> bool:
        """Whether a request sent now could be answered; ``Reply.wake`` when that changes.

        Not asked before a ``listen``, which sends none.
        """

    def abandon(self, attempt: asyncio.Future[T], then: semconv.Action | None) -> None:
        """The attempt failed and ``then`` follows (None: nothing, the agent is told of failure).

        Makes sure that what was asked is not heard later.
        """

    def cancel(self, attempt: asyncio.Future[T]) -> None:
        """The caller no longer wants the reply (barge-in); the attempt may just have succeeded."""

    def delivery(self, result: T) -> Delivery | None:
        """What becomes of a reply once it has begun; None where that cannot be told.

        The agent is given the first result alone. Where :meth:`next_action` allows another attempt
        after one that began, the first result must go on with the later ones.
        """


class Delivery:
    """A reply that has begun, before its first word: is it heard?

    The adapter calls :meth:`output` at the first word and :meth:`end` when the provider is done.
    """

    def __init__(self) -> None:
        self.first_output_at: float | None = None
        """Time of the first output on the event loop's clock, in seconds."""
        self.last_activity: float | None = None
        """When the provider last sent anything of it, in the loop's seconds; None: not told."""
        self.ended = False
        self.failure: Failure | None = None
        self.cancelled = False
        """Whether it ended unheard because somebody cancelled it."""
        self.on_end: Callable[[], None] = lambda: None

    @property
    def first_output(self) -> bool:
        """Whether there was output: a word, a sound or a tool call."""
        return self.first_output_at is not None

    @property
    def failed_before_output(self) -> bool:
        """Whether it failed before its first word."""
        return self.failure is not None and self.first_output_at is None

    def mark_output(self) -> None:
        """Something was said, or a tool called."""
        if self.first_output_at is None:
            self.first_output_at = asyncio.get_running_loop().time()

    def mark_activity(self) -> None:
        """The provider sent something of it. Whoever tells of one tells of all."""
        self.last_activity = asyncio.get_running_loop().time()

    def end(self, failure: Failure | None = None, *, cancelled: bool = False) -> None:
        """The provider is done: with a ``failure``, because it was ``cancelled``, or well."""
        if self.ended:
            return
        self.ended = True
        self.failure = failure
        self.cancelled = cancelled and self.first_output_at is None
        self.on_end()


class CallRequest(Generic[T]):
    """A plain callable as a :class:`~traced_retry.core.request.Request`.

    It is sent again after each failure.

    Args:
        call: returns a future, or a coroutine to run.
        resend_after_timeout: whether a request that got no answer may be sent again. False
            where the late answer to the first could still be heard.
        on: the exceptions of the call that are retried.
    """

    __slots__ = ("_call", "_on", "_resend_after_timeout")

    def __init__(
        self,
        call: Callable[[], Awaitable[T]],
        *,
        resend_after_timeout: bool = True,
        on: tuple[type[Exception], ...] = (Exception,),
    ) -> None:
        self._call = call
        self._on = on
        self._resend_after_timeout = resend_after_timeout

    def attempt(self, action: semconv.Action) -> asyncio.Future[T]:
        """Call it; a coroutine becomes a task, so that it can be cancelled by itself."""
        result: Any = self._call()
        if inspect.iscoroutine(result):
            return _start(result)
        if asyncio.isfuture(result):
            return result
        if inspect.isawaitable(result):
            return asyncio.ensure_future(result)
        raise TypeError(
            f"{self._call!r} returned a {type(result).__name__}, and only a function that is "
            "async or returns a future can be retried"
        )

    def limit(self, action: semconv.Action) -> float | None:
        """The policy's business."""
        return None

    def explain(self, error: BaseException) -> Failure:
        """Classify by the default table. An exception that ``on`` excludes is final."""
        return self._limit(explain(error))

    def timed_out(self, seconds: float) -> Failure:
        """A ``TimeoutError`` of ours."""
        error = TimeoutError(f"no answer within {seconds:.1f} s")
        return self._limit(failure(error, "timeout", ended_locally=True))

    def internal_failure(self, error: BaseException) -> Failure:
        """Return ``error`` as it is, classified by the default table."""
        return explain(error)

    def next_action(self, why: Failure) -> semconv.Action | None:
        """Send again, unless the first may still be answered."""
        unanswered = why.kind in ("timeout", "connection_lost")
        return None if unanswered and not self._resend_after_timeout else "send"

    def ready(self) -> bool:
        """Always."""
        return True

    def abandon(self, attempt: asyncio.Future[T], then: semconv.Action | None) -> None:
        """Cancel what still runs."""
        attempt.cancel()

    def cancel(self, attempt: asyncio.Future[T]) -> None:
        """Carry the caller's cancel inward."""
        attempt.cancel()

    def _limit(self, why: Failure) -> Failure:
        """Return ``why``, which is final if ``on`` excludes its exception."""
        return why if isinstance(why.error, self._on) else replace(why, recoverable=False)

    def delivery(self, result: T) -> None:
        """A call that has returned is all there is."""


if sys.version_info >= (3, 12):

    def _start(coroutine: Any) -> asyncio.Future[Any]:
        # A call that need not wait then costs no turn of the event loop.
        return asyncio.Task(coroutine, loop=asyncio.get_running_loop(), eager_start=True)

else:

    def _start(coroutine: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().create_task(coroutine)
