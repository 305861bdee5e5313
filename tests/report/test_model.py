# SPDX-License-Identifier: Apache-2.0
"""Replies as plain data: the waterfall's steps and the numbers behind it."""

from __future__ import annotations

import pytest

from traced_retry import semconv
from traced_retry.report import Attempt, Reply, Wait
from traced_retry.report.model import GROUP_OF


def reply(*attempts, seconds=10.0, **more):
    """A reply of these attempts, begun at 0.0."""
    more = {"outcome": "recovered", "attempt_count": len(attempts), **more}
    return Reply("t", "s", "openai", 0.0, seconds, attempts, **more)


def test_each_outcome_has_a_group():
    """A new outcome cannot be forgotten."""
    assert set(semconv.OUTCOMES) == set(GROUP_OF)
    assert "unknown" == reply(outcome="from_the_future").group


def test_steps_have_the_waits_between():
    """A wait is what was really waited; the plan is kept beside it."""
    first = Attempt(1, 0.0, 2.0, decision="retry", next_delay=1.0)
    second = Attempt(2, 5.0, 10.0, delay=3.0, result="succeeded")

    assert (first, Wait(2.0, 5.0, 3.0, 1.0), second) == reply(first, second).steps


def test_a_wait_of_nothing_is_no_step():
    """Listening on follows at once."""
    first = Attempt(1, 0.0, 5.0, decision="retry")
    second = Attempt(2, 5.0, 10.0, action="listen", delay=0.0)

    assert (first, second) == reply(first, second).steps


def test_a_wait_cut_short_is_the_last_step():
    """Interrupted in the wait: what was waited until then."""
    first = Attempt(1, 0.0, 8.0, decision="retry", next_delay=5.0)

    cut = reply(first, outcome="interrupted", delay_total=2.0)

    assert cut.ended_in_wait
    assert (first, Wait(8.0, 10.0, 2.0, 5.0)) == cut.steps


def test_a_missing_attempt_leaves_a_gap():
    """What is between attempts 1 and 3 is not taken for a wait."""
    first, third = Attempt(1, 0.0, 1.0, decision="retry"), Attempt(3, 6.0, 10.0, delay=1.0)

    assert (first, third) == reply(first, third, attempt_count=3).steps


@pytest.mark.parametrize(
    ("step", "place"),
    [
        (Attempt(1, 0.0, 2.5), (0.0, 0.25)),
        (Attempt(1, 5.0, 10.0), (0.5, 1.0)),
        (Attempt(1, -5.0, 99.0), (0.0, 1.0)),  # clocks that disagree
        (Attempt(1, 9.0, 3.0), (0.9, 0.9)),
    ],
)
def test_place(step, place):
    """From 0 to 1 on the reply's time scale, whatever the clocks say."""
    assert place == reply(step).place(step)


def test_place_in_no_time():
    """A reply that took no time is one full bar."""
    only = Attempt(1, 0.0, 0.0)

    assert (0.0, 1.0) == reply(only, seconds=0.0).place(only)


def test_silence_added():
    """All but the last attempt, of replies that took more than one."""
    first, second = Attempt(1, 0.0, 1.0, decision="retry"), Attempt(2, 4.0, 10.0)

    assert 4.0 == reply(first, second).silence_added
    assert None is reply(first).silence_added
    assert None is reply(first, second, outcome=None).silence_added
    assert None is reply(first, attempt_count=2).silence_added
