# SPDX-License-Identifier: Apache-2.0
"""Record attempts without a loop."""

from __future__ import annotations

from traced_retry.core.attempt import Attempt


def record_attempt(trace, result, seconds, failure=None, *, action="send"):
    """Start and end the first attempt of a reply."""
    attempt = Attempt(1, action, 0.0, 0.0, seconds)
    trace.attempt_began(attempt)
    attempt.result, attempt.failure = result, failure
    trace.attempt_ended(attempt, seconds)
