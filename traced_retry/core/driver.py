# SPDX-License-Identifier: Apache-2.0
"""Run a generator that yields the time until which it waits.

The generator is resumed in the very call that changes something: a timer, a future's callback or an
event handler. A task would need several turns of the event loop for each of these, and in those
turns LiveKit closes a session before the agent learns why its reply failed. A task that is
cancelled before its first step also skips its clean-up, and a generator does not.
"""

from __future__ import annotations

import asyncio
import contextvars
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator

Steps = Iterator[float | None]
"""Yields the event loop's time until which it can sleep, or None to sleep until it is woken."""


class Driver(ABC):
    """Runs the generator that :meth:`_run` returns.

    The generator is resumed at the time that it yields, and whenever :meth:`_resume` is called.
    This is a base class rather than an object of its own, because one driver runs per reply and the
    two would refer to each other.
    """

    __slots__ = ("_again", "_context", "_loop", "_running", "_steps", "_timer")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._steps: Steps | None = None
        self._timer: weakref.ref[asyncio.TimerHandle] | None = None
        self._context: contextvars.Context | None = None
        self._again = False
        self._running = False
        """Whether a step runs now."""

    @abstractmethod
    def _run(self) -> Steps:
        """Return the generator to run, or an empty iterator if there is no step to wait for."""

    @abstractmethod
    def _on_timer(self) -> None:
        """Resume the generator, because the time that it yielded has come."""

    @abstractmethod
    def _on_loop_closed(self) -> None:
        """Clean up, because the event loop was closed while the generator slept."""

    @abstractmethod
    def _on_error(self, error: BaseException) -> None:
        """Handle an exception that escapes from the generator.

        An exception that is not an ``Exception``, such as ``KeyboardInterrupt``, is raised again
        afterwards.
        """

    def _step(self) -> None:
        """Run until the generator sleeps, and set a timer for the time that it yields."""
        self._running = True
        try:
            if self._steps is None:
                self._steps = self._run()
            for when in self._steps:  # noqa: B007 - used after the loop
                if not self._again:
                    break
                self._again = False
            else:
                return
        except BaseException as error:
            self._on_error(error)
            if not isinstance(error, Exception):
                raise
        else:
            self._sleep_until(when)
        finally:
            self._running = False

    def _resume(self) -> None:
        """Run the next step now, or directly after the step that runs now.

        Do nothing before the first step has ended.
        """
        if self._running:
            self._again = True
        elif self._context is not None:
            self._context.run(self._step)

    def _cancel_timer(self) -> None:
        timer = None if self._timer is None else self._timer()
        if timer is not None:
            timer.cancel()

    def _sleep_until(self, when: float | None) -> None:
        if self._context is None:
            # Later steps run in timers and in the plugin's tasks. The code that they call must see
            # the context variables of the code that asked for the reply.
            self._context = contextvars.copy_context()
        self._cancel_timer()
        if when is not None:
            self._timer = weakref.ref(self._loop.call_at(when, _Alarm(self)))


class _Alarm:
    """The callback of a driver's timer.

    Only the event loop refers to it. A loop that is closed discards its timers without a notice, so
    the end of this object is the notice.
    """

    __slots__ = ("_driver",)

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def __call__(self) -> None:
        self._driver._on_timer()

    def __del__(self) -> None:
        if self._driver._loop.is_closed():
            self._driver._on_loop_closed()
