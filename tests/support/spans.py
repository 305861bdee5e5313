# SPDX-License-Identifier: Apache-2.0
"""What a child process of a test does."""

from __future__ import annotations

from opentelemetry import trace

import traced_retry


def child(number: int) -> None:
    """Enable, and make one span."""
    traced_retry.enable()
    trace.get_tracer("t").start_span(f"child {number}").end()
