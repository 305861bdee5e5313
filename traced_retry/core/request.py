# SPDX-License-Identifier: Apache-2.0
"""The protocol between the loop and a provider's request: :class:`Request`."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

from traced_retry import semconv
from traced_retry.core.breaker import REFUSED, CircuitOpenError
from traced_retry.core.failure import Failure, explain, failure

T = TypeVar("T")


class Request(Protocol[T]):
    """The request behind one reply. One object per reply."""

    def attempt(self, action: semconv.Action) -> asyncio.Future[T]:
        """Begin an attempt and return the future of its result. An exception fails the attempt."""

    def limit(self, action: semconv.Action) -> float | None:
        """Return the longest time of such an attempt in seconds, or None for the deadline."""

    def explain(self, error: BaseException) -> Failure:
        """Say why the attempt failed with ``error``."""

    def timed_out(self, seconds: float) -> Failure:
        """Say that the attempt was ended by us after ``seconds`` without an answer."""

    def refused(self) -> Failure:
        """Return the failure to raise if the circuit breaker is open, so nothing was sent."""

    def internal_failure(self, error: BaseException) -> Failure:
        """Return the failure to raise if our own code failed with ``error``. Never raise."""

    def next_action(self, failure: Failure) -> semconv.Action | None:
        """Return the next safe action, or None if there is none."""

    def ready(self) -> bool:
        """Return whether a request sent now could be answered.

        An adapter calls ``Reply.wake`` if the result changes. The loop does not call this method
        before a ``listen``, because that sends no request.
        """

    def can_hedge(self) -> bool:
        """Return whether a second request can be sent now while the first one stays open."""

    def can_replace(self) -> bool:
        """Return whether a response without a first word can be stopped and requested again."""

    def has_answer(self) -> bool:
        """Return whether an earlier request was answered after its attempt had ended.

        A ``listen`` then gets this answer.
        """

    def abandon(self, attempt: asyncio.Future[T], then: semconv.Action | None) -> None:
        """Make sure that the answer to a failed attempt is not heard as a second reply.

        The action ``then`` follows. None means that the failure is reported to the agent.
        """

    def cancel(self, attempt: asyncio.Future[T]) -> None:
        """Cancel for the caller (barge-in). The attempt may just have succeeded."""

    def delivery(self, result: T) -> Delivery | None:
        """Return the record of a reply that has started, or None if its end is not observable.

        The agent gets only the first result. If :meth:`next_action` allows another attempt after
        the response has started, the first result must also deliver the later responses.
        """


class Delivery:
    """The record of a reply that has started: its first output and its end.

    The adapter calls :meth:`mark_output` at the first word and :meth:`end` when the provider is
    done.
    """

    def __init__(self) -> None:
        self.first_output_at: float | None = None
        """Time of the first output on the event loop's clock, in seconds."""
        self.last_activity: float | None = None
        """When the provider last sent anything of it, in the loop's seconds; None: not told."""
        self.response_id: str | None = None
        """The provider's id of the response, if there is one."""
        self.answers_attempt: int | None = None
        """The number of the earlier attempt that was answered instead of this one, or None."""
        self.spoke = False
        """Whether there was other output than a tool call."""
        self.nothing_due = False
        """Whether the caller is due no reply, because the model chose not to answer, or because the
        plugin replaced the generation before its first output."""
        self.ended = False
        self.failure: Failure | None = None
        self.cancelled = False
        """Whether it was cancelled before its first output."""
        self.on_end: Callable[[], None] = lambda: None
        self.on_output: Callable[[], None] = lambda: None
        """Called at the first output."""

    @property
    def first_output(self) -> bool:
        """Whether there was output: a word, a sound or a tool call."""
        return self.first_output_at is not None

    @property
    def failed_before_output(self) -> bool:
        """Whether it failed before its first word."""
        return self.failure is not None and self.first_output_at is None

    @property
    def is_no_reply(self) -> bool:
        """Whether it holds tool calls and no speech, or the caller is due none."""
        return self.nothing_due or (self.first_output and not self.spoke)

    def mark_output(self, *, tool: bool = False) -> None:
        """Note a word or a sound, or with ``tool`` a tool call."""
        self.spoke = self.spoke or not tool
        if self.first_output_at is None:
            self.first_output_at = asyncio.get_running_loop().time()
            self.on_output()

    def mark_activity(self) -> None:
        """Record an event of the provider. An adapter that calls this reports every event."""
        self.last_activity = asyncio.get_running_loop().time()

    def end(self, failure: Failure | None = None, *, cancelled: bool = False) -> None:
        """End the delivery: complete, ``cancelled`` or with a ``failure``."""
        if self.ended:
            return
        self.ended = True
        self.failure = failure
        self.cancelled = cancelled and self.first_output_at is None
        self.on_end()


