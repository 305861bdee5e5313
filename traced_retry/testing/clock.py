# SPDX-License-Identifier: Apache-2.0
"""An event loop with a clock that jumps instead of waiting.

Real sockets on 127.0.0.1 work on the loop: bytes that one end wrote are readable at the other end
at once. So the loop looks for readable sockets first, and its clock jumps to the next timer only if
no socket is readable. The loop waits for work in its executor. Ten seconds of silence thus take no
time, and durations are exact.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

T = TypeVar("T")

_PACKET: Final = 0.0005
"""Real seconds to wait for a packet before each jump."""
_THREAD: Final = 0.05
"""Real seconds between two looks for the end of a thread's work."""
_LOOK: Final = 0.005
"""Real seconds between two looks at the threads of others."""


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the virtual clock, as ``asyncio.run`` does on the real one."""
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(coroutine)


class _JumpingSelector(selectors.DefaultSelector):
    """A selector that makes the clock jump to the next timer instead of sleeping until then."""

    loop: VirtualClockLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return super().select(0)
        if self.loop.patience and (events := self._rest()):
            return events
        # A jump must overtake neither a packet nor a thread at work.
        while events := super().select(_PACKET if self.loop.sockets else 0):
            return events
        if self.loop.threads or timeout is None:
            return super().select(_THREAD)
        self.loop.now += timeout
        return []

    def _rest(self) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for as long as the loop's patience without an event or a thread at work."""
        rested = 0.0
        while rested < self.loop.patience:
            if events := super().select(_LOOK):
                return events
            rested = 0.0 if _others_at_work() else rested + _LOOK
        return []


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop with a virtual clock, which starts at 0."""

    def __init__(self) -> None:
        selector = _JumpingSelector()
        selector.loop = self
        self.now = 0.0
        self.threads = 0
        self.patience = 0.0
        """Real seconds of rest before each jump, for clients that do their IO in threads."""
        super().__init__(selector)

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self.now

    @property
    def sockets(self) -> bool:
        """Whether anything but the loop's own wake-up pipe is open."""
        return len(self._selector.get_map()) > 1  # type: ignore[attr-defined]

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Count the work in progress, and wait for it."""
        future = super().run_in_executor(executor, func, *args)
        self.threads += 1
        future.add_done_callback(self._thread_done)
        return future

    def _thread_done(self, _: object) -> None:
        self.threads -= 1

    async def shutdown_default_executor(self, *args: Any, **kwargs: Any) -> None:
        """Count the thread that joins the executor: since Python 3.13 a timer limits it."""
        self.threads += 1
        try:
            await super().shutdown_default_executor(*args, **kwargs)
        finally:
            self.threads -= 1


def _others_at_work() -> bool:
    """Return whether another thread of this process is running. On other systems than Linux: no."""
    me = str(threading.get_native_id())
    for stat in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            if stat.parent.name != me and stat.read_text().rpartition(")")[2].split()[0] in "RD":
                return True
    return False
