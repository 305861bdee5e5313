# SPDX-License-Identifier: Apache-2.0
"""An event loop whose clock jumps instead of waiting.

Real sockets on 127.0.0.1 work on it: what one end wrote is readable at the other at once, so the
loop first looks whether anything is to be read, and only when nothing is does the clock jump to
the next timer. Work in threads is waited for. So ten seconds of silence take no time, and
durations come out exact.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import threading
from pathlib import Path


class _JumpingSelector(selectors.DefaultSelector):
    """Where the loop would sleep until its next timer, the clock jumps there."""

    loop: VirtualClockLoop

    def select(self, timeout=None):
        if timeout is not None and timeout <= 0:
            return super().select(0)
        if self.loop.patience and (events := self._rest()):
            return events
        # A jump must not overtake a packet, nor a thread that is at work.
        while events := super().select(0.0005 if self.loop.sockets else 0):
            return events
        if self.loop.threads or timeout is None:
            return super().select(0.05)
        self.loop.now += timeout
        return []

    def _rest(self):
        """Wait for as long as the loop's patience without an event or a thread at work."""
        rested = 0.0
        while rested < self.loop.patience:
            if events := super().select(0.005):
                return events
            rested = 0.0 if _others_at_work() else rested + 0.005
        return []


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """See the module."""

    def __init__(self):
        selector = _JumpingSelector()
        selector.loop = self
        self.now = 0.0
        self.threads = 0
        self.patience = 0.0
        """Real seconds of rest before each jump; for clients that do their IO in own threads."""
        super().__init__(selector)

    def time(self):
        return self.now

    @property
    def sockets(self):
        """Whether anything but the loop's own wake-up pipe is open."""
        return len(self._selector.get_map()) > 1

    def run_in_executor(self, executor, func, *args):
        future = super().run_in_executor(executor, func, *args)
        self.threads += 1
        future.add_done_callback(self._thread_done)
        return future

    def _thread_done(self, _):
        self.threads -= 1

    async def shutdown_default_executor(self, *args, **kwargs):
        """Count the thread that joins the executor: since Python 3.13 a timer limits it."""
        self.threads += 1
        try:
            await super().shutdown_default_executor(*args, **kwargs)
        finally:
            self.threads -= 1


def _others_at_work():
    """Whether a thread of this process but the calling one is running (Linux; elsewhere: no)."""
    me = str(threading.get_native_id())
    for stat in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            if stat.parent.name != me and stat.read_text().rpartition(")")[2].split()[0] in "RD":
                return True
    return False