class OneAtATime:
    """The answers of a request that is never open or begun beside another one of its reply."""

    __slots__ = ()

    def can_hedge(self) -> bool:
        """Return False: the caller could hear both answers."""
        return False

    def can_replace(self) -> bool:
        """Return False: the response could be heard beside the next one."""
        return False

    def has_answer(self) -> bool:
        """Return False: a request is closed with its attempt."""
        return False


class CallRequest(OneAtATime, Generic[T]):
    """A plain callable as a :class:`~traced_retry.core.request.Request`.

    It is sent again after each failure.

    Args:
        call: returns a future, or a coroutine to run.
        args: its arguments.
        kwargs: its keyword arguments.
        on: the exceptions of the call that are retried.
        resend_after_timeout: whether a request without an answer may be sent again. Use False if
            the late answer to the first could still be heard.
    """

    __slots__ = ("_args", "_call", "_kwargs", "_on", "_resend_after_timeout")

    def __init__(
        self,
        call: Callable[..., Awaitable[T]],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        on: tuple[type[Exception], ...] = (Exception,),
        *,
        resend_after_timeout: bool = True,
    ) -> None:
        self._call = call
        self._args = args
        self._kwargs = kwargs or {}
        self._on = on
        self._resend_after_timeout = resend_after_timeout

    def attempt(self, action: semconv.Action) -> asyncio.Future[T]:
        """Call the function. A coroutine becomes a task, so that it can be cancelled alone."""
        result: Any = self._call(*self._args, **self._kwargs)
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
        """Return None: the policy's limits apply."""
        return None

    def explain(self, error: BaseException) -> Failure:
        """Classify by the default table. An exception that ``on`` excludes is final."""
        return self._limit(explain(error))

    def timed_out(self, seconds: float) -> Failure:
        """Return the failure of an attempt that ended with our ``TimeoutError``."""
        error = TimeoutError(f"no answer within {seconds:.1f} s")
        return self._limit(failure(error, "timeout", ended_locally=True))

    def refused(self) -> Failure:
        """Return the failure of a call that was not made, with our :class:`CircuitOpenError`."""
        return failure(CircuitOpenError(REFUSED), "circuit_open", code=CircuitOpenError.code)

    def internal_failure(self, error: BaseException) -> Failure:
        """Return ``error`` as it is, classified by the default table."""
        return explain(error)

    def next_action(self, why: Failure) -> semconv.Action | None:
        """Send again, unless the first may still be answered."""
        unanswered = why.kind in ("timeout", "connection_lost")
        return None if unanswered and not self._resend_after_timeout else "send"

    def ready(self) -> bool:
        """Return True."""
        return True

    def abandon(self, attempt: asyncio.Future[T], then: semconv.Action | None) -> None:
        """Cancel the call if it still runs."""
        attempt.cancel()

    def cancel(self, attempt: asyncio.Future[T]) -> None:
        """Cancel the call for the caller."""
        attempt.cancel()

    def _limit(self, why: Failure) -> Failure:
        """Return ``why``, which is final if ``on`` excludes its exception."""
        return why if isinstance(why.error, self._on) else replace(why, recoverable=False)

    def delivery(self, result: T) -> None:
        """Return None: a call that has returned is complete."""


if sys.version_info >= (3, 12):

    def _start(coroutine: Any) -> asyncio.Future[Any]:
        # A call that does not wait then costs no turn of the event loop.
        return asyncio.Task(coroutine, loop=asyncio.get_running_loop(), eager_start=True)

else:

    def _start(coroutine: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().create_task(coroutine)
