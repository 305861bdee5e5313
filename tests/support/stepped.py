# SPDX-License-Identifier: Apache-2.0
"""What the stateful property tests share: an event loop that they step, and how much they try."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import Counter

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from traced_retry import semconv
from traced_retry.testing.clock import VirtualClockLoop

VARIABLE = "TRACED_RETRY_PROPERTY_EXAMPLES"
"""Set to a number, each stateful test tries so many examples instead, and others each time."""


def effort(examples, steps):
    """Settings of one stateful test: the same ``examples`` at each run, of ``steps`` steps each."""
    more = os.environ.get(VARIABLE)
    return settings(
        max_examples=int(more or examples),
        stateful_step_count=steps,
        derandomize=more is None,
        database=None,
        deadline=None,  # the wall clock means nothing here
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


def play(machine, *steps):
    """Take a machine through these ``(name, arguments)``, as Hypothesis would."""
    try:
        for name, arguments in steps:
            getattr(machine, name)(**arguments)
            machine.promise()
            machine.no_hang()
            machine.books()
    finally:
        machine.teardown()


HEARD = ("succeeded", "recovered")
FAILED = ("exhausted", "not_recoverable")
INDEX = st.integers(0, 50)
"""Which of several: taken modulo their number."""


def seen_alike(recorder):
    """What spans and metrics say is the same; returns how often each end and action was met."""
    replies, attempts = recorder.replies, recorder.attempts
    outcomes = Counter(r[semconv.OUTCOME] for r in replies)
    results = Counter(a[semconv.RESULT] for a in attempts)
    assert outcomes == recorder.counted(semconv.METRIC_REPLIES, semconv.OUTCOME)
    assert results == recorder.counted(semconv.METRIC_ATTEMPTS, semconv.RESULT)
    assert len(attempts) == sum(r[semconv.ATTEMPTS] for r in replies)
    assert {} == recorder.counted(semconv.METRIC_IN_FLIGHT)
    stops = Counter(r.get(semconv.STOP_REASON) for r in replies)
    return outcomes + stops + Counter(a[semconv.ACTION] for a in attempts)


class SteppedLoop:
    """A virtual event loop that stands still until it is told to go on."""

    def __init__(self):
        self.loop = VirtualClockLoop()
        self.errors = []
        """What reached the loop's exception handler: nothing should."""
        self.loop.set_exception_handler(lambda _, context: self.errors.append(context))

    @property
    def now(self):
        """The virtual time, seconds."""
        return self.loop.time()

    @contextlib.contextmanager
    def standing(self):
        """What is called inside runs between two turns of the loop, as if in one of its callbacks.

        Nothing scheduled by it runs before the loop goes on.
        """
        asyncio._set_running_loop(self.loop)
        try:
            yield
        finally:
            asyncio._set_running_loop(None)

    def turn(self):
        """One turn: what is scheduled for now."""
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()

    def wait(self, seconds):
        """Let so much time pass."""
        self.loop.call_later(seconds, self.loop.stop)
        self.loop.run_forever()

    def go_on(self, then):
        """Nothing (None), a ``"turn"``, or so many seconds."""
        if then == "turn":
            self.turn()
        elif then is not None:
            self.wait(then)

    def run(self, coroutine):
        """Run ``coroutine`` to its end."""
        return self.loop.run_until_complete(coroutine)

    def tasks(self):
        """The tasks that are not done."""
        return asyncio.all_tasks(self.loop)

    def close(self):
        """Close the loop."""
        self.loop.close()


class Errors(logging.Handler):
    """The records of level ERROR under our name: what the guard swallowed. No others are made."""

    def __init__(self):
        super().__init__()
        self.messages = []
        self._logger = logging.getLogger(semconv.SCOPE)
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)
        self._logger.addHandler(self)

    def emit(self, record):
        """Keep it."""
        self.messages.append(record.getMessage())

    def close(self):
        """Stop listening."""
        self._logger.removeHandler(self)
        self._logger.setLevel(self._level)
        super().close()
