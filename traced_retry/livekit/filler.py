# SPDX-License-Identifier: Apache-2.0
"""A sound for a caller who waits for a reply: :class:`Filler`, a callback for ``on_waiting``.

``AgentSession.say()`` queues behind the pending reply and enters the history. The filler is
therefore played by an output below the transcript synchronizer and the recorder, which hides the
filler from the outputs above.

Facts (livekit-agents 1.7.0 to 1.8.9):

* ``AgentOutput.replace_audio_tail`` replaces the last output of a chain and cuts the audio that is
  being played. An output without a wrapper is replaced itself, and a reply whose generation has
  started keeps the old one. Avatars call this method at any time.
* ``AudioOutput`` forwards the events of ``next_in_chain`` to its own ``on_playback_*`` methods.
* LiveKit's room output swallows the next reply if ``clear_buffer`` is called before ``flush``.
* LiveKit does not call ``clear_buffer`` for a reply that is interrupted before its first frame.
* LiveKit waits for the end of each segment that was captured, without a limit.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import math
import os
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, Final

from livekit import rtc
from livekit.agents import AgentSession, UserStateChangedEvent, tts
from livekit.agents.utils.audio import audio_frames_from_file
from livekit.agents.voice.io import AudioOutput, AudioOutputCapabilities

from traced_retry.core.guard import suppress_and_log
from traced_retry.core.sanitize import shown
from traced_retry.core.waiting import WaitingReply
from traced_retry.errors import ArgumentError

Frames = list[rtc.AudioFrame]

_RATE: Final = 24_000
"""Samples per second of the tone, as in LiveKit's room output."""
_FRAME: Final = 480
"""Samples of a frame of the tone: 20 ms."""
_TONE: Final = 15
"""Frames of the tone: 0.3 s."""
_PITCH: Final = 440.0
"""Hertz."""
_VOLUME: Final = 3277
"""A tenth of full scale, which is -20 dBFS."""


class Filler:
    """A sound for a caller who waits for a reply, to be passed as ``on_waiting``.

    The sound begins ``RetryPolicy.waiting_after`` seconds after the request. It stops before the
    first frame of the reply is played, when the caller speaks, and when the reply is lost. It is
    neither in the chat history nor in the provider's context. A session without audio output plays
    no sound.

    Args:
        sound: an audio file, or mono frames. Default: a soft tone of 0.3 s.
        pause: seconds until the sound is repeated. None plays it once. Default: 2.0 s.

    Raises:
        ArgumentError: if the file does not exist, if frames are not mono, or if an argument has a
            wrong type.
    """

    def __init__(
        self,
        sound: str | os.PathLike[str] | Iterable[rtc.AudioFrame] | None = None,
        *,
        pause: float | None = 2.0,
    ) -> None:
        self._pause = _checked_pause(pause)
        self._frames: Frames | None = None
        self._read: Callable[[], Awaitable[Frames]] | None = None
        if sound is None:
            self._frames = _tone()
        elif isinstance(sound, (str, os.PathLike)):
            path = Path(sound)
            if not path.is_file():
                raise ArgumentError(f"sound is {shown(str(path))}; there is no such file")
            self._read = lambda: _read_file(path)
        else:
            self._frames = _checked_frames(sound)

    @classmethod
    def sentence(cls, text: str, tts: tts.TTS[Any], *, pause: float | None = None) -> Filler:
        """Return a filler that says ``text``.

        Args:
            text: the sentence.
            tts: synthesizes the sentence once. Call :meth:`load` at the start, because the first
                filler otherwise begins only when the sentence is complete.
            pause: seconds until the sentence is repeated. Default: None, which says it once.

        Raises:
            ArgumentError: if an argument has a wrong type.
        """
        filler = cls(pause=pause)
        filler._frames, filler._read = None, lambda: _synthesize(text, tts)
        return filler

    async def load(self) -> None:
        """Read the file or synthesize the sentence, unless that was done."""
        await self._load()

    async def __call__(self, waiting: WaitingReply) -> None:
        """Play the sound until it is cancelled or the caller speaks."""
        session: AgentSession[Any] | None = waiting.session
        if session is None:
            return
        frames = await self._load()
        output = await _filler_output(session, started=waiting.started)
        if output is None or session.user_state == "speaking":
            return
        frames = _resample(frames, output.sample_rate)
        spoken = asyncio.Event()

        def on_user_state(event: UserStateChangedEvent) -> None:
            if event.new_state == "speaking":
                spoken.set()
                output.stop()

        session.on("user_state_changed", on_user_state)
        try:
            while not spoken.is_set():
                output.start(frames)
                await output.over.wait()
                if self._pause is None:
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(spoken.wait(), self._pause)
                await output.wait_for_playout()  # of the agent's speech
        finally:
            session.off("user_state_changed", on_user_state)
            output.stop()

    async def _load(self) -> Frames:
        if self._frames is None:
            assert self._read is not None
            self._frames = _checked_frames(await self._read())
        return self._frames


