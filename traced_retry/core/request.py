# SPDX-License-Identifier: Apache-2.0
"""What the loop asks of whatever it repeats: :class:`Request`. An adapter implements it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from traced_retry import semconv
from traced_retry.core.failure import Failure

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
        self.first_output: tuple[float, int] | None = None
        """When the first word came: the loop's seconds, and Unix nanoseconds."""
        self.last_activity: float | None = None
        """When the provider last sent anything of it, in the loop's seconds; None: not told."""
        self.ended = False
        self.failure: Failure | None = None
        self.cancelled = False
        """Whether it ended unheard because somebody cancelled it."""
        self.on_end: Callable[[], None] = lambda: None

    @property
    def failed_before_output(self) -> bool:
        """Whether it failed before its first word."""
        return self.failure is not None and self.first_output is None

    def mark_output(self) -> None:
        """Something was said, or a tool called."""
        if self.first_output is None:
            self.first_output = (asyncio.get_running_loop().time(), time.time_ns())

    def mark_activity(self) -> None:
        """The provider sent something of it. Whoever tells of one tells of all."""
        self.last_activity = asyncio.get_running_loop().time()

    def end(self, failure: Failure | None = None, *, cancelled: bool = False) -> None:
        """The provider is done: with a ``failure``, because it was ``cancelled``, or well."""
        if self.ended:
            return
        self.ended = True
        self.failure = failure
        self.cancelled = cancelled and self.first_output is None
        self.on_end()
