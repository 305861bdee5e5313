# SPDX-License-Identifier: Apache-2.0
"""The hook on LiveKit's ``RealtimeSession``, and one small adapter per provider."""

from traced_retry.livekit.hook import instrument, uninstrument, wrap

__all__ = ["instrument", "uninstrument", "wrap"]
