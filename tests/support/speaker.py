# SPDX-License-Identifier: Apache-2.0
"""An audio output that plays each frame for as long as it lasts, on the event loop's clock."""

from __future__ import annotations

import asyncio
import time

from livekit.agents.voice.io import AudioOutput, AudioOutputCapabilities


class Speaker(AudioOutput):
    """A speaker that behaves like LiveKit's room output.

    Args:
        sample_rate: the rate of the frames that it accepts, or None for any.
        confirms_after: seconds from ``clear_buffer`` to the report that the segment is over.
        accepts_after: seconds that each frame takes to be accepted.
    """

    def __init__(self, sample_rate=24_000, *, confirms_after=0.0, accepts_after=0.0):
        super().__init__(
            label="speaker",
            capabilities=AudioOutputCapabilities(pause=True),
            sample_rate=sample_rate,
        )
        self.heard = []
        """Start, end and data of each frame that was played, in order."""
        self.mistakes = []
        """Calls that make LiveKit's room output lose audio."""
        self._confirms_after = confirms_after
        self._accepts_after = accepts_after
        self._queue = []
        self._flushed = False
        self._seconds = 0.0
        self._timer = None
        self._clearing = False

    @property
    def fillers(self):
        """Start and end of each frame that is not silence, and so is not of a simulator."""
        return [(start, end) for start, end, data in self.heard if any(data)]

    @property
    def replies(self):
        """Start and end of each frame of a simulator."""
        return [(start, end) for start, end, data in self.heard if not any(data)]

    async def capture_frame(self, frame):
        if self._accepts_after:
            await asyncio.sleep(self._accepts_after)
        await super().capture_frame(frame)
        if self._flushed:
            self.mistakes.append("captured while a segment ends")
        if self.sample_rate not in (None, frame.sample_rate):
            self.mistakes.append("captured at another rate")
        self._queue.append(frame)
        if self._timer is None:
            self.on_playback_started(created_at=time.time())
            self._play()

    def flush(self):
        super().flush()
        self._flushed = self._timer is not None or bool(self._queue)

    def clear_buffer(self):
        if self._timer is None or self._clearing:
            return
        if not self._flushed:
            self.mistakes.append("cleared before flush")
        self._timer.cancel()
        start, _, data = self.heard.pop()
        now = self._now()
        self._seconds += now - start
        if now > start:
            self.heard.append((start, now, data))
        self._queue.clear()
        self._clearing = True
        asyncio.get_running_loop().call_later(self._confirms_after, self._end, True)

    def _play(self):
        frame = self._queue.pop(0)
        start = self._now()
        self.heard.append((start, start + frame.duration, bytes(frame.data)))
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(frame.duration, self._on_played, frame.duration)

    def _on_played(self, seconds):
        self._seconds += seconds
        if self._queue:
            self._play()
        elif self._flushed:
            self._end(False)
        else:  # The output waits for the next frame.
            self._timer = asyncio.get_running_loop().call_later(0.001, self._on_played, 0.0)

    def _end(self, interrupted):
        seconds, self._seconds = self._seconds, 0.0
        self._timer, self._flushed, self._clearing = None, False, False
        self.on_playback_finished(playback_position=seconds, interrupted=interrupted)

    @staticmethod
    def _now():
        return asyncio.get_running_loop().time()
