# SPDX-License-Identifier: Apache-2.0
"""Replies, their attempts and the waits between them, as plain data.

Stored spans may be incomplete or come from another version. Every text is kept as it is, and a
missing text raises no error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from traced_retry import semconv

Group = Literal["first_try", "recovered", "failed", "cut_short", "unknown"]
"""How a reply is counted and coloured."""

GROUP_OF: Final[dict[str, Group]] = {
    "succeeded": "first_try",
    "recovered": "recovered",
    "exhausted": "failed",
    "not_recoverable": "failed",
    "interrupted": "cut_short",
    "superseded": "cut_short",
}
"""The group of each :data:`traced_retry.semconv.Outcome`."""

_RETRY: Final[semconv.Decision] = "retry"
_FAILED: Final[semconv.Result] = "failed"
_NOTHING: Final = 0.001
"""Seconds. A shorter wait is not shown."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt. Times are Unix seconds."""

    number: int
    start: float
    end: float
    action: str | None = None
    delay: float | None = None
    """Seconds really waited before it."""
    result: str | None = None
    """None if the attempt's end was not stored."""
    error_code: str | None = None
    error_type: str | None = None
    recoverable: bool | None = None
    decision: str | None = None
    next_delay: float | None = None
    """Seconds the next attempt was planned to wait."""

    @property
    def seconds(self) -> float:
        """Duration of the attempt in seconds."""
        return max(0.0, self.end - self.start)

    @property
    def group(self) -> Group:
        """Colour group. A retried failure has the colour of a recovered reply."""
        if self.result == _FAILED:
            return "recovered" if self.decision == _RETRY else "failed"
        return GROUP_OF.get(self.result or "", "unknown")

    @property
    def code(self) -> str | None:
        """Cause of the failure: the provider's own code, else ``error.type``."""
        return self.error_code or self.error_type


@dataclass(frozen=True)
class Wait:
    """The time between two attempts, or from the last one to an end that came in the wait."""

    start: float
    end: float
    seconds: float
    """The real duration of the wait."""
    planned: float | None
    """The planned duration, shorter than ``seconds`` if a reconnect made the wait longer."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply, or one ``say``, from the call to its outcome. Times are Unix seconds."""

    trace_id: str
    span_id: str
    provider: str
    start: float
    end: float
    attempts: tuple[Attempt, ...] = ()
    attempt_count: int = 0
    """The reply span's count, above ``len(attempts)`` if spans of attempts are missing."""
    model: str | None = None
    server_address: str | None = None
    server_port: int | None = None
    service: str | None = None
    """``service.name`` of the process that ran the agent."""
    outcome: str | None = None
    """None if the reply's span is missing: the process was killed, or the span was sampled out."""
    stop_reason: str | None = None
    error_type: str | None = None
    delay_total: float | None = None
    say: bool = False
    """Whether the request was a ``say`` with a given text, which is never sent again."""

    @property
    def complete(self) -> bool:
        """Whether the outcome of the reply is known."""
        return self.outcome is not None

    @property
    def group(self) -> Group:
        """Group for counting and colour."""
        return GROUP_OF.get(self.outcome or "", "unknown")

    @property
    def seconds(self) -> float:
        """Time from the request to the end of the reply."""
        return max(0.0, self.end - self.start)

    @property
    def retries(self) -> int:
        """Attempts after the first."""
        return max(0, self.attempt_count - 1)

    @property
    def last(self) -> Attempt | None:
        """The last attempt, if its span is stored."""
        if not self.attempts or self.attempts[-1].number < self.attempt_count:
            return None
        return self.attempts[-1]

    @property
    def codes(self) -> tuple[str, ...]:
        """Causes of the failed attempts, in order."""
        return tuple(a.code for a in self.attempts if a.code is not None)

    @property
    def silence_added(self) -> float | None:
        """Seconds of silence that retrying added: all but the last attempt.

        None for a reply of one attempt, and if the stored spans are incomplete.
        """
        if not self.complete or self.retries == 0 or self.last is None:
            return None
        return max(0.0, self.seconds - self.last.seconds)

    @property
    def ended_in_wait(self) -> bool:
        """Whether the reply ended before a planned retry."""
        return self.last is not None and self.last.decision == _RETRY

    @property
    def steps(self) -> tuple[Attempt | Wait, ...]:
        """Attempts and waits, in order of time."""
        steps: list[Attempt | Wait] = []
        before: Attempt | None = None
        for attempt in self.attempts:
            if before is not None and before.number + 1 == attempt.number:
                steps.append(_wait(before, attempt.start, attempt.delay))
            steps.append(attempt)
            before = attempt
        if before is not None and self.complete and self.ended_in_wait:
            waited = sum(a.delay or 0.0 for a in self.attempts)
            rest = None if self.delay_total is None else max(0.0, self.delay_total - waited)
            steps.append(_wait(before, self.end, rest))
        return tuple(s for s in steps if isinstance(s, Attempt) or s.seconds >= _NOTHING)

    def place(self, step: Attempt | Wait) -> tuple[float, float]:
        """Return start and end of ``step`` on the reply's time scale, both from 0.0 to 1.0."""
        if self.seconds == 0:
            return 0.0, 1.0
        begins, ends = ((at - self.start) / self.seconds for at in (step.start, step.end))
        begins = min(1.0, max(0.0, begins))
        return begins, min(1.0, max(begins, ends))


def _wait(before: Attempt, end: float, measured: float | None) -> Wait:
    seconds = max(0.0, end - before.end) if measured is None else measured
    return Wait(before.end, max(before.end, end), seconds, before.next_delay)