class FillerOutput(AudioOutput):
    """The output below the wrappers of a session. It passes the agent's speech on.

    While the agent does not speak, it plays fillers. The outputs above see neither their frames nor
    their events.
    """

    def __init__(self, output: AudioOutput) -> None:
        super().__init__(
            label="traced_retry.filler",
            capabilities=AudioOutputCapabilities(pause=True),
            next_in_chain=output,
            sample_rate=output.sample_rate,
        )
        assert self.next_in_chain is not None
        self._output: AudioOutput = self.next_in_chain
        self.over = asyncio.Event()
        """Set while no filler is being played."""
        self.over.set()
        self._stopped = False
        self._pushed = False
        """Whether all frames of the filler were passed on."""
        self._pushing: asyncio.Task[None] | None = None
        self._withheld = False
        """Whether the agent's segment waits for the end of the filler."""
        self._capturing = False
        self._segments = 0
        """Segments of the agent's speech that are not over."""
        self.on("playback_finished", self._on_segment_over)

    # --- the filler ----------------------------------------------------------------------------

    def start(self, frames: Frames) -> None:
        """Play ``frames``, unless the agent speaks or another filler is being played."""
        if self._segments == 0 and self.over.is_set():
            self.over.clear()
            self._stopped = self._pushed = False
            self._pushing = asyncio.create_task(self._push(frames))

    def stop(self) -> None:
        """Stop the filler, if there is one."""
        if self.over.is_set() or self._stopped:
            return
        self._stopped = True
        if self._pushed:
            with suppress_and_log("stopping a filler"):
                self._output.clear_buffer()

    async def _push(self, frames: Frames) -> None:
        # A capture is not cancelled, because wrappers count it before the output has accepted it.
        captured = False
        try:
            with suppress_and_log("playing a filler"):
                for frame in frames:
                    if self._stopped:
                        break
                    await self._output.capture_frame(frame)
                    captured = True
                if captured:
                    self._output.flush()
                    self._pushed = True
                    if self._stopped:
                        self._output.clear_buffer()
        finally:
            if not self._pushed:
                self.over.set()

    # --- the agent's speech --------------------------------------------------------------------

    async def capture_frame(self, frame: rtc.AudioFrame) -> None:
        """Stop the filler, wait for its end, and pass the frame on."""
        await super().capture_frame(frame)
        if not self._capturing:
            self._capturing = True
            self._segments += 1
        self._withheld = not self.over.is_set()
        if self._withheld:
            self.stop()
            await self.over.wait()
            if not self._withheld:
                return  # The segment was cleared during the wait.
            self._withheld = False
        await self._output.capture_frame(frame)

    def flush(self) -> None:
        """End the agent's segment."""
        super().flush()
        self._capturing = False
        if self.over.is_set() and not self._withheld:
            self._output.flush()

    def clear_buffer(self) -> None:
        """Stop the filler and the agent's speech."""
        self.stop()
        if self._withheld:  # The output below knows of no segment, so it would report no end.
            self._withheld = False
            super().on_playback_finished(playback_position=0.0, interrupted=True)
        elif self.over.is_set():
            self._output.clear_buffer()

    def on_detached(self) -> None:
        """Stop the filler, because another output takes the place of this one."""
        self.stop()
        super().on_detached()

    def on_playback_started(self, **event: Any) -> None:
        """Forward the event, unless it is the filler's."""
        if self.over.is_set():
            super().on_playback_started(**event)

    def on_playback_progressed(self, **event: Any) -> None:
        """Forward the event, unless it is the filler's."""
        if self.over.is_set():
            super().on_playback_progressed(**event)

    def on_playback_finished(self, **event: Any) -> None:
        """Forward the event, or end the filler."""
        if self.over.is_set():
            super().on_playback_finished(**event)
        else:
            self.over.set()

    def _on_segment_over(self, _: object) -> None:
        self._segments = max(0, self._segments - 1)


