# SPDX-License-Identifier: Apache-2.0
"""The loop: attempt, decide, wait, stop. Knows no LiveKit and no OpenTelemetry SDK.

:class:`Reply` is one reply from the call to its outcome. What it repeats stands behind
:class:`Request`; a provider's adapter implements that, and says what is safe to do next.

Its only clock is the running event loop's, so a test runs it on a virtual one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, NoReturn, Protocol, TypeVar

import backoff

from traced_retry import semconv
from traced_retry.failure import Failure, explain
from traced_retry.guard import harmless, log_once
from traced_retry.policy import Delays, RetryPolicy
from traced_retry.telemetry import ReplyTrace

T = TypeVar("T")


class Request(Protocol[T]):
    """The request behind one reply, as the loop sees it. One object per reply."""

    def attempt(self, action: semconv.Action) -> asyncio.Future[T]:
        """Begin one attempt; the future is its result. What this raises fails the attempt."""

    def explain(self, error: BaseException) -> Failure:
        """Say why the attempt failed with ``error``."""

    def timed_out(self, seconds: float) -> Failure:
        """Say that the attempt was ended by us after ``seconds`` without an answer."""

    def next_action(self, failure: Failure) -> semconv.Action | None:
        """What is safe to do next; None where nothing is."""

    def ready(self) -> bool:
        """Whether a request sent now could be answered; :meth:`Reply.wake` when that changes."""

    def abandon(self, attempt: asyncio.Future[T], then: semconv.Action | None) -> None:
        """The attempt failed and ``then`` follows (None: nothing, the agent is told of failure).

        Makes sure that what was asked is not heard later.
        """

    def cancel(self, attempt: asyncio.Future[T]) -> None:
        """The caller no longer wants the reply (barge-in); the attempt may just have succeeded."""


@dataclass(frozen=True)
class FailedReply:
    """A reply that failed for good, as it is told to ``on_exhausted``."""

    provider: str
    """``gen_ai.provider.name``."""
    model: str | None
    outcome: semconv.Outcome
    """``exhausted`` or ``not_recoverable``."""
    stop_reason: semconv.StopReason
    codes: tuple[str, ...]
    """The failed attempts' provider codes, or ``error.type`` where there was none, in order."""
    attempts: int
    seconds: float
    """From asking to now: the silence the caller heard."""
    trace_id: str | None
    """32 hex digits; None where nothing traces."""


