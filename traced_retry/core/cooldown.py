# SPDX-License-Identifier: Apache-2.0
"""A session's cooldown: the time until which its provider wants no request."""

from __future__ import annotations

import math

from traced_retry.core.failure import Failure


class SessionCooldown:
    """The last ``retry_after`` of a session's provider, shared by the replies of that session."""

    until = -math.inf
    """The event loop's time in seconds."""
    failure: Failure | None = None
    """The failure that asked for the wait."""

    def update(self, failure: Failure, now: float) -> None:
        """Extend the cooldown if ``failure`` asks for a later time than the current one."""
        if failure.wait and now + failure.wait > self.until:
            self.until, self.failure = now + failure.wait, failure
