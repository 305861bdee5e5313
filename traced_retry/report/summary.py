# SPDX-License-Identifier: Apache-2.0
"""The numbers of a report: per provider for its table, per reply for machines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from traced_retry import semconv
from traced_retry.report.model import Reply

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
    """The reply's own span is missing, or its outcome is none that we know."""
    retries: int
    silence_added_p50: float | None
    silence_added_p95: float | None
    """Seconds that retrying added to the silence: a reply's duration less its last attempt's, of
    the replies that took more than one attempt. None where there are none."""


def summarize(replies: Iterable[Reply]) -> list[ProviderSummary]:
    """Return one summary per provider, in order of name. ``say`` calls are excluded."""
    by_provider: dict[str, list[Reply]] = {}
    for reply in replies:
        if not reply.say:
            by_provider.setdefault(reply.provider, []).append(reply)
    return [_summary(name, by_provider[name]) for name in sorted(by_provider)]


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


def _summary(provider: str, replies: list[Reply]) -> ProviderSummary:
    groups = Counter(reply.group for reply in replies)
    added = [reply.silence_added for reply in replies]
    silences = [seconds for seconds in added if seconds is not None]
    return ProviderSummary(
        provider=provider,
        replies=len(replies),
        first_try=groups["first_try"],
        recovered=groups["recovered"],
        failed=groups["failed"],
        cut_short=groups["cut_short"],
        unknown=groups["unknown"],
        retries=sum(reply.retries for reply in replies),
        silence_added_p50=percentile(silences, 50),
        silence_added_p95=percentile(silences, 95),
    )