class Reply(Generic[T]):
    """One reply: attempts, until one succeeds or none may follow.

    :meth:`begin` makes the first attempt at once, as the call without us would; :meth:`run`
    awaits the outcome. Every path ends the spans and leaves the request harmless.
    """

    def __init__(
        self,
        request: Request[T],
        policy: RetryPolicy,
        trace: ReplyTrace,
        *,
        jitter: Callable[[float], float] = backoff.full_jitter,
        on_failed: Callable[[FailedReply], None] | None = None,
    ) -> None:
        self._on_failed = on_failed
        self._codes: list[str] = []
        self._request = request
        self._policy = policy
        self._trace = trace
        self._jitter = jitter
        self._delays: Delays | None = None
        self._loop = asyncio.get_running_loop()
        self._attempt: asyncio.Future[T] | None = None
        self._number = 0
        self._waited = 0.0
        self._news: Failure | None = None
        self._stop: semconv.StopReason | None = None
        self._last: Failure | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False

    # --- the caller's side ---------------------------------------------------------------------

    def begin(self) -> None:
        """Open the reply and make its first attempt.

        Raises:
            Exception: a programming error of the request (``NotImplementedError``, ...) that it
                raised before it returned a future, untouched.
        """
        self._began = self._loop.time()
        self._deadline = self._began + self._policy.deadline
        self._trace.begin()
        self._send("send", 0.0)
        error = self._broken()
        if error is not None:
            self._give_up(self._judge(self._request.explain(error)), "not_recoverable")
            raise error

    async def run(self) -> T:
        """Await the reply.

        Raises:
            asyncio.CancelledError: the caller cancelled, or the provider dropped the request for
                a newer one.
            Exception: the last original exception, with a note of attempts, stop reason and
                trace id; a programming error without the note.
        """
        try:
            while True:
                failure = await self._settled()
                if failure is None:
                    return self._succeed()
                await self._retry_or_raise(failure)
        except (asyncio.CancelledError, GeneratorExit):
            self.interrupt()
            raise
        except BaseException as error:
            if not self._ended:  # an adapter that fails where it must not
                self._give_up(explain(error), "not_recoverable")
            raise

    def interject(self, failure: Failure, stop: semconv.StopReason | None = None) -> None:
        """Tell the loop what the attempt's own future does not: that the request is lost.

        With ``stop``, nothing further is tried, be it in an attempt or in a wait.
        """
        self._news, self._stop = failure, stop or self._stop
        self.wake()

    def wake(self) -> None:
        """Have the loop look again (an attempt ended, or :meth:`Request.ready` changed)."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def interrupt(self) -> None:
        """End the reply as interrupted, unless it has ended. Sends the cancel inward."""
        if self._ended:
            return
        if self._attempt is not None:
            with harmless("Request.cancel"):
                self._request.cancel(self._attempt)
            self._close_attempt("interrupted")
        self._end("interrupted")

    @property
    def attempts(self) -> int:
        """Attempts begun so far."""
        return self._number

    # --- one attempt ---------------------------------------------------------------------------

    def _send(self, action: semconv.Action, delay: float) -> None:
        self._number += 1
        self._attempt_began = self._loop.time()
        if self._stop is None:
            self._news = None
        self._trace.attempt_began(self._number, action, delay)
        try:
            attempt = self._trace.call(self._request.attempt, action)
        except Exception as error:  # noqa: BLE001 - it is judged like a future's exception
            attempt = self._loop.create_future()
            attempt.set_exception(error)
        except BaseException:  # KeyboardInterrupt, SystemExit
            self._trace.attempt_ended("interrupted", self._elapsed())
            self._end("interrupted")
            raise
        self._attempt = attempt
        if not attempt.done():
            attempt.add_done_callback(self._on_done)

    def _broken(self) -> BaseException | None:
        """The programming error that the attempt ended with before it was awaited, if it did."""
        attempt = self._attempt
        if attempt is None or not attempt.done() or attempt.cancelled():
            return None
        error = attempt.exception()
        return error if error is not None and explain(error).kind == "bug" else None

    def _on_done(self, attempt: asyncio.Future[T]) -> None:
        if not attempt.cancelled():
            attempt.exception()  # marks it as retrieved: an abandoned attempt must not be logged
        if attempt is self._attempt:
            self.wake()

    async def _settled(self) -> Failure | None:
        """Wait for the attempt to end: its failure, or None once the reply is there."""
        attempt = self._attempt
        assert attempt is not None
        limit = self._deadline
        if self._policy.attempt_timeout is not None:
            limit = min(limit, self._attempt_began + self._policy.attempt_timeout)
        while not attempt.done():
            if self._news is not None:
                return self._judge(self._news)
            if self._loop.time() >= limit:
                return self._judge(self._request.timed_out(self._elapsed()))
            await self._sleep_until(limit)
        if attempt.cancelled():
            self._close_attempt("superseded")
            self._end("superseded")
            raise asyncio.CancelledError("the provider dropped this request for a newer one")
        error = attempt.exception()
        return None if error is None else self._judge(self._request.explain(error))

    def _elapsed(self) -> float:
        return self._loop.time() - self._attempt_began

    async def _sleep_until(self, when: float) -> None:
        """Sleep until loop time ``when``, or until :meth:`wake`."""
        self._waiter = self._loop.create_future()
        timer = self._loop.call_at(when, self.wake)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    # --- what follows it -----------------------------------------------------------------------

    def _judge(self, failure: Failure) -> Failure:
        """Apply the policy's opinion to the default table's."""
        if failure.kind == "rate_limit" and not self._policy.retry_rate_limits:
            failure = replace(failure, recoverable=False)
        if self._policy.classify is not None:
            with harmless("RetryPolicy.classify"):
                verdict = self._policy.classify(failure)
                if isinstance(verdict, Failure):
                    return verdict
                if verdict is not None:
                    log_once("RetryPolicy.classify must return a Failure or None; it is ignored")
        return failure

    def _stop_reason(self, failure: Failure) -> semconv.StopReason | None:
        if self._stop is not None:
            return self._stop
        if not failure.recoverable:
            return "not_recoverable"
        if self._loop.time() >= self._deadline:
            return "deadline"
        return "max_attempts" if self._number > self._policy.max_retries else None

    async def _retry_or_raise(self, failure: Failure) -> None:
        """Make the next attempt, or raise the failure."""
        stop = self._stop_reason(failure)
        action = None if stop else self._request.next_action(failure)
        if action is None:
            self._raise(failure, stop or "unsafe_to_resend")
        # Between the end of one window of listening and the next no reply may slip through.
        delay = 0.0 if action == "listen" else self._next_delay(failure)
        if self._loop.time() + delay >= self._deadline:
            self._raise(failure, "deadline")
        self._fail_attempt(failure, action, delay)
        began = self._loop.time()
        try:
            stop = await self._wait_until_ready(began + delay)
        finally:
            waited = self._loop.time() - began
            self._waited += waited
            self._trace.waited(waited)
        if stop is not None:
            self._raise(self._news if self._stop and self._news else failure, stop)
        self._send(action, waited)

    def _next_delay(self, failure: Failure) -> float:
        if self._delays is None:
            self._delays = self._policy.delays(self._jitter)
        return self._delays.next(failure)

    async def _wait_until_ready(self, when: float) -> semconv.StopReason | None:
        """Wait until loop time ``when`` and until a request could be answered."""
        while self._stop is None:
            now = self._loop.time()
            if now >= when and self._request.ready():
                return None
            if now >= self._deadline:
                return "deadline"
            await self._sleep_until(when if now < when else self._deadline)
        return self._stop

    def _fail_attempt(self, failure: Failure, then: semconv.Action | None, delay: float) -> None:
        """Close the books on a failed attempt, and make sure that it is not heard later."""
        if self._last is None or not failure.provoked:
            self._last = failure
        self._codes.append(failure.code or failure.error_type)
        assert self._attempt is not None
        with harmless("Request.abandon"):
            self._request.abandon(self._attempt, then)
        self._close_attempt("failed", failure, then, delay)

    def _close_attempt(
        self,
        result: semconv.Result,
        failure: Failure | None = None,
        then: semconv.Action | None = None,
        delay: float = 0.0,
    ) -> None:
        self._attempt = None
        self._trace.attempt_ended(result, self._elapsed(), failure, then, delay)

    def _give_up(self, failure: Failure, stop: semconv.StopReason) -> Failure:
        """End the reply as failed; returns the failure that the agent is told of."""
        if self._attempt is not None:
            self._fail_attempt(failure, None, 0.0)
        elif self._last is None or not failure.provoked:
            self._last = failure
        assert self._last is not None
        self._end(stop, self._last)
        if self._on_failed is not None:
            with harmless("on_exhausted"):
                self._on_failed(self._report(stop))
        return self._last

    def _report(self, stop: semconv.StopReason) -> FailedReply:
        return FailedReply(
            provider=self._trace.target.provider,
            model=self._trace.target.model,
            outcome=semconv.OUTCOME_OF[stop],
            stop_reason=stop,
            codes=tuple(self._codes),
            attempts=self._number,
            seconds=self._loop.time() - self._began,
            trace_id=self._trace.trace_id,
        )

    def _raise(self, failure: Failure, stop: semconv.StopReason) -> NoReturn:
        told = self._give_up(failure, stop)
        if told.kind != "bug":
            note = f"traced_retry: {self._number} attempt(s), stopped by {stop}"
            _add_note(told.error, f"{note}, trace id {self._trace.trace_id or 'none'}")
        raise told.error

    # --- the end -------------------------------------------------------------------------------

    def _succeed(self) -> T:
        attempt = self._attempt
        assert attempt is not None
        self._close_attempt("succeeded")
        self._end(None)
        return attempt.result()

    def _end(self, stop: semconv.StopReason | None, failure: Failure | None = None) -> None:
        self._ended = True
        seconds = self._loop.time() - self._began
        self._trace.end(stop, self._number, self._waited, seconds, failure)


def _add_note(error: BaseException, note: str) -> None:
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:  # Python 3.10: PEP 678 by hand, as the exceptiongroup backport reads it
        error.__notes__ = [*getattr(error, "__notes__", ()), note]
