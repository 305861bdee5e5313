# SPDX-License-Identifier: Apache-2.0
"""The numbers of a report: per provider for its table, per reply for machines."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from traced_retry import semconv
from traced_retry.report.model import Group, Reply

LEGEND: Final = (
    "first try: heard without a retry. cut short: interrupted by the caller or superseded by the "
    "provider. added: seconds of silence that retrying added, of the replies that were retried."
)
"""Meaning of the headings of :func:`table`."""


@dataclass(frozen=True)
class ProviderSummary:
    """How one provider's replies ended. ``first_try`` to ``unknown`` sum to ``replies``."""

    provider: str
    replies: int
    first_try: int
    recovered: int
    failed: int
    """Exhausted or not recoverable."""
    cut_short: int
    """Interrupted by the caller or superseded by the provider."""
    unknown: int
    """The reply's own span is missing, or its outcome is unknown."""
    retries: int
    silence_added_p50: float | None
    silence_added_p95: float | None
    """Seconds that retrying added to the silence: a reply's duration less its last attempt's, of
    the replies that took more than one attempt. None if there is no such reply."""


class Summary:
    """The numbers of replies. Memory holds no reply, and one number per retried reply.

    Args:
        replies: the first replies to count.
    """

    def __init__(self, replies: Iterable[Reply] = ()) -> None:
        self.replies = 0
        """Replies and ``say`` calls."""
        self.said: Counter[Group] = Counter()
        """The ``say`` calls by their group."""
        self.began = math.inf
        """Start of the first reply, in Unix seconds."""
        self.ended = -math.inf
        """End of the last reply, in Unix seconds."""
        self._providers: dict[str, _Counts] = {}
        for reply in replies:
            self.add(reply)

    def add(self, reply: Reply) -> None:
        """Count one reply."""
        self.replies += 1
        self.began, self.ended = min(self.began, reply.start), max(self.ended, reply.end)
        if reply.say:
            self.said[reply.group] += 1
            return
        counts = self._providers.get(reply.provider)
        if counts is None:
            counts = self._providers[reply.provider] = _Counts()
        counts.groups[reply.group] += 1
        counts.retries += reply.retries
        if (added := reply.silence_added) is not None:
            counts.silences.append(added)

    def rows(self) -> list[ProviderSummary]:
        """Return one summary per provider, in order of name. ``say`` calls are excluded."""
        return [self._row(name, counts) for name, counts in sorted(self._providers.items())]

    def _row(self, provider: str, counts: _Counts) -> ProviderSummary:
        groups = counts.groups
        return ProviderSummary(
            provider=provider,
            replies=groups.total(),
            first_try=groups["first_try"],
            recovered=groups["recovered"],
            failed=groups["failed"],
            cut_short=groups["cut_short"],
            unknown=groups["unknown"],
            retries=counts.retries,
            silence_added_p50=percentile(counts.silences, 50),
            silence_added_p95=percentile(counts.silences, 95),
        )


class _Counts:
    """The numbers of one provider."""

    def __init__(self) -> None:
        self.groups: Counter[Group] = Counter()
        self.retries = 0
        self.silences = array("d")


def summarize(replies: Iterable[Reply]) -> list[ProviderSummary]:
    """Return one summary per provider, in order of name. ``say`` calls are excluded."""
    return Summary(replies).rows()


def table(rows: Sequence[ProviderSummary]) -> list[list[str]]:
    """Return headings and rows as text. The column ``unknown`` is shown only if it is not 0."""
    unknown = any(row.unknown for row in rows)
    heads = ["provider", "replies", "first try", "recovered", "failed", "cut short"]
    heads += ["unknown"] * unknown + ["retries", "added p50", "added p95"]
    lines = [heads]
    for row in rows:
        counts = [row.replies, row.first_try, row.recovered, row.failed, row.cut_short]
        counts += [row.unknown] * unknown + [row.retries]
        added = [row.silence_added_p50, row.silence_added_p95]
        seconds = ["-" if value is None else f"{value:.2f}" for value in added]
        lines.append([row.provider, *map(str, counts), *seconds])
    return lines


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return the nearest-rank percentile: the smallest value that ``percent`` % do not exceed.

    The result is one of ``values``, or None if ``values`` is empty.
    """
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def as_dict(reply: Reply) -> dict[str, Any]:
    """Return ``reply`` as a dict for ``json.dumps``. ``outcome`` is None if unknown."""
    return {
        "operation": semconv.SPAN_SAY if reply.say else semconv.SPAN_REPLY,
        "service": reply.service,
        "provider": reply.provider,
        "model": reply.model,
        "outcome": reply.outcome,
        "stop_reason": reply.stop_reason,
        "attempts": reply.attempt_count,
        "seconds": round(reply.seconds, 6),
        "trace_id": reply.trace_id,
        "error_type": reply.error_type,
        "codes": list(reply.codes),
    }
