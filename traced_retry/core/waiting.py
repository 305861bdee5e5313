# SPDX-License-Identifier: Apache-2.0
"""A reply without output: :class:`WaitingReply` for ``on_waiting``, and the timer that calls it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from traced_retry import semconv


@dataclass(frozen=True)
class WaitingReply:
    """A reply that the caller still waits for, as passed to ``on_waiting``.

    Args:
        provider: ``gen_ai.provider.name`` of the telemetry, such as ``"openai"``.
        model: ``gen_ai.request.model``, or None if it is unknown.
        seconds: seconds since the request, or since the caller stopped speaking.
        started: whether the provider has started a response. It has no output yet.
        trace_id: 32 hexadecimal digits, or None if the reply is not traced or its trace is not
            sampled.
        initiator: ``"agent"`` if the code requested the reply. ``"provider"`` if the provider
            starts it, because the caller spoke or a tool returned.
        speech: LiveKit's ``SpeechHandle`` of the reply, or None if there is none yet.
        session: LiveKit's ``AgentSession`` that waits for the reply, or None if there is none.
    """

    provider: str
    model: str | None
    seconds: float
    started: bool
    trace_id: str | None
    initiator: semconv.Initiator = "agent"
    speech: Any = None
    session: Any = None


class Wait:
    """The time from a request to the first output or the end of its reply.

    Args:
        report: called once, at the time that :meth:`begin` gets. It may return a future, which
            :meth:`end` cancels.
    """

    __slots__ = ("_report", "_reported", "_timer")

    def __init__(self, report: Callable[[], asyncio.Future[None] | None]) -> None:
        self._report = report
        self._timer: asyncio.TimerHandle | None = None
        self._reported: asyncio.Future[None] | None = None

    def begin(self, when: float) -> None:
        """Report the wait at ``when`` on the event loop's clock, unless it has ended by then."""
        self._timer = asyncio.get_running_loop().call_at(when, self._on_timer)

    def end(self) -> None:
        """End the wait, because there is output or there will be none."""
        if self._timer is not None:
            self._timer.cancel()
        if self._reported is not None:
            self._reported.cancel()

    def _on_timer(self) -> None:
        self._reported = self._report()
