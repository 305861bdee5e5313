# SPDX-License-Identifier: Apache-2.0
"""One attempt of a reply: the record that the loop, the request and the telemetry share."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

from opentelemetry import context as otel_context
from opentelemetry import trace

from traced_retry import semconv
from traced_retry.core.failure import Failure
from traced_retry.core.request import Delivery

T = TypeVar("T")


class Attempt(Generic[T]):
    """One attempt, from its start to its end."""

    __slots__ = (
        "action",
        "began",
        "context",
        "delay",
        "delivery",
        "failure",
        "future",
        "hedge_at",
        "limit",
        "next_action",
        "next_delay",
        "number",
        "result",
        "span",
    )

    def __init__(
        self, number: int, action: semconv.Action, delay: float, began: float, limit: float
    ) -> None:
        self.number = number
        """1 for the first attempt."""
        self.action = action
        self.delay = delay
        """Seconds waited before the attempt."""
        self.began = began
        """Start on the event loop's clock, in seconds."""
        self.limit = limit
        """Time on the event loop's clock when the attempt is given up."""
        self.hedge_at: float | None = None
        """Earliest time on the event loop's clock for a second request."""
        self.future: asyncio.Future[T] | None = None
        self.delivery: Delivery | None = None
        self.result: semconv.Result = "succeeded"
        """The result of the attempt, once it has ended."""
        self.failure: Failure | None = None
        self.next_action: semconv.Action | None = None
        """The action that follows a failed attempt. None if no attempt follows."""
        self.next_delay: float
        """The seconds until that action, set together with it."""
        self.span: trace.Span = trace.INVALID_SPAN
        self.context: otel_context.Context | None = None
        """The context of the attempt's span. None if the reply is not traced."""

    def seconds_to_output(self, now: float) -> float:
        """Return the seconds to the first output, or until ``now`` if no output was heard."""
        delivery = self.delivery
        if delivery is None or delivery.first_output_at is None or delivery.failure is not None:
            return now - self.began
        return delivery.first_output_at - self.began
