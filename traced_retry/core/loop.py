# SPDX-License-Identifier: Apache-2.0
"""The loop: attempt, decide, wait, stop. Knows no LiveKit and no OpenTelemetry SDK.

:class:`Reply` is one reply from the call to its outcome. What it repeats stands behind
:class:`~traced_retry.core.request.Request`, which says what is safe to do next.

The loop is a generator (:meth:`Reply._life`) that yields the time until which it has nothing to
do. It is resumed in the very call that changes something: when an attempt ends, a timer fires or
an adapter has news. A task would need several turns of the event loop for each of these, and in
those turns LiveKit closes a session whose agent has not been told yet why its reply failed. Nor
can a generator be cancelled before its first step, as a task can, with its clean-up skipped.

Its only clock is the running event loop's, so a test runs it on a virtual one.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import backoff

from traced_retry import semconv
from traced_retry.core.failure import Failure, explain
from traced_retry.core.guard import log_once, suppress_and_log
from traced_retry.core.policy import Delays, RetryPolicy
from traced_retry.core.request import Delivery, Request
from traced_retry.core.telemetry import ReplyTrace

T = TypeVar("T")

_NOTE = "traced_retry: "
_STALL_TIMEOUT = 60.0
"""Seconds without a sign of a reply that has begun to be heard, after which no end is expected."""


class SessionCooldown:
    """Until when a session's provider wants not to be asked: its last ``retry_after``."""

    def __init__(self) -> None:
        self.until = -math.inf
        """The event loop's seconds."""
        self.why: Failure | None = None

    def update(self, why: Failure, now: float) -> None:
        """Take note of what ``why`` says."""
        if why.retry_after and now + why.retry_after > self.until:
            self.until, self.why = now + why.retry_after, why


