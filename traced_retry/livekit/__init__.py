# SPDX-License-Identifier: Apache-2.0
"""The hook on LiveKit's ``RealtimeSession``, and one small adapter per provider.

LiveKit is imported at the first use of a public name, because ``opentelemetry-instrument`` imports
a module of this package in processes that are unrelated to LiveKit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from traced_retry.livekit.hook import instrument, uninstrument, wrap

__all__ = ["instrument", "uninstrument", "wrap"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from traced_retry.livekit import hook  # noqa: PLC0415 - it imports LiveKit

        return getattr(hook, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
