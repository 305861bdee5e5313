# SPDX-License-Identifier: Apache-2.0
"""Select replies: by outcome, provider, service, time and trace."""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from traced_retry.errors import UsageError
from traced_retry.report.model import Reply

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")


@dataclass(frozen=True)
class Selection:
    """The replies of a report. A reply must meet each condition that is set."""

    failed: bool = False
    """Only exhausted and not recoverable replies."""
    provider: str | None = None
    """``gen_ai.provider.name``."""
    service: str | None = None
    """``service.name`` of the process that ran the agent."""
    since: float | None = None
    """Unix seconds. Only replies that started then or later."""
    trace: str | None = None
    """A trace id, or its first digits."""

    def __post_init__(self) -> None:
        """Write the trace id as spans do: in lower case."""
        if self.trace is not None:
            object.__setattr__(self, "trace", self.trace.strip().lower())

    def matches(self, reply: Reply) -> bool:
        """Return whether the reply meets each condition."""
        return (
            (not self.failed or reply.group == "failed")
            and self.provider in (None, reply.provider)
            and self.service in (None, reply.service)
            and (self.since is None or reply.start >= self.since)
            and (self.trace is None or reply.trace_id.startswith(self.trace))
        )

    def __str__(self) -> str:
        """Return the conditions as the options of the command line."""
        words = ["--failed"] if self.failed else []
        given = {"provider": self.provider, "service": self.service, "trace": self.trace}
        words.extend(f"--{name} {value}" for name, value in given.items() if value is not None)
        if self.since is not None:
            words.append(f"--since {datetime.fromtimestamp(self.since, UTC):%Y-%m-%dT%H:%M:%SZ}")
        return " ".join(words)


class Newest:
    """The newest replies of a stream, at most ``number`` of them. With None, all of them."""

    def __init__(self, number: int | None) -> None:
        self._number = number
        self._heap: list[tuple[float, str, int, Reply]] = []
        self._tie = itertools.count()

    def add(self, reply: Reply) -> None:
        """Keep the reply if it is one of the newest."""
        entry = (reply.start, reply.trace_id, next(self._tie), reply)
        if self._number is None or len(self._heap) < self._number:
            heapq.heappush(self._heap, entry)
        elif self._heap and entry > self._heap[0]:
            heapq.heapreplace(self._heap, entry)

    def __iter__(self) -> Iterator[Reply]:
        """Iterate over the replies in the order of their start."""
        return (entry[-1] for entry in sorted(self._heap))


def parse_since(text: str, now: float) -> float:
    """Return Unix seconds for a duration before ``now``, or for a date and time.

    A time without a zone is UTC.

    Raises:
        UsageError: if ``text`` is neither.
    """
    if match := _DURATION.fullmatch(text.strip()):
        return now - float(match[1]) * _SECONDS[match[2]]
    try:
        time = datetime.fromisoformat(text.strip())
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise UsageError(
            f"invalid time {text!r}: expected for example 90s, 5m, 24h, 7d, or 2026-11-25T14:30"
        ) from None
