# SPDX-License-Identifier: Apache-2.0
"""Run a generator that yields the time until which it has nothing to do.

The generator is resumed in the very call that changes something: a timer, a future's callback or an
event handler. A task would need several turns of the event loop for each of these, and in those
turns LiveKit closes a session before the agent learns why its reply failed. A task that is
cancelled before its first step also skips its clean-up, and a generator does not.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Generator

Steps = Generator["float | None", None, None]
"""Yields the event loop's time until which it can sleep, or None to sleep until it is woken."""


class Driver:
    """Resumes ``steps`` at the time that they yield, and whenever :meth:`wake` is called.

    Args:
        steps: the generator to run.
        on_timer: called at the yielded time. It should end in :meth:`wake`.
        on_error: called with an exception that escapes from ``steps``. An exception that is not an
            ``Exception``, such as ``KeyboardInterrupt``, is raised again afterwards.
    """

    __slots__ = (
        "_again",
        "_context",
        "_loop",
        "_on_error",
        "_on_timer",
        "_steps",
        "_timer",
        "running",
    )

    def __init__(
        self,
        steps: Steps,
        on_timer: Callable[[], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._steps = steps
        self._on_timer = on_timer
        self._on_error = on_error
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._context: contextvars.Context | None = None
        self._again = False
        self.running = False
        """Whether a step runs now."""

    def step(self) -> None:
        """Run until the generator sleeps, and set a timer for the time that it yields."""
        self.running = True
        try:
            when = next(self._steps)
            while self._again:
                self._again = False
                when = next(self._steps)
        except StopIteration:
            pass
        except BaseException as error:
            self._on_error(error)
            if not isinstance(error, Exception):
                raise
        else:
            self._sleep_until(when)
        finally:
            self.running = False

    def wake(self) -> None:
        """Run the next step now, or directly after the step that runs now.

        Do nothing before the first step has ended.
        """
        if self.running:
            self._again = True
        elif self._context is not None:
            self._context.run(self.step)

    def stop(self) -> None:
        """Cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _sleep_until(self, when: float | None) -> None:
        if self._context is None:
            # Later steps run in timers and in the plugin's tasks. The code that they call must see
            # the context variables of the code that asked for the reply.
            self._context = contextvars.copy_context()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if when is None else self._loop.call_at(when, self._on_timer)
