# SPDX-License-Identifier: Apache-2.0
"""The retry loop: attempt, decide, wait, stop. It knows neither LiveKit nor the OpenTelemetry SDK.

:class:`Reply` is one reply from the call to its outcome. A
:class:`~traced_retry.core.request.Request` sends the attempts and knows the next safe action.

:meth:`Reply._attempts` is a generator. :class:`~traced_retry.core.driver.Driver` resumes it in the
very call that changes something: when an attempt ends, a timer fires or an adapter reports a
failure.

The only clock is the running event loop's, so tests run the loop on a virtual clock.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import backoff

from traced_retry import semconv
from traced_retry.core.attempt import Attempt
from traced_retry.core.breaker import circuit
from traced_retry.core.cooldown import SessionCooldown
from traced_retry.core.driver import Driver, Steps
from traced_retry.core.failure import NOTE, Failure, copy_error, explain
from traced_retry.core.guard import log_once, log_suppressed, suppress_and_log
from traced_retry.core.policy import Delays, RetryPolicy
from traced_retry.core.request import Delivery, Request
from traced_retry.core.telemetry import ReplyTrace

T = TypeVar("T")

_STALL_TIMEOUT = 60.0
"""Seconds without provider activity until a reply that has started counts as cut off."""


@dataclass(frozen=True)
class FailedReply:
    """A reply that failed permanently, as passed to ``on_exhausted``.

    Args:
        provider: ``gen_ai.provider.name`` of the telemetry, such as ``"openai"``.
        model: ``gen_ai.request.model``, or None if it is unknown.
        outcome: ``"exhausted"`` or ``"not_recoverable"``.
        stop_reason: the reason why no further attempt was made, such as ``"max_attempts"``,
            ``"deadline"`` or ``"budget"``.
        codes: the provider's code of each failed attempt, or its ``error.type`` if it has no code.
        attempts: the number of attempts made. 0 if the reply ended before its first request.
        seconds: seconds from the request until the failure: the silence that the caller heard.
        trace_id: 32 hexadecimal digits, or None if the reply is not traced or its trace is not
            sampled.
        initiator: ``"agent"`` if the code requested the reply. ``"provider"`` if the provider
            started it, or should have started it, because the caller spoke or a tool returned.
        speech: LiveKit's ``SpeechHandle`` of the reply, or None if there is none. There is none if
            the provider never answered the caller.
        session: LiveKit's ``AgentSession`` that waits for the reply, or None if there is none.
    """

    provider: str
    model: str | None
    outcome: semconv.Outcome
    stop_reason: semconv.StopReason
    codes: tuple[str, ...]
    attempts: int
    seconds: float
    trace_id: str | None
    initiator: semconv.Initiator = "agent"
    speech: Any = None
    session: Any = None


class Reply(Driver, Generic[T]):
    """Attempts for one reply, until one succeeds or no further attempt is allowed.

    Args:
        request: sends the attempts and knows the next safe action.
        policy: the limits.
        trace: the reply's telemetry.
        jitter: turns the upper bound of a wait into the wait, both in seconds.
        cooldown: shared by the replies of a session.
        on_failed: called if the reply failed permanently.
        on_output: called at the first output of each response.
        on_ended: called when the reply is over, its delivery included. The second argument is the
            error of a reply that failed, and None otherwise.
    """

    __slots__ = (
        "_attempt",
        "_began",
        "_circuit",
        "_codes",
        "_cooldown",
        "_deadline",
        "_delays",
        "_ended",
        "_first_word_was_late",
        "_forced_stop",
        "_future",
        "_jitter",
        "_last",
        "_number",
        "_on_ended",
        "_on_failed",
        "_on_output",
        "_paid_for",
        "_policy",
        "_reported",
        "_request",
        "_result",
        "_trace",
        "_wait_began",
    )  # Ten thousand replies may wait at once.

    def __init__(
        self,
        request: Request[T],
        policy: RetryPolicy,
        trace: ReplyTrace,
        *,
        jitter: Callable[[float], float] = backoff.full_jitter,
        cooldown: SessionCooldown | None = None,
        on_failed: Callable[[FailedReply], None] | None = None,
        on_output: Callable[[], None] | None = None,
        on_ended: Callable[[Reply[T], BaseException | None], None] | None = None,
    ) -> None:
        super().__init__()
        self._request = request
        self._policy = policy
        self._trace = trace
        self._jitter = jitter
        self._cooldown = cooldown or SessionCooldown()
        self._on_failed = on_failed
        self._on_output = on_output
        self._on_ended = on_ended
        self._future: asyncio.Future[T] = self._loop.create_future()
        self._circuit = None
        if policy.breaker is not None:
            with suppress_and_log("finding the circuit breaker"):
                self._circuit = circuit(policy.breaker, *trace.target.key)

        self._number = 0
        self._attempt: Attempt[T] | None = None
        self._delays: Delays | None = None
        self._wait_began: float | None = None
        self._reported: Failure | None = None
        self._forced_stop: semconv.StopReason | None = None
        self._last: Failure | None = None
        self._codes: list[str] = []
        self._first_word_was_late = False
        self._paid_for: semconv.Action | None = None
        """The next action, if it is decided and paid for before the attempt fails."""
        self._result: Any = None
        """The first result. The streams of later results are attached to it."""
        self._ended = False

    # --- the caller's side ---------------------------------------------------------------------

    def start(self, *, began: float | None = None) -> asyncio.Future[T]:
        """Send the first attempt, or wait for the end of the session's cooldown.

        With ``began``, the provider started the reply at that time of the event loop's clock, and
        the first attempt listens to it.

        If the returned future is cancelled, the reply ends at once and its attempt is cancelled. If
        the provider dropped the request for a newer one, the future is cancelled. If the reply
        fails, the future holds the last original exception. A note on it gives the number of
        attempts, the stop reason and the trace id. A programming error carries no note.

        Raises:
            Exception: if the request raises a programming error, such as ``NotImplementedError``,
                before it returns a future.
        """
        now = self._loop.time()
        self._began = now if began is None else began
        self._deadline = self._began + self._policy.deadline
        self._trace.begin(self._began, now - self._began)
        if self._policy.budget is not None:
            self._policy.budget.earn(self._trace.target.provider, self._loop.time)
        if began is not None:
            self._send("listen", 0.0, now)
        # A cooldown beyond the deadline does not hold a reply back, so each reply is sent once.
        elif not now < self._cooldown.until < self._deadline:
            self._send_first(0.0, now)
        self._step()
        future = self._future
        if not future.done():
            future.add_done_callback(self._on_future_done)
        elif not future.cancelled() and (error := future.exception()) is not None:  # noqa: SIM102
            if explain(error).kind == "bug":
                raise error
        return future

    def fail_unsent(self, failure: Failure, stop: semconv.StopReason) -> None:
        """Record a reply that failed before :meth:`start` was called."""
        self._began = self._loop.time()
        self._trace.begin(self._began, 0.0)
        self._give_up(failure, stop)
        self._future.exception()  # Mark it as retrieved, because no caller has the future.

    def report_failure(self, failure: Failure, stop: semconv.StopReason | None = None) -> None:
        """Report that the current attempt is lost, if its own future does not say so.

        With ``stop``, the reply ends, in an attempt as well as in a wait.
        """
        self._reported, self._forced_stop = failure, stop or self._forced_stop
        self.wake()

    def wake(self) -> None:
        """Check the reply again, because ``Request.ready`` may have changed."""
        if self._ended:
            return
        if not self._running and self._future.cancelled():
            self.interrupt()  # The future's callback runs only in the event loop's next turn.
        else:
            self._resume()

    def interrupt(self, *, cut: bool = False) -> None:
        """End the reply as interrupted, unless it has ended, and cancel its attempt.

        With ``cut``, the plugin has already stopped the generation.
        """
        if self._ended:
            return
        attempt = self._attempt
        if attempt is not None and attempt.delivery is not None and attempt.delivery.first_output:
            self._succeed(attempt)
            return
        now = self._loop.time()
        if attempt is not None:
            self._close(attempt, "interrupted", now)
        self._end_wait()
        self._end("interrupted", now)
        # The outcome is recorded first, because the plugin may interrupt us again from here.
        if attempt is not None and attempt.future is not None:
            if self._loop.is_closed() or (cut and attempt.future.done()):
                return
            with suppress_and_log("Request.cancel"):
                self._request.cancel(attempt.future)

    def end_retries(self, failure: Failure, within: float = 0.0) -> None:
        """Make no further attempt, and end the reply as out of time.

        A reply with output goes on. A first attempt without a result may still get one, because the
        caller would wait for it without retries, too. If it is hedged, it has ``within`` seconds.
        """
        attempt = self._attempt
        if attempt is not None and attempt.delivery is not None and attempt.delivery.first_output:
            return
        waits = attempt is not None and attempt.future is not None and not attempt.future.done()
        if attempt is None or not waits or (self._number > 1 and attempt.action != "hedge"):
            self.report_failure(failure, "deadline")
            return
        self._policy = replace(self._policy, max_retries=0)
        if attempt.action == "hedge":  # The request before it is still open.
            attempt.limit = min(attempt.limit, self._loop.time() + within)
            self.wake()

    @property
    def future(self) -> asyncio.Future[T]:
        """The future that :meth:`start` returns."""
        return self._future

    @property
    def resolved(self) -> bool:
        """Whether the agent has its reply, or knows that there is none."""
        return self._future.done()

    # --- the steps -----------------------------------------------------------------------------

    def _run(self) -> Steps:
        """Take the result of a call that did not wait, or return the generator that waits."""
        attempt = self._attempt
        if self._ended or attempt is None or attempt.future is None or not attempt.future.done():
            return self._attempts()
        failure = self._take_result(attempt)
        return iter(()) if self._ended else self._attempts(failure)

    def _attempts(self, failure: Failure | None = None) -> Steps:
        """Run attempts with waits between them, until one is heard.

        The first attempt may have ended with ``failure`` already.
        """
        if self._ended or (self._attempt is None and not (yield from self._await_cooldown())):
            return
        while True:
            attempt = self._attempt
            assert attempt is not None
            if failure is None and attempt.delivery is None:
                failure = yield from self._await_attempt(attempt)
                if failure is None and not self._ended:
                    failure = self._take_result(attempt)
            if failure is None and not self._ended and attempt.delivery is not None:
                yield from self._await_end(attempt, attempt.delivery)
                if not self._ended:
                    failure = self._finish(attempt, attempt.delivery)
            if failure is None or self._ended:
                return
            yield from self._try_again(attempt, failure)
            if self._ended:
                return
            failure = None

    def _try_again(self, attempt: Attempt[T], failure: Failure) -> Steps:
        """Make another attempt after a failed one, or end the reply."""
        if self._future.cancelled():  # The policy's classify did so.
            self.interrupt()
            return
        stop, action, delay = self._decide(failure)
        if action is None or stop is not None:
            self._give_up(failure, stop or "unsafe_to_resend")
            return
        self._fail_attempt(attempt, failure, action, delay)
        stop = yield from self._wait_until_ready(action, delay)
        if stop is None and self._request.has_answer():
            action = "listen"
        if stop is None and self._is_circuit_open(action):
            stop = "circuit_open"
        if stop is not None:
            self._give_up(self._forced_failure(failure), stop)
            return
        self._send(action, self._end_wait(), self._loop.time())

    def _await_cooldown(self) -> Generator[float | None, None, bool]:
        """Wait until the provider accepts requests again. Return False if the reply ended."""
        failure = self._cooldown.failure
        assert failure is not None
        failure = copy_error(failure)
        stop = yield from self._wait_until_ready("send", 0.0)
        if stop is not None:
            self._give_up(self._forced_failure(failure), stop)
            return False
        self._send_first(self._end_wait(), self._loop.time())
        return not self._ended

    def _send_first(self, delay: float, now: float) -> None:
        """Make the first attempt, unless the circuit breaker refuses it."""
        admitted = True
        if self._circuit is not None:
            with suppress_and_log("asking the circuit breaker"):
                admitted = self._circuit.admits(now)
        if admitted:
            self._send("send", delay, now)
        else:
            self._give_up(self._request.refused(), "circuit_open")

    def _send(self, action: semconv.Action, delay: float, now: float) -> None:
        """Make the next attempt."""
        self._number += 1
        limit = self._deadline
        if (seconds := self._policy.attempt_timeout) is not None:
            limit = min(limit, now + seconds)
        if (seconds := self._request.limit(action)) is not None:
            limit = min(limit, now + seconds)
        attempt: Attempt[T] = Attempt(self._number, action, delay, now, limit)
        if self._policy.hedge_after is not None and action == "send":
            attempt.hedge_at = now + self._policy.hedge_after
        if self._forced_stop is None:
            self._reported = None
        self._trace.attempt_began(attempt)
        try:
            future = self._trace.call(attempt, self._request)
        except Exception as error:  # noqa: BLE001 - it is classified like a future's exception
            if isinstance(error, StopIteration):  # A future cannot hold this one.
                error = RuntimeError("the request raised StopIteration")
            future = self._loop.create_future()
            future.set_exception(error)
        except BaseException:  # KeyboardInterrupt, SystemExit
            attempt.result = "interrupted"
            self._trace.attempt_ended(attempt, 0.0)
            self._end("interrupted", self._loop.time())
            raise
        attempt.future = future
        self._attempt = attempt
        if not future.done():
            future.add_done_callback(self._on_attempt_done)

    def _await_attempt(self, attempt: Attempt[T]) -> Generator[float | None, None, Failure | None]:
        """Wait for the end of the attempt. Return the failure that ends it before its result."""
        future = attempt.future
        assert future is not None
        while not future.done():
            if self._ended:
                return None
            if self._reported is not None:
                return self._classify(self._reported)
            if (now := self._loop.time()) >= attempt.limit:
                return self._classify(self._request.timed_out(now - attempt.began))
            if attempt.hedge_at is None or not self._request.can_hedge():
                yield attempt.limit
            elif now < attempt.hedge_at:
                yield min(attempt.hedge_at, attempt.limit)
            else:
                attempt.hedge_at = None
                failure = self._classify(self._request.timed_out(now - attempt.began))
                if self._may_repeat(failure):
                    self._paid_for = "hedge"
                    return failure
        return None

    def _take_result(self, attempt: Attempt[T]) -> Failure | None:
        """Resolve the caller's future with the result of an attempt, or return its failure.

        The reply ends here if the attempt was cancelled or if its delivery is not observable.
        """
        future = attempt.future
        assert future is not None
        if future.cancelled():
            now = self._loop.time()
            self._close(attempt, "superseded", now)
            self._end("superseded", now)
            return None
        if (reason := future.exception()) is not None:
            return self._classify(self._request.explain(reason))
        result = future.result()
        delivery = None
        try:
            delivery = self._request.delivery(result)
        except Exception as error:  # noqa: BLE001 - the result is valid without its delivery
            log_suppressed("Request.delivery", error)
        attempt.delivery = delivery
        if self._result is None:
            self._result = result
        if not (self._future.done() or (delivery is not None and delivery.failed_before_output)):
            self._future.set_result(self._result)
            self._trace.has_generation = True
        if delivery is None:
            if self._circuit is not None:
                self._note_success()
            self._succeed(attempt)
            return None
        delivery.on_end = self.wake
        if self._on_output is not None or self._circuit is not None:
            delivery.on_output = self._note_output
            if delivery.first_output:
                self._note_output()
        return None

    def _await_end(self, attempt: Attempt[T], delivery: Delivery) -> Steps:
        """Wait for the end of a reply that has started. Cut it off if its time is up."""
        limit = self._deadline
        if self._policy.attempt_timeout is not None:
            limit = min(limit, attempt.began + self._policy.attempt_timeout)
        began = self._loop.time()
        while not (delivery.ended or self._ended):
            if self._forced_stop is not None and self._reported is not None:
                # The agent closed the session on purpose, so the caller heard all that was wanted.
                # If the session failed, the rest of the reply was lost.
                wanted = delivery.first_output and self._forced_stop == "session_closed"
                delivery.end(None if wanted else self._reported)
            elif delivery.first_output:
                since = delivery.last_activity
                if since is None:
                    yield None
                elif (now := self._loop.time()) >= since + _STALL_TIMEOUT:
                    delivery.end(self._request.timed_out(now - since))
                else:
                    yield since + _STALL_TIMEOUT
            elif (now := self._loop.time()) >= limit:
                delivery.end(self._request.timed_out(now - attempt.began))
            else:
                yield from self._await_first_word(attempt, delivery, began, limit)

    def _await_first_word(
        self, attempt: Attempt[T], delivery: Delivery, began: float, limit: float
    ) -> Steps:
        """Wait for the first word until ``limit``, or until another response may bring it sooner.

        A model that is slow with each response gets the rest of the time for the next one.
        """
        seconds = self._policy.first_word_timeout
        if seconds is None or self._first_word_was_late or not self._request.can_replace():
            yield limit
            return
        late, now = (delivery.last_activity or began) + seconds, self._loop.time()
        if now < late:
            yield min(late, limit)
            return
        self._first_word_was_late = True
        failure = self._request.timed_out(now - attempt.began)
        if self._may_repeat(self._classify(failure)):
            self._paid_for = "send"
            delivery.end(failure)

    def _finish(self, attempt: Attempt[T], delivery: Delivery) -> Failure | None:
        """End the reply. If it failed before its first output, return the failure instead."""
        if delivery.failure is not None:
            failure = self._classify(delivery.failure)
            if delivery.failed_before_output:
                return failure
            # The caller would hear another attempt as a second reply.
            self._give_up(failure, "output_started")
        elif delivery.cancelled:
            now = self._loop.time()
            self._close(attempt, "interrupted", now)
            self._end("interrupted", now)
        else:
            self._succeed(attempt)
        return None

    # --- decisions -----------------------------------------------------------------------------

    def _classify(self, failure: Failure) -> Failure:
        """Apply the policy to the classification of the default table."""
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
            self._cooldown.update(failure, self._loop.time())
        return failure

    def _decide(
        self, failure: Failure
    ) -> tuple[semconv.StopReason | None, semconv.Action | None, float]:
        """Return the reason to stop, or the next action and its delay in seconds."""
        paid_for, self._paid_for = self._paid_for, None
        if stop := self._stop_reason(failure):
            return stop, None, 0.0
        if paid_for is not None:
            return None, paid_for, 0.0
        action = self._request.next_action(failure)
        # Only a "send" waits: a reply that arrived before a "listen" or a "restart" would be lost.
        delay = self._next_delay(failure) if action == "send" else 0.0
        if self._loop.time() + delay >= self._deadline:
            return "deadline", action, delay
        if self._is_circuit_open(action):
            return "circuit_open", action, delay
        if action in ("send", "restart") and not self._pay():  # A "listen" sends no request.
            return "budget", action, delay
        return None, action, delay

    def _is_circuit_open(self, action: semconv.Action | None) -> bool:
        """Return whether the circuit breaker refuses a retry. Only a new reply can be a probe."""
        if self._circuit is not None and action != "listen":
            with suppress_and_log("asking the circuit breaker"):
                return self._circuit.is_open(self._loop.time())
        return False

    def _may_repeat(self, failure: Failure) -> bool:
        """Return whether another request may replace one that may still succeed, and pay for it.

        If it may not, the attempt goes on. Otherwise our own time-out would lose a slow reply.
        """
        return (
            self._stop_reason(failure) is None
            and self._cooldown.until <= self._loop.time()
            and not self._is_circuit_open("hedge")
            and self._pay()
        )

    def _pay(self) -> bool:
        """Take the price of one request from the budget. Return False if it is empty."""
        budget = self._policy.budget
        return budget is None or budget.spend(self._trace.target.provider, self._loop.time)

    def _stop_reason(self, failure: Failure) -> semconv.StopReason | None:
        """Return the reason why no attempt may follow, however safe it would be."""
        if self._forced_stop is not None:
            return self._forced_stop
        if not failure.recoverable:
            return "not_recoverable"
        if self._loop.time() >= self._deadline:
            return "deadline"
        return "max_attempts" if self._number > self._policy.max_retries else None

    def _next_delay(self, failure: Failure) -> float:
        if self._delays is None:
            self._delays = self._policy.delays(self._jitter)
        return max(self._delays.next(failure), self._cooldown.until - self._loop.time())

    def _wait_until_ready(
        self, action: semconv.Action, delay: float
    ) -> Generator[float | None, None, semconv.StopReason | None]:
        """Wait ``delay`` seconds, and until a request can be answered.

        Do not wait for "listen", and no longer if an earlier request is answered.
        """
        self._wait_began = self._loop.time()
        while self._forced_stop is None and not self._ended:
            now = self._loop.time()
            when = max(self._wait_began + delay, self._cooldown.until)
            if action == "listen" or (now >= when and self._request.ready()):
                return None
            if self._request.has_answer():
                return None
            if max(now, when) >= self._deadline:
                return "deadline"
            yield when if now < when else self._deadline
        return self._forced_stop or "interrupted"

    def _forced_failure(self, failure: Failure) -> Failure:
        """Return the failure that forced the reply to stop, or else ``failure``."""
        if self._forced_stop is not None and self._reported is not None:
            return self._reported
        return failure

    # --- bookkeeping ---------------------------------------------------------------------------

    def _on_attempt_done(self, future: asyncio.Future[T]) -> None:
        if not future.cancelled():
            future.exception()  # Mark it as retrieved, so that asyncio does not log it.
        if self._attempt is not None and future is self._attempt.future:
            self.wake()

    def _on_future_done(self, future: asyncio.Future[T]) -> None:
        if future.cancelled():
            self.interrupt()

    def _on_timer(self) -> None:
        self.wake()

    def _on_loop_closed(self) -> None:
        with suppress_and_log("the end of a reply whose event loop was closed"):
            self.interrupt()

    def _on_error(self, error: BaseException) -> None:
        """End the reply because our own code or an adapter failed."""
        if isinstance(error, Exception):
            log_suppressed("the retry of a reply", error)
        self._give_up(self._request.internal_failure(error), "not_recoverable", note=False)

    def _fail_attempt(
        self,
        attempt: Attempt[T],
        failure: Failure,
        next_action: semconv.Action | None,
        next_delay: float,
    ) -> None:
        """Record a failed attempt, and make sure that its reply is not heard later."""
        assert attempt.future is not None
        now = self._loop.time()
        self._record_failure(failure)
        self._codes.append(failure.code or failure.error_type)
        with suppress_and_log("Request.abandon"):
            self._request.abandon(attempt.future, next_action)
        if self._circuit is not None:
            with suppress_and_log("reporting a failure to the circuit breaker"):
                self._circuit.fail(failure, attempt.began, now)
        attempt.failure = failure
        attempt.next_action = next_action
        attempt.next_delay = next_delay
        self._close(attempt, "failed", now)

    def _note_output(self) -> None:
        """Report the first output of a response."""
        self._note_success()
        if self._on_output is not None:
            self._on_output()

    def _note_success(self) -> None:
        """Report to the circuit breaker that the provider answers."""
        if self._circuit is not None:
            with suppress_and_log("closing the circuit breaker"):
                self._circuit.succeed(self._loop.time())

    def _record_failure(self, failure: Failure) -> None:
        """Keep the failure to raise: the provider's own last error, rather than our time-out."""
        if self._last is None or self._last.ended_locally or not failure.ended_locally:
            self._last = failure

    def _close(self, attempt: Attempt[T], result: semconv.Result, now: float) -> None:
        """Record the end of the current attempt."""
        self._attempt = None
        attempt.result = result
        self._trace.attempt_ended(attempt, attempt.seconds_to_output(now))

    def _end_wait(self) -> float:
        """Record the wait before an attempt, if there is one, and return its seconds."""
        if self._wait_began is None:
            return 0.0
        waited = self._loop.time() - self._wait_began
        self._wait_began = None
        self._trace.waited(waited)
        return waited

    def _succeed(self, attempt: Attempt[T]) -> None:
        delivery = attempt.delivery
        if delivery is not None and delivery.is_no_reply and self._trace.discard():
            self._attempt = None
            self._finish_up(None)
            return
        now = self._loop.time()
        self._close(attempt, "succeeded", now)
        heard = None if delivery is None else delivery.first_output_at
        self._end(None, now if heard is None else heard)

    def _give_up(self, failure: Failure, stop: semconv.StopReason, *, note: bool = True) -> None:
        """End the reply as failed, and raise the error to the agent if it has no reply yet."""
        if self._ended:
            return
        if stop == "not_recoverable" and failure.recoverable:
            # The session is over, so no further attempt can succeed, whatever the kind of failure.
            failure = replace(failure, recoverable=False)
        if self._attempt is not None:
            self._fail_attempt(self._attempt, failure, None, 0.0)
        self._record_failure(failure)
        assert self._last is not None
        self._end_wait()
        self._end(stop, self._loop.time(), self._last)
        error = self._last.error
        if note and self._last.kind != "bug":
            said = f"{self._number} attempt(s), stopped by {stop}"
            with contextlib.suppress(Exception):  # Some exceptions cannot take a note.
                error.add_note(f"{NOTE}{said}, trace id {self._trace.trace_id or 'none'}")
        if not self._future.done():
            self._future.set_exception(error)
        if self._on_failed is not None:
            with suppress_and_log("on_exhausted"):
                self._on_failed(self._failed_reply(stop))

    def _end(
        self, stop: semconv.StopReason | None, at: float, failure: Failure | None = None
    ) -> None:
        """Record the outcome of the reply, which the caller knows since ``at``."""
        self._ended = True
        self._trace.end(stop, at - self._began, failure)
        if stop in ("superseded", "interrupted"):
            with contextlib.suppress(RuntimeError):  # A closed loop runs no callbacks.
                self._future.cancel()
        self._finish_up(failure)

    def _finish_up(self, failure: Failure | None) -> None:
        """Stop the timer, and report the end of the reply to the hook."""
        self._ended = True
        if self._timer is not None:
            self._cancel_timer()
        if self._on_ended is not None:
            self._on_ended(self, None if failure is None else failure.error)

    def _failed_reply(self, stop: semconv.StopReason) -> FailedReply:
        return FailedReply(
            provider=self._trace.target.provider,
            model=self._trace.target.model,
            outcome=semconv.OUTCOME_OF[stop],
            stop_reason=stop,
            codes=tuple(self._codes),
            attempts=self._number,
            seconds=self._loop.time() - self._began,
            trace_id=self._trace.trace_id,
            initiator=self._trace.target.initiator,
        )
