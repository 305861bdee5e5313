# SPDX-License-Identifier: Apache-2.0
"""Ten minutes of outage at 10,000 replies: the budget's promise. `make bench` prints."""

from __future__ import annotations

import pytest
from support.outage import live_through

from traced_retry import RetryBudget


@pytest.fixture(scope="module")
def default():
    """With the default budget."""
    return live_through(RetryBudget())


def test_requests_stay_near_the_replies(default):
    """At most 1.2 requests for each reply."""
    assert 10_000 == default.replies
    assert default.requests <= 1.2 * default.replies


def test_without_a_budget():
    """Nearly four."""
    storm = live_through(None, replies=1_000)

    assert storm.requests > 3.5 * storm.replies


def test_it_recovers_within_one_refill(default):
    """Retries are there again when the provider is: blips after the outage are retried."""
    budget = RetryBudget()

    assert default.refilled <= budget.capacity / budget.per_second
    assert default.blips > 300
    assert default.recovered > 0.99 * default.blips


def test_a_single_call():
    """A process that serves one call has few replies to earn from: its ten, and what time earns."""
    told = live_through(RetryBudget(), replies=100)

    assert 110 <= told.requests <= 100 + 10 + 0.1 * 100 + 600 / 30
