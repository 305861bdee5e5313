# SPDX-License-Identifier: Apache-2.0
"""The number of retries that a process may send: :class:`RetryBudget`.

If a provider fails every request, an agent that retries three times sends four requests per reply,
which makes an outage worse. A budget retries the first replies of an outage in full, and later ones
only at a share of the replies. The first request of each reply is always sent.
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
"""Retries at once. Three replies in a row may fail three times each: a failure of half a
minute in one call has no effect."""
PER_REPLY: Final = 0.1
"""Earned by each reply: in a long outage, requests are at most 1.1 times the replies. The
share of gRPC's retry throttling and of Envoy's and Finagle's budgets is 0.1 to 0.2."""
PER_SECOND: Final = 1 / 30
"""Earned by time alone: one call requests a reply every few seconds, and a share of so few replies
would not fill the bucket. Time fills it in five minutes."""


class RetryBudget:
    """A bucket of tokens per provider. Each retry that sends a request takes one.

    A ``listen`` sends no request and takes no token. If the bucket is empty, the reply fails at
    once with stop reason ``budget``. Share one object to share its buckets, as the default of
    :class:`RetryPolicy` does for the whole process. The object is thread-safe.

    Args:
        capacity: tokens in a full bucket. Each bucket starts full.
        per_reply: tokens earned by each reply.
        per_second: tokens earned by time.

    Raises:
        ValueError: if a value is not a finite number, if the capacity is below 1 (use
            ``max_retries=0`` to never retry), or if another value is below 0.
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
        """Create the bucket of ``provider``, so that the gauge shows it before the first retry."""
        with self._lock:
            self._bucket(provider, clock)

    def earn(self, provider: str, clock: Clock) -> None:
        """Add the tokens that a reply of ``provider`` earns."""
        full = self._buckets.get(provider)
        if full is not None and full.tokens >= self.capacity:
            return
        with self._lock:
            bucket = self._bucket(provider, clock)
            if bucket.tokens < self.capacity:
                bucket.tokens = min(self.capacity, bucket.tokens + self.per_reply)

    def spend(self, provider: str, clock: Clock) -> bool:
        """Take a token for a retry. Return False if the bucket is empty."""
        with self._lock:
            bucket = self._bucket(provider, clock)
            if bucket.tokens < 1:
                return False
            bucket.tokens -= 1
            return True

    def remaining(self) -> dict[str, float]:
        """Return the tokens left now, per provider."""
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
            bucket = self._buckets[provider] = _Bucket(self.capacity)
        elif bucket.tokens < self.capacity and now > bucket.at:
            earned = (now - bucket.at) * self.per_second
            bucket.tokens = min(self.capacity, bucket.tokens + earned)
        bucket.at, bucket.clock = now, clock
        return bucket


class _Bucket:
    __slots__ = ("at", "clock", "tokens")

    at: float
    """The time when :attr:`tokens` was up to date."""
    clock: Clock
    """The clock of the event loop that was last used. An exporter's thread reads the gauge."""

    def __init__(self, tokens: float) -> None:
        self.tokens = tokens


_live: weakref.WeakSet[RetryBudget] = weakref.WeakSet()


def _after_fork() -> None:
    """Replace the locks in the child, because a thread of the parent may have held one."""
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
    """Yield each provider and the tokens of its smallest bucket in this process."""
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
