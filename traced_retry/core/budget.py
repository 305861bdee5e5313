# SPDX-License-Identifier: Apache-2.0
"""How many retries a process may send: :class:`RetryBudget`, so that an outage is not made worse.

A provider that fails every request gets four for each reply from an agent that retries three
times, when it can bear that least. A budget lets the first replies of an outage be retried in full
and then only as many as a share of what is asked anyway; each reply is still asked once.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Final

from traced_retry.core.failure import finite
from traced_retry.core.sanitize import shown

Clock = Callable[[], float]
"""Seconds, from any zero, never going back."""

CAPACITY: Final = 10.0
"""Retries at once. Three replies in a row may fail three times each: a blip of half a minute in
one call passes unnoticed."""
PER_REPLY: Final = 0.1
"""Earned by each reply: in an outage that lasts, requests are at most 1.1 times the replies. The
share of gRPC's retry throttling and of Envoy's and Finagle's budgets is 0.1 to 0.2."""
PER_SECOND: Final = 1 / 30
"""Earned by time alone: one call is asked something every few seconds, and a share of so little
would never come back. A full bucket in five minutes."""


class RetryBudget:
    """A bucket of tokens per provider. Each retry that sends a request takes one.

    To listen on sends nothing, and takes none. Where no token is left the reply fails at once, with
    stop reason ``budget``. Share one object to share its buckets; :class:`RetryPolicy` does so with
    its default, for the whole process. Safe to use from several threads.

    Args:
        capacity: tokens in a full bucket; each begins full.
        per_reply: tokens earned by each reply that is asked.
        per_second: tokens earned by time.

    Raises:
        ValueError: a value that is no finite number, a capacity below 1 (use ``max_retries=0`` to
            never retry), or another value below 0.
    """

    def __init__(
        self,
        capacity: float = CAPACITY,
        *,
        per_reply: float = PER_REPLY,
        per_second: float = PER_SECOND,
    ) -> None:
        for name, value, least in (
            ("capacity", capacity, 1),
            ("per_reply", per_reply, 0),
            ("per_second", per_second, 0),
        ):
            number = finite(value)
            if number is None or number < least:
                raise ValueError(
                    f"{name} is {shown(value)}; it must be a finite number >= {least}."
                )
        self.capacity = float(capacity)
        self.per_reply = float(per_reply)
        self.per_second = float(per_second)
        self._lock = threading.Lock()
        self._buckets: dict[str, _Bucket] = {}
        _live.add(self)

    def open(self, provider: str, clock: Clock) -> None:
        """Have a bucket for ``provider``, so that it is seen before it is needed."""
        with self._lock:
            self._bucket(provider, clock)

    def earn(self, provider: str, clock: Clock) -> None:
        """A reply is asked of ``provider``."""
        with self._lock:
            bucket = self._bucket(provider, clock)
            if bucket.tokens < self.capacity:
                bucket.tokens = min(self.capacity, bucket.tokens + self.per_reply)

    def spend(self, provider: str, clock: Clock) -> bool:
        """Take a token for a retry; False where none is left."""
        with self._lock:
            bucket = self._bucket(provider, clock)
            if bucket.tokens < 1:
                return False
            bucket.tokens -= 1
            return True

    def remaining(self) -> dict[str, float]:
        """Tokens left by now, per provider."""
        with self._lock:
            return {
                provider: self._bucket(provider, bucket.clock).tokens
                for provider, bucket in self._buckets.items()
            }

    def __copy__(self) -> RetryBudget:
        """Return the budget itself. A copied policy shares the buckets of the original."""
        return self

    def __deepcopy__(self, _memo: object) -> RetryBudget:
        """Return the budget itself, as :func:`copy.copy` does."""
        return self

    def __reduce__(self) -> tuple[Callable[..., RetryBudget], tuple[float, ...]]:
        """Pickle the arguments. Another process has full buckets of its own."""
        if self is _process_budgets.get(self.capacity):
            return process_budget, (self.capacity,)
        return _make_budget, (self.capacity, self.per_reply, self.per_second)

    def _bucket(self, provider: str, clock: Clock) -> _Bucket:
        now = clock()
        bucket = self._buckets.get(provider)
        if bucket is None:
            bucket = self._buckets[provider] = _Bucket(self.capacity, now, clock)
        elif bucket.tokens < self.capacity and now > bucket.at:
            earned = (now - bucket.at) * self.per_second
            bucket.tokens = min(self.capacity, bucket.tokens + earned)
        bucket.at, bucket.clock = now, clock
        return bucket


class _Bucket:
    __slots__ = ("at", "clock", "tokens")

    def __init__(self, tokens: float, at: float, clock: Clock) -> None:
        self.tokens = tokens
        self.at = at
        self.clock = clock
        """Of the event loop that asked last: the gauge is read in an exporter's thread."""


_live: weakref.WeakSet[RetryBudget] = weakref.WeakSet()


def _after_fork() -> None:
    """In the child: an exporter's thread, which did not come along, may have held a lock."""
    for budget in list(_live):
        budget._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def refill() -> None:
    """Fill every bucket of this process, so that a test does not pay for the tests before it."""
    for budget in list(_live):
        with budget._lock:
            budget._buckets.clear()


def remaining() -> Iterator[tuple[str, float]]:
    """Each provider with what is left of its smallest bucket in this process."""
    least: dict[str, float] = {}
    for budget in list(_live):
        for provider, tokens in budget.remaining().items():
            least[provider] = min(tokens, least.get(provider, tokens))
    yield from least.items()


def _make_budget(capacity: float, per_reply: float, per_second: float) -> RetryBudget:
    return RetryBudget(capacity, per_reply=per_reply, per_second=per_second)


_process_budgets: dict[float, RetryBudget] = {}


def process_budget(capacity: float = CAPACITY) -> RetryBudget:
    """Return the budget that policies of this process share, unless they bring their own.

    Raises:
        ValueError: if ``capacity`` is not a finite number of at least 1.
    """
    budget = _process_budgets.get(capacity)
    if budget is None:
        # Two threads may create one at once. Both then get the first.
        budget = _process_budgets.setdefault(capacity, RetryBudget(capacity))
    return budget