async def _filler_output(session: AgentSession[Any], *, started: bool) -> FillerOutput | None:
    """Return the session's output for fillers once the agent does not speak, or None.

    Insert the output if there is none.
    """
    output = session.output.audio
    if output is None or not session.output.audio_enabled:
        return None
    last = _last(output)
    await last.wait_for_playout()
    if session.output.audio is not output or _last(output) is not last:
        return None  # An avatar has come.
    if isinstance(last, FillerOutput):
        return last
    made = FillerOutput(last)
    session.output.replace_audio_tail(made)
    # The pending response would be played beside the filler, if it already has the old output.
    return None if started and last is output else made


def _last(output: AudioOutput) -> AudioOutput:
    """Return the output for fillers in the chain that begins with ``output``, or its last one."""
    while not isinstance(output, FillerOutput) and output.next_in_chain is not None:
        output = output.next_in_chain
    return output


def _tone() -> Frames:
    """Return a soft tone that fades in and out, because an edge in a sound clicks."""
    count = _FRAME * _TONE
    samples = array.array(
        "h",
        (
            round(_VOLUME * math.sin(math.pi * n / count) * math.sin(math.tau * _PITCH * n / _RATE))
            for n in range(1, count + 1)
        ),
    )
    return [
        rtc.AudioFrame(samples[at : at + _FRAME].tobytes(), _RATE, 1, _FRAME)
        for at in range(0, count, _FRAME)
    ]


async def _read_file(path: Path) -> Frames:
    return [frame async for frame in audio_frames_from_file(str(path))]


async def _synthesize(text: str, model: tts.TTS[Any]) -> Frames:
    async with model.synthesize(text) as stream:
        return [event.frame async for event in stream]


def _resample(frames: Frames, rate: int | None) -> Frames:
    """Return ``frames`` with ``rate`` samples per second. None accepts any rate."""
    if not frames or rate in (None, frames[0].sample_rate):
        return frames
    resampler = rtc.AudioResampler(frames[0].sample_rate, rate)
    return [out for frame in frames for out in resampler.push(frame)] + resampler.flush()


def _checked_frames(frames: object) -> Frames:
    if not isinstance(frames, Iterable) or isinstance(frames, bytes):
        raise ArgumentError(f"sound is {shown(frames)}; it must be a file or frames")
    checked = list(frames)
    if not checked:
        raise ArgumentError("sound holds no frame; it must hold mono AudioFrames")
    for frame in checked:
        if not isinstance(frame, rtc.AudioFrame) or frame.num_channels != 1:
            raise ArgumentError(f"sound holds {shown(frame)}; it must hold mono AudioFrames")
    return checked


def _checked_pause(pause: object) -> float | None:
    if pause is None:
        return None
    if isinstance(pause, bool) or not isinstance(pause, (int, float)) or not 0 <= pause < math.inf:
        raise ArgumentError(f"pause is {shown(pause)}; it must be seconds, 0 or more, or None")
    return pause
