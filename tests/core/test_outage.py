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


def test_outage_causes_at_most_1_2_requests_per_reply(default):
    """The default budget limits an outage to 1.2 requests for each reply."""
    assert 10_000 == default.replies
    assert default.requests <= 1.2 * default.replies


def test_outage_without_budget_causes_four_requests_per_reply():
    """Without a budget an outage causes nearly four requests for each reply."""
    storm = live_through(None, replies=1_000)

    assert storm.requests > 3.5 * storm.replies


def test_budget_recovers_within_one_refill(default):
    """Short failures after the outage are retried once the budget has refilled."""
    budget = RetryBudget()

    assert default.refilled <= budget.capacity / budget.per_second
    assert default.blips > 300
    assert default.recovered > 0.99 * default.blips


def test_single_call_has_retries_of_capacity_and_time():
    """A process with one call has its first ten retries and those that time earns."""
    told = live_through(RetryBudget(), replies=100)

    assert 110 <= told.requests <= 100 + 10 + 0.1 * 100 + 600 / 30
