# SPDX-License-Identifier: Apache-2.0
"""``say`` of plugins that speak a given text themselves: traced like a reply, and never sent again.

The response to a ``say`` carries no id of the request, so a text sent twice could be heard twice.

Facts (livekit-plugins-xai, -ultravox, -phonic 1.8.9):

* xAI's plugin gives the id of the oldest ``say`` to the next response without an id, even if that
  answers another request: an order, not an id. A response that comes after its time-out (10 s) is
  cancelled.
* Ultravox's and Phonic's use the single slot of ``generate_reply``. The last request has it, and
  the other's future is cancelled. A response after the time-out (5 and 10 s) is spoken.
* The text may be a stream. With xAI and Ultravox the time-out begins when that has ended.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Final

from traced_retry import semconv
from traced_retry.core.failure import Failure, failure
from traced_retry.core.policy import RetryPolicy
from traced_retry.livekit.adapter import Adapter
from traced_retry.livekit.request import Call, Generation, PassthroughRequest
from traced_retry.livekit.single_slot import SingleSlotAdapter

_NEVER: Final = 86_400.0
"""Seconds, longer than any call."""


def observed(policy: RetryPolicy) -> RetryPolicy:
    """Return ``policy`` without a limit of ours: no deadline, attempt timeout, budget or breaker.

    It is for a text that may be streamed, and for plugins without an adapter.
    """
    return replace(policy, deadline=_NEVER, attempt_timeout=None, budget=None, breaker=None)


class SayRequest(PassthroughRequest):
    """One text to be spoken."""

    def __init__(self, adapter: Adapter, call: Call) -> None:
        super().__init__(call)
        self._adapter = adapter
        self._losses = adapter.connection_losses

    def explain(self, error: BaseException) -> Failure:
        """Classify a failure. xAI's plugin reports a drop at a reconnect only as text."""
        why = super().explain(error)
        if (
            why.kind == "unknown"
            and why.code is None
            and self._adapter.connection_losses > self._losses
        ):
            return failure(error, "connection_lost")
        return why

    def abandon(self, attempt: asyncio.Future[Generation], then: semconv.Action | None) -> None:
        """Abandon the request. If the server cannot be stopped, watch for its late speech."""
        super().abandon(attempt, then)
        if isinstance(self._adapter, SingleSlotAdapter):
            self._adapter.watch_for(self)
