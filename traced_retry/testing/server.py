# SPDX-License-Identifier: Apache-2.0
"""A provider on 127.0.0.1 that fails on a script, for a test."""

from __future__ import annotations

from traced_retry.errors import UsageError
from traced_retry.simulator import PROVIDERS, Simulator, simulator


def realtime_server(script: str = "ok", *, provider: str = "openai") -> Simulator:
    """Return a server that plays a fault script. Use it as an async context manager.

    Inside the context, ``server.url`` is its address, ``server.requests`` has the requests heard,
    and ``server.completed`` the texts of the completed replies.

    Args:
        script: the faults of the requests in order, such as ``"rate_limit:3,late:12,ok"``. The
            last one repeats. ``traced-retry simulate --help`` lists them.
        provider: the provider of the protocol, such as ``"openai"`` or ``"google"``.

    Raises:
        ScriptError: if the script is invalid.
        UsageError: if the provider is unknown.
    """
    if provider not in PROVIDERS:
        raise UsageError(f"provider is {provider!r}; it must be one of {', '.join(PROVIDERS)}")
    return simulator(provider)(script)
