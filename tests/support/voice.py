# SPDX-License-Identifier: Apache-2.0
"""A user's TTS, which says one second of the same sample."""

from __future__ import annotations

from livekit.agents import DEFAULT_API_CONNECT_OPTIONS, tts

SECONDS = 1.0


class Voice(tts.TTS):
    """A voice.

    Args:
        error: raised instead of the speech, if given.
    """

    def __init__(self, error=None):
        super().__init__(
            capabilities=tts.TTSCapabilities(streaming=False), sample_rate=24_000, num_channels=1
        )
        self.error = error
        self.texts = []

    def synthesize(self, text, *, conn_options=DEFAULT_API_CONNECT_OPTIONS):
        self.texts.append(text)
        return _Speech(tts=self, input_text=text, conn_options=conn_options)


class _Speech(tts.ChunkedStream):
    async def _run(self, output_emitter):
        if self._tts.error is not None:
            raise self._tts.error
        output_emitter.initialize(
            request_id="one", sample_rate=24_000, num_channels=1, mime_type="audio/pcm"
        )
        output_emitter.push(b"\x01\x00" * int(24_000 * SECONDS))
        output_emitter.flush()