Life = Generator["float | None", None, None]
"""Yields the loop time until which nothing need be done; None: until something happens."""


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

    Args:
        request: what is asked, and what is safe to do next.
        policy: what may be spent on it.
        trace: its telemetry.
        jitter: turns the upper bound of a wait into the wait; both seconds.
        retry_after: shared by the replies of a session, which all heed it.
        on_failed: told of a reply that failed for good.
        on_ended: told when the reply is over, its delivery included; and of the error, if it
            failed when the future had resolved already.
    """

    __slots__ = (
        "_attempt",
        "_attempt_began",
        "_began",
        "_codes",
        "_context",
        "_deadline",
        "_delays",
        "_delivery",
        "_ended",
        "_future",
        "_jitter",
        "_last",
        "_limit",
        "_loop",
        "_news",
        "_number",
        "_on_ended",
        "_on_failed",
        "_policy",
        "_request",
        "_result",
        "_retry_after",
        "_step_again",
        "_stepping",
        "_steps",
        "_stop",
        "_timer",
        "_trace",
        "_wait_began",
        "_waited",
    )  # ten thousand may wait at once

    def __init__(
        self,
        request: Request[T],
        policy: RetryPolicy,
        trace: ReplyTrace,
        *,
        jitter: Callable[[float], float] = backoff.full_jitter,
        retry_after: SessionCooldown | None = None,
        on_failed: Callable[[FailedReply], None] | None = None,
        on_ended: Callable[[Reply[T], BaseException | None], None] | None = None,
    ) -> None:
        self._request = request
        self._policy = policy
        self._trace = trace
        self._jitter = jitter
        self._retry_after = retry_after or SessionCooldown()
        self._on_failed = on_failed
        self._on_ended = on_ended
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[T] = self._loop.create_future()

        self._number = 0
        self._attempt: asyncio.Future[T] | None = None
        self._delays: Delays | None = None
        self._waited = 0.0
        self._wait_began: float | None = None
        self._news: Failure | None = None
        self._stop: semconv.StopReason | None = None
        self._last: Failure | None = None
        self._codes: list[str] = []
        self._result: Any = None
        """The first one, which later ones go on with."""
        self._delivery: Delivery | None = None
        self._ended = False

        self._steps: Life = self._life()
        self._stepping = False
        self._step_again = False
        self._timer: asyncio.TimerHandle | None = None
        self._context: contextvars.Context | None = None

    # --- the caller's side ---------------------------------------------------------------------

    def start(self) -> asyncio.Future[T]:
        """Make the first attempt now, unless the provider is to be left alone; returns the reply.

        Cancelling the future ends the reply at once, and carries the cancel inward. It is
        cancelled itself where the provider dropped the request for a newer one. On failure it
        holds the last original exception, with a note of attempts, stop reason and trace id (a
        programming error without the note).

        Raises:
            Exception: a programming error (``NotImplementedError``, ...) that the request raised
                before it returned a future, untouched.
        """
        self._began = self._loop.time()
        self._deadline = self._began + self._policy.deadline
        self._trace.begin()
        if self._policy.budget is not None:
            self._policy.budget.earn(self._trace.target.provider, self._loop.time)
        if self._retry_after.until <= self._began:
            self._send("send", 0.0)
        self._step()
        future = self._future
        if not future.done():
            future.add_done_callback(self._on_future_done)
        elif not future.cancelled() and (error := future.exception()) is not None:  # noqa: SIM102
            if explain(error).kind == "bug":
                raise error
        return future

    def report_failure(self, failure: Failure, stop: semconv.StopReason | None = None) -> None:
        """Tell the loop what the attempt's own future does not: that the request is lost.

        With ``stop``, nothing further is tried, be it in an attempt or in a wait.
        """
        self._news, self._stop = failure, stop or self._stop
        self.wake()

    def wake(self) -> None:
        """Have the loop look again: ``Request.ready`` may have changed."""
        if self._stepping:  # news from inside a step, as of an event that our own request caused
            self._step_again = True
        elif self._future.cancelled():  # in this turn: its callback comes with the next
            self.interrupt()
        elif self._context is not None and not self._ended:
            self._context.run(self._step)

    def interrupt(self, *, cut: bool = False) -> None:
        """End the reply as interrupted, unless it has ended. Sends the cancel inward.

        With ``cut``, what had begun of it was cut already.
        """
        if self._ended:
            return
        if self._delivery is not None and self._delivery.first_output is not None:
            self._succeed()
            return
        attempt = self._attempt
        if attempt is not None:
            self._close_attempt("interrupted")
        self._end_wait()
        self._end("interrupted")
        # The books are closed first: a plugin that is told of it may well interrupt us again.
        if attempt is not None and not (cut and attempt.done()):
            with suppress_and_log("Request.cancel"):
                self._request.cancel(attempt)

    @property
    def resolved(self) -> bool:
        """Whether the agent holds its reply, or knows that it gets none."""
        return self._future.done()

    # --- being resumed -------------------------------------------------------------------------

    def _step(self) -> None:
        """Go on as far as possible; then sleep until the time that :meth:`_life` yields."""
        self._stepping = True
        try:
            when = next(self._steps)
            while self._step_again:
                self._step_again = False
                when = next(self._steps)
        except StopIteration:
            pass
        except BaseException as error:
            self._break(error)
            if not isinstance(error, Exception):
                raise
        else:
            self._sleep_until(when)
        finally:
            self._stepping = False

    def _sleep_until(self, when: float | None) -> None:
        if self._context is None:
            # Later steps run in timers and in the plugin's own tasks; what they call shall see
            # the context variables of whoever asked for the reply.
            self._context = contextvars.copy_context()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if when is None else self._loop.call_at(when, self.wake)

    def _break(self, error: BaseException) -> None:
        """An adapter failed where it must not; the agent is told, and nothing stays open."""
        self._give_up(explain(error), "not_recoverable", note=False)

    def _on_attempt_done(self, attempt: asyncio.Future[T]) -> None:
        if not attempt.cancelled():
            attempt.exception()  # marks it as retrieved: an abandoned attempt must not be logged
        if attempt is self._attempt:
            self.wake()

    def _on_future_done(self, future: asyncio.Future[T]) -> None:
        if future.cancelled():
            self.interrupt()

    # --- its life ------------------------------------------------------------------------------

    def _life(self) -> Life:
        """Attempts with waits between them, until one is heard."""
        if self._attempt is None and not (yield from self._await_cooldown()):
            return
        while True:
            failure = yield from self._settled()
            if failure is None and not self._ended:
                failure = yield from self._delivered()
            if failure is None or self._ended:
                return
            stop, action, delay = self._decide(failure)
            if action is None or stop is not None:
                self._give_up(failure, stop or "unsafe_to_resend")
                return
            self._fail_attempt(failure, action, delay)
            stop = yield from self._wait_until_ready(action, delay)
            if stop is not None:
                self._give_up(self._news if self._stop and self._news else failure, stop)
                return
            self._send(action, self._end_wait())

    def _await_cooldown(self) -> Generator[float | None, None, bool]:
        """Do not ask before the provider wants to be asked; False where that takes too long."""
        why = self._retry_after.why
        assert why is not None
        why = copy_error(why)
        stop: semconv.StopReason | None = "deadline"
        if self._retry_after.until < self._deadline:
            stop = yield from self._wait_until_ready("send", 0.0)
        if stop is not None:
            self._give_up(self._news if self._stop and self._news else why, stop)
            return False
        self._send("send", self._end_wait())
        return True

    def _send(self, action: semconv.Action, delay: float) -> None:
        """Make the next attempt."""
        self._number += 1
        self._attempt_began = self._loop.time()
        self._limit = self._deadline
        for seconds in (self._policy.attempt_timeout, self._request.limit(action)):
            if seconds is not None:
                self._limit = min(self._limit, self._attempt_began + seconds)
        if self._stop is None:
            self._news = None
        self._delivery = None
        self._trace.attempt_began(self._number, action, delay)
        try:
            attempt = self._trace.call(self._request.attempt, action)
        except Exception as error:  # noqa: BLE001 - it is judged like a future's exception
            if isinstance(error, StopIteration):  # which no future may hold
                error = RuntimeError("the request raised StopIteration")
            attempt = self._loop.create_future()
            attempt.set_exception(error)
        except BaseException:  # KeyboardInterrupt, SystemExit
            self._trace.attempt_ended("interrupted", 0.0)
            self._end("interrupted")
            raise
        self._attempt = attempt
        if not attempt.done():
            attempt.add_done_callback(self._on_attempt_done)

    def _settled(self) -> Generator[float | None, None, Failure | None]:
        """Wait for the attempt to end: its failure, or None once the reply is there."""
        attempt = self._attempt
        assert attempt is not None
        limit = self._limit
        while not attempt.done():
            if self._ended:
                return None
            if self._news is not None:
                return self._judge(self._news)
            if (now := self._loop.time()) >= limit:
                return self._judge(self._request.timed_out(now - self._attempt_began))
            yield limit
        if attempt.cancelled():
            if not self._ended:
                self._close_attempt("superseded")
                self._end("superseded")
            return None
        error = attempt.exception()
        return None if error is None else self._judge(self._request.explain(error))

    def _judge(self, failure: Failure) -> Failure:
        """Apply the policy's opinion to the default table's."""
        if failure.kind == "rate_limit" and not self._policy.retry_rate_limits:
            failure = replace(failure, recoverable=False)
        if self._policy.classify is not None:
            with suppress_and_log("RetryPolicy.classify"):
                verdict = self._policy.classify(failure)
                if isinstance(verdict, Failure):
                    failure = verdict
                elif verdict is not None:
                    log_once("RetryPolicy.classify must return a Failure or None; it is ignored")
        if failure.recoverable:
            self._retry_after.update(failure, self._loop.time())
        return failure

    def _decide(
        self, failure: Failure
    ) -> tuple[semconv.StopReason | None, semconv.Action | None, float]:
        """Why to stop, or what to do next and after how many seconds."""
        if stop := self._over(failure):
            return stop, None, 0.0
        action = self._request.next_action(failure)
        # Between two windows of listening, or before a restart, no reply may slip through.
        delay = self._next_delay(failure) if action == "send" else 0.0
        if self._loop.time() + delay >= self._deadline:
            return "deadline", action, delay
        budget = self._policy.budget
        if action in ("send", "restart") and budget is not None:  # to listen costs nothing
            paid = budget.spend(self._trace.target.provider, self._loop.time)
            return None if paid else "budget", action, delay
        return None, action, delay

    def _over(self, failure: Failure) -> semconv.StopReason | None:
        """Why nothing may follow, whatever would be safe."""
        if self._stop is not None:
            return self._stop
        if not failure.recoverable:
            return "not_recoverable"
        if self._loop.time() >= self._deadline:
            return "deadline"
        return "max_attempts" if self._number > self._policy.max_retries else None

    def _next_delay(self, failure: Failure) -> float:
        if self._delays is None:
            self._delays = self._policy.delays(self._jitter)
        return max(self._delays.next(failure), self._retry_after.until - self._loop.time())

    def _wait_until_ready(
        self, action: semconv.Action, delay: float
    ) -> Generator[float | None, None, semconv.StopReason | None]:
        """Wait ``delay`` seconds and until a request could be answered; to listen takes neither."""
        self._wait_began = self._loop.time()
        while self._stop is None and not self._ended:
            now = self._loop.time()
            when = max(self._wait_began + delay, self._retry_after.until)
            if action == "listen" or (now >= when and self._request.ready()):
                return None
            if max(now, when) >= self._deadline:
                return "deadline"
            yield when if now < when else self._deadline
        return self._stop or "interrupted"

    def _delivered(self) -> Generator[float | None, None, Failure | None]:
        """Hand the reply over, and see whether it is heard: the failure of one that was not."""
        assert self._attempt is not None
        result = self._attempt.result()
        delivery = None
        with suppress_and_log(
            "Request.delivery"
        ):  # the reply is there, whatever we can see of its end
            delivery = self._request.delivery(result)
        self._delivery = delivery
        if self._result is None:
            self._result = result
        if not (self._future.done() or (delivery is not None and delivery.failed_before_output)):
            self._future.set_result(self._result)
        if delivery is None:
            self._succeed()
            return None
        delivery.on_end = self.wake
        yield from self._until_over(delivery)
        return None if self._ended else self._conclude(delivery)

    def _until_over(self, delivery: Delivery) -> Life:
        """Wait for the end of what was handed over; before its first word we may end it."""
        limit = self._deadline
        if self._policy.attempt_timeout is not None:
            limit = min(limit, self._attempt_began + self._policy.attempt_timeout)
        while not (delivery.ended or self._ended):
            if self._stop is not None and self._news is not None:
                # A session that was closed was closed on purpose: what was begun was heard as far
                # as that let it. One that died took the rest along.
                meant = delivery.first_output and self._stop == "session_closed"
                delivery.end(None if meant else self._news)
            elif delivery.first_output:
                since = delivery.last_activity
                if since is None:
                    yield None
                elif (now := self._loop.time()) >= since + _STALL_TIMEOUT:
                    delivery.end(self._request.timed_out(now - since))
                else:
                    yield since + _STALL_TIMEOUT
            elif (now := self._loop.time()) >= limit:
                delivery.end(self._request.timed_out(now - self._attempt_began))
            else:
                yield limit

    def _conclude(self, delivery: Delivery) -> Failure | None:
        """End the reply, or tell the failure of a reply of which nothing was heard."""
        if delivery.failure is not None:
            failure = self._judge(delivery.failure)
            if delivery.failed_before_output:
                return failure
            # A second try would be heard as a second reply.
            self._give_up(failure, "output_started")
        elif delivery.cancelled:
            self._close_attempt("interrupted")
            self._end("interrupted")
        else:
            self._succeed()
        return None

    # --- keeping the books ---------------------------------------------------------------------

    def _fail_attempt(self, failure: Failure, then: semconv.Action | None, delay: float) -> None:
        """Close the books on a failed attempt, and make sure that it is not heard later."""
        assert self._attempt is not None
        self._remember(failure)
        self._codes.append(failure.code or failure.error_type)
        with suppress_and_log("Request.abandon"):
            self._request.abandon(self._attempt, then)
        self._close_attempt("failed", failure, then, delay)

    def _remember(self, failure: Failure) -> None:
        """The agent is told the last that the provider said, rather than that our time was up."""
        if self._last is None or self._last.ended_locally or not failure.ended_locally:
            self._last = failure

    def _close_attempt(
        self,
        result: semconv.Result,
        failure: Failure | None = None,
        then: semconv.Action | None = None,
        delay: float = 0.0,
    ) -> None:
        self._attempt = None
        seconds, at = self._until_heard(self._attempt_began)
        self._trace.attempt_ended(result, seconds, failure, then, delay, at)

    def _end_wait(self) -> float:
        """Account for the wait between two attempts, if one is on; its seconds."""
        if self._wait_began is None:
            return 0.0
        waited = self._loop.time() - self._wait_began
        self._wait_began = None
        self._waited += waited
        self._trace.waited(waited)
        return waited

    def _succeed(self) -> None:
        self._close_attempt("succeeded")
        self._end(None)

    def _give_up(self, failure: Failure, stop: semconv.StopReason, *, note: bool = True) -> None:
        """End the reply as failed, and tell the agent, unless it has its reply already."""
        if self._ended:
            return
        if self._attempt is not None:
            self._fail_attempt(failure, None, 0.0)
        self._remember(failure)
        assert self._last is not None
        self._end_wait()
        self._end(stop, self._last)
        error = self._last.error
        if note and self._last.kind != "bug":
            said = f"{_NOTE}{self._number} attempt(s), stopped by {stop}"
            error.add_note(f"{said}, trace id {self._trace.trace_id or 'none'}")
        if not self._future.done():
            self._future.set_exception(error)
        if self._on_failed is not None:
            with suppress_and_log("on_exhausted"):
                self._on_failed(self._report(stop))

    def _end(self, stop: semconv.StopReason | None, failure: Failure | None = None) -> None:
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        seconds, at = self._until_heard(self._began)
        self._trace.end(stop, self._number, self._waited, seconds, failure, at)
        if stop in ("superseded", "interrupted"):
            self._future.cancel()
        if self._on_ended is not None:
            untold = failure.error if failure is not None and self._future.done() else None
            self._on_ended(self, untold)

    def _until_heard(self, began: float) -> tuple[float, int | None]:
        """Seconds from ``began`` to the first word, and when that was in Unix ns; else to now."""
        delivery = self._delivery
        if delivery is None or delivery.first_output is None or delivery.failure is not None:
            return self._loop.time() - began, None
        at, unix = delivery.first_output
        return at - began, unix

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


def copy_error(why: Failure) -> Failure:
    """``why`` with a copy of its error: another reply's agent may hold that one, and its note."""
    try:
        copied = copy.copy(why.error)
    except Exception:  # noqa: BLE001 - a class of the provider's, with an __init__ of its own
        return why
    if notes := getattr(why.error, "__notes__", None):  # the copy would share the list
        copied.__notes__ = [note for note in notes if not note.startswith(_NOTE)]
    return replace(why, error=copied)
