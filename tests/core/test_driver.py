# SPDX-License-Identifier: Apache-2.0
"""The driver of a generator that sleeps, without a reply."""

from __future__ import annotations

import asyncio
import contextvars

import pytest

from traced_retry.core.driver import Driver

WORD = contextvars.ContextVar("word", default="none")


class Sleeper(Driver):
    """A generator that sleeps as given, and notes when it runs and in which context."""

    def __init__(self, *sleeps):
        super().__init__()
        self.sleeps = sleeps
        self.times = []
        self.words = []
        self.errors = []

    def _run(self):
        for sleep in self.sleeps:
            self.times.append(self._loop.time())
            self.words.append(WORD.get())
            if isinstance(sleep, BaseException):
                raise sleep
            yield sleep
        self.times.append(self._loop.time())

    def _on_timer(self):
        self._resume()

    def _on_loop_closed(self):
        raise AssertionError

    def _on_error(self, error):
        self.errors.append(error)


async def test_generator_is_resumed_at_its_times():
    """Each yielded time is a timer, also one that has passed."""
    sleeper = Sleeper(1.0, 3.5, 3.0)
    sleeper._step()
    await asyncio.sleep(5)

    assert [0, 1.0, 3.5, 3.5] == sleeper.times


async def test_sleep_without_time_ends_with_resume():
    """None sets no timer, and an earlier timer does not remain."""
    sleeper = Sleeper(2.0, None, 9.0)
    sleeper._step()
    await asyncio.sleep(1)
    sleeper._resume()
    await asyncio.sleep(6)
    assert [0, 1.0] == sleeper.times
    sleeper._resume()
    await asyncio.sleep(5)

    assert [0, 1.0, 7.0, 9.0] == sleeper.times


async def test_resume_before_first_step_does_nothing():
    """The first step belongs to the call that starts the reply."""
    sleeper = Sleeper(2.0)
    sleeper._resume()

    assert [] == sleeper.times


async def test_later_steps_run_in_first_context():
    """Timers and other tasks see the context variables of the code that asked for the reply."""
    sleeper = Sleeper(1.0, None, None)
    WORD.set("asked")
    sleeper._step()
    WORD.set("other")
    await asyncio.sleep(2)
    contextvars.Context().run(sleeper._resume)

    assert ["asked"] * 3 == sleeper.words


async def test_cancelled_timer_does_not_fire():
    """The end of a reply leaves no timer."""
    sleeper = Sleeper(1.0)
    sleeper._step()
    sleeper._cancel_timer()
    await asyncio.sleep(2)

    assert [0] == sleeper.times


@pytest.mark.parametrize(
    ("error", "raised"), [(ValueError(), False), (KeyboardInterrupt(), True), (SystemExit(), True)]
)
async def test_error_of_generator_is_handled(error, raised):
    """The handler gets each exception, and only the end of a program is raised again."""
    sleeper = Sleeper(None, error)
    sleeper._step()
    if raised:
        with pytest.raises(type(error)):
            sleeper._resume()
    else:
        sleeper._resume()

    assert [error] == sleeper.errors
    assert not sleeper._running


async def test_resume_in_a_step_runs_one_more_step():
    """A step that resumes its own generator does not run inside of itself."""

    class Restless(Sleeper):
        def _run(self):
            for number in range(3):
                self.times.append(number)
                if number == 0:
                    self._resume()
                yield None

    sleeper = Restless()
    sleeper._step()

    assert [0, 1] == sleeper.times
